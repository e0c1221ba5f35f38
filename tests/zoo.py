"""Every method and policy there is: the laws in tests/laws hold for each of them, and for each pair.

A new method or policy is one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Chain, Local, Moving, Periodic, Policy, StaleMix, Warmup
from tests.support import reference


class MethodUnderTest(NamedTuple):
    """A method, and an independent implementation of it over the joined batch."""

    method: Method
    reference: Callable[..., reference.Normalized]


METHODS = {
    "BatchNorm": MethodUnderTest(BatchNorm(), reference.batch_norm),
    "RMS": MethodUnderTest(RMS(), reference.rms_norm),
}

# Policies whose statistics are those of the joined batch of all ranks, in every step. Laws run them on a mesh of
# nodes x local ranks.
EXACT: dict[str, Policy] = {
    "AllReduce": AllReduce(),
    "Chain": Chain(AllReduce(axis="local"), AllReduce(axis="node")),
    "Periodic-1": Periodic(every=1),
}

# Policies that join fewer ranks, or not in every step.
PARTIAL: dict[str, Policy] = {
    "Local": Local(),
    "group-size": AllReduce(group_size=1),
    "group-axis": AllReduce(axis="local"),
    "Periodic-3": Periodic(every=3),
    "Periodic-chain": Chain(AllReduce(axis="local"), Periodic(every=2, policy=AllReduce(axis="node"))),
}

POLICIES = EXACT | PARTIAL

# Policies that remember earlier steps. No linear maps, and without second derivatives: law 5 holds for them as it is,
# tests/moving has the others in the form that suits them.
MOVING: dict[str, Policy] = {
    "Moving": Moving(window=3),
    "Moving-sum": Moving(window=3, loss_reduction="sum"),
    "Moving-blocking": Moving(window=2, staleness=0),
    "Moving-exact": Moving(window=1, staleness=0),
    "StaleMix": StaleMix(window=2),
    "Warmup": Warmup(then=Moving(window=2), steps=2),
    "Warmup-StaleMix": Warmup(first=Chain(AllReduce(axis="local"), AllReduce(axis="node")), then=StaleMix(), steps=1),
    "Chain-Warmup": Chain(
        AllReduce(axis="local"), Warmup(first=AllReduce(axis="node"), then=Moving(window=2, axis="node"), steps=1)
    ),
    "Chain-Moving": Chain(AllReduce(axis="local"), Moving(window=2, axis="node")),
}
