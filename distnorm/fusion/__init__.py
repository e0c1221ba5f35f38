"""Fuse a norm with its epilogue: the addition and the ReLU that follow it in the model's code."""
