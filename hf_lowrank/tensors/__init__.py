"""Tensors, and nothing of methods."""
