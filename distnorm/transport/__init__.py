"""Who carries the bytes: groups of our own, of torch or of MPI, and which ranks they join."""

from distnorm.transport.group import Group, LostGroup, TorchGroup, check_group, lost
from distnorm.transport.topology import Topology

__all__ = ["Group", "LostGroup", "Topology", "TorchGroup", "check_group", "lost"]
