"""Train cross-layer transcoders on language models and trace attribution graphs with them."""

__version__ = "0.1.0"
