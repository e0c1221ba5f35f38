"""Kernels: the loops over activations. Everything else in the package handles tensors with one value per channel."""
