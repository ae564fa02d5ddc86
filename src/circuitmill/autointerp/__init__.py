"""Explain features in words, and measure how well the words predict them."""
