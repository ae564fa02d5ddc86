"""Optimisation of a transcoder on batches of activations; knows no file formats."""
