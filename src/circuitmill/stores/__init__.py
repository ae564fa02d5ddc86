"""Bytes on disk: manifests, tokens, activations, checkpoints, transcoders, features, explanations, graphs."""
