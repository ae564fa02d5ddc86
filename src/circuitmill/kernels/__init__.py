"""Sparse operators: what a transcoder computes at the few places where features fire."""
