"""How sums are shared: the policy axis of the grid."""

from distnorm.policies.all_reduce import AllReduce
from distnorm.policies.base import Policy, Reducer
from distnorm.policies.chain import Chain
from distnorm.policies.local import Local
from distnorm.policies.periodic import Periodic

__all__ = ["AllReduce", "Chain", "Local", "Periodic", "Policy", "Reducer"]
