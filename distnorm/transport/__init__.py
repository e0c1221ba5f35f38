"""Who carries the bytes: process groups of our own, and which ranks they join."""

from distnorm.transport.group import LostGroup, TorchGroup
from distnorm.transport.topology import Topology

__all__ = ["LostGroup", "Topology", "TorchGroup"]
