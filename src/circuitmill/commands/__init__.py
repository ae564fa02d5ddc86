"""Subcommands that are more than a line or two: each module adds its own to the command line."""
