"""The embedded model: a generated world, a small language model of it, and what is true of both."""
