"""Policies: how the ranks of a job share sums."""

from distnorm.policies.all_reduce import AllReduce
from distnorm.policies.base import Policy, Reducer
from distnorm.policies.chain import Chain
from distnorm.policies.facts import Completeness, Facts
from distnorm.policies.local import Local
from distnorm.policies.moving import Moving
from distnorm.policies.periodic import Periodic
from distnorm.policies.stale_mix import StaleMix
from distnorm.policies.warmup import Warmup

__all__ = [
    "AllReduce",
    "Chain",
    "Completeness",
    "Facts",
    "Local",
    "Moving",
    "Periodic",
    "Policy",
    "Reducer",
    "StaleMix",
    "Warmup",
]
