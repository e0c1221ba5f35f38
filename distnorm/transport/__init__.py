"""Transport: process groups of our own, through torch or MPI, and the ranks in them."""

from distnorm.transport.group import Group, LostGroup, TorchGroup, check_group, lost
from distnorm.transport.topology import Topology

__all__ = ["Group", "LostGroup", "Topology", "TorchGroup", "check_group", "lost"]
