"""Differentiation: how shared statistics and the per-channel kernels become nodes of the autograd graph."""
