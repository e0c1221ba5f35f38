"""Converted layers: the module, what it shares with the other ranks, and the layers that feed it."""
