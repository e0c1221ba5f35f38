"""Every method and policy there is: the laws in tests/laws hold for each of them, and for each pair.

A new method or policy is one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pytest

from distnorm.methods import (
    IEBN,
    L1,
    MAD,
    RMS,
    SQD,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Method,
    MixtureNorm,
    Range,
    Semideviation,
    WorstCase,
)
from distnorm.policies import AllReduce, Chain, Local, Moving, Periodic, Policy, StaleMix, Warmup
from tests.support import reference


class MethodUnderTest(NamedTuple):
    """A method, and an independent implementation of it over the joined batch."""

    method: Method
    reference: Callable[..., reference.Normalized]


def _generalized(pair: reference.Pair) -> Callable[..., reference.Normalized]:
    return partial(reference.generalized, pair=pair)


# In the state of a converted layer. Later steps of those with declared buffers: tests/laws/test_declared_buffers.py.
METHODS = {
    "BatchNorm": MethodUnderTest(BatchNorm(), reference.batch_norm),
    "RMS": MethodUnderTest(RMS(), reference.rms_norm),
    "L1": MethodUnderTest(L1(), _generalized(reference.l1)),
    "Semideviation": MethodUnderTest(Semideviation(), _generalized(reference.semideviation)),
    "Range": MethodUnderTest(Range(), _generalized(reference.value_range)),
    "WorstCase": MethodUnderTest(WorstCase(), _generalized(reference.worst_case)),
    # With exact=True, quantiles of ranks would be averaged: not those of the joined batch.
    "MAD": MethodUnderTest(MAD(), _generalized(reference.normal_pair(0.5))),
    "SQD": MethodUnderTest(SQD(alpha=0.8), _generalized(reference.normal_pair(0.8))),
    "IEBN": MethodUnderTest(IEBN(), reference.instance_enhancement),
    "MixtureNorm": MethodUnderTest(MixtureNorm(components=2, rounds=1), reference.first_mixture),
    "LayerNorm": MethodUnderTest(LayerNorm(), partial(reference.group_norm, groups=1)),
    "GroupNorm": MethodUnderTest(GroupNorm(groups=1), partial(reference.group_norm, groups=1)),
    "InstanceNorm": MethodUnderTest(InstanceNorm(), reference.group_norm),
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


BASIC = ("BatchNorm",)
USUAL = ("AllReduce",)


def methods() -> list[object]:
    """Test parameters: every method; slow tests unless it is a basic one."""
    return [
        pytest.param(under_test, id=name, marks=() if name in BASIC else pytest.mark.slow)
        for name, under_test in METHODS.items()
    ]


def pairs(policies: Mapping[str, Policy], usual: Sequence[str] = USUAL) -> list[object]:
    """Test parameters: every method with every one of ``policies`` that admits it.

    Policies do not see what values mean. Pairs are slow tests unless the method is a basic one, or the policy is among
    the ``usual`` ones. Policies that average over steps cannot average maxima, which
    ``Range`` and ``WorstCase`` share.
    """
    return [
        pytest.param(
            under_test,
            policy,
            id=f"{method}-{name}",
            marks=() if method in BASIC or name in usual else pytest.mark.slow,
        )
        for method, under_test in METHODS.items()
        for name, policy in policies.items()
        if not (under_test.method.needs_max and policy.facts.keeps_cotangents)
    ]
