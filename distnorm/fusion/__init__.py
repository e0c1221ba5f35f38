"""Fuse a norm with the addition and the ReLU that follow it in the model's own code."""
