"""The named recipes of other methods than batch norm. Those whose statistics are shared take any way of sharing."""

from __future__ import annotations

from typing import Literal

from distnorm.methods import (
    IEBN,
    L1,
    MAD,
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
from distnorm.policies import AllReduce, Local, Moving, Policy, StaleMix, Warmup
from distnorm.recipe import Recipe, Weights
from distnorm.validation import Components, Groups, Level, Rounds, checked

Sharing = Literal["local", "sync", "moving", "stale"]
Deviation = Literal["sd", "mad", "l1", "range", "worst_case", "sqd", "semideviation"]

_POLICIES: dict[Sharing, Policy] = {
    "local": Local(),
    "sync": AllReduce(),
    "moving": Warmup(then=Moving(window=16), steps=99),
    "stale": Warmup(then=StaleMix(window=8), steps=16),
}
"""Of the same lengths as ``local_bn``, ``sync_bn``, ``mabn`` and ``lazy_bn``."""


@checked
def gbn(
    *, deviation: Deviation = "sqd", alpha: Level | None = None, policy: Sharing = "sync", weights: Weights = "none"
) -> Recipe:
    """Generalized batch norm: another statistic and deviation than the mean and the standard deviation.

    Issues one collective per layer and direction, two with "l1", "semideviation" and "worst_case". Evaluation is affine
    per channel, so it can be folded. Yuan et al., AAAI 2019, reconstructed; docs/methods.md says what is ours.

    Args:
        deviation: "sqd", the superquantile deviation about a quantile, which the paper recommends before a ReLU; "mad",
            the mean distance from the median; "l1", that from the mean; "semideviation" above the mean; "range", half
            the range about its middle; "worst_case", what the maximum exceeds the mean by; "sd", which is batch norm.
        alpha: the level of the quantile of "sqd", 0.7 by default.
        policy: "local", nothing is shared; "sync", the joined batch of all ranks; "moving" as ``mabn`` or "stale" as
            ``lazy_bn``, one asynchronous collective per step, for all but "range" and "worst_case". Quantiles are exact
            with "local"; with others they are those of all ranks, by a threshold that follows them.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    if alpha is not None and deviation != "sqd":
        raise ValueError(
            f'gbn(deviation="{deviation}", alpha={alpha}): only deviation="sqd" has an alpha; leave it out.'
        )
    exact = policy == "local"
    methods: dict[Deviation, Method] = {
        "sd": BatchNorm(),
        "mad": MAD(exact=exact),
        "l1": L1(),
        "range": Range(),
        "worst_case": WorstCase(),
        "sqd": SQD(exact=exact) if alpha is None else SQD(alpha=alpha, exact=exact),
        "semideviation": Semideviation(),
    }
    return Recipe(method=methods[deviation], policy=_POLICIES[policy], weights=weights)


@checked
def iebn(*, policy: Sharing = "sync", weights: Weights = "none") -> Recipe:
    """Batch norm whose scale a gate adapts to each sample; two more parameters per channel.

    Issues the collectives of batch norm with the same policy. The first outputs are 0.27 times those of batch norm. It
    cannot be folded, since the gate depends on the sample. Liang et al., AAAI 2020.

    Args:
        policy: "local", nothing is shared; "sync", the joined batch of all ranks; "moving" as ``mabn`` or "stale" as
            ``lazy_bn``, one asynchronous collective per step.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=IEBN(), policy=_POLICIES[policy], weights=weights)


@checked
def mixture_norm(
    *, components: Components = 3, rounds: Rounds = 2, policy: Sharing = "sync", weights: Weights = "none"
) -> Recipe:
    """Normalize each position by the components of a Gaussian mixture to which it belongs.

    Issues one collective per round, layer and direction, of 2 components C values. It cannot be folded. Kalayeh & Shah,
    TPAMI 2019, reconstructed, with outputs of unit variance; docs/methods.md says what is ours.

    Args:
        components: components of the mixture; with 1 it is batch norm.
        rounds: rounds of EM per forward pass, from the running mixture on; 1 is online EM.
        policy: "local", nothing is shared; "sync", the joined batch of all ranks; "moving" as ``mabn`` or "stale" as
            ``lazy_bn``, one asynchronous collective per step.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    method = MixtureNorm(components=components, rounds=rounds)
    return Recipe(method=method, policy=_POLICIES[policy], weights=weights)


@checked
def layer_norm(*, weights: Weights = "none") -> Recipe:
    """Normalize all values of a sample together, by torch's own function, with one weight and bias per channel.

    Issues no collective. Evaluation does the same as training, so it cannot be folded. Ba et al. 2016; for images this
    is group norm with one group.

    Args:
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=LayerNorm(), policy=Local(), weights=weights)


@checked
def group_norm(*, groups: Groups | None = None, weights: Weights = "none") -> Recipe:
    """Normalize groups of neighbouring channels of each sample, by torch's own function.

    Issues no collective. Evaluation does the same as training, so it cannot be folded. Wu & He, ECCV 2018.

    Args:
        groups: groups per layer; must divide its channels. None: 32, or the largest divisor of the channels below.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=GroupNorm(groups=groups), policy=Local(), weights=weights)


@checked
def instance_norm(*, weights: Weights = "none") -> Recipe:
    """Normalize each channel of each sample, by torch's own function.

    Issues no collective. Evaluation does the same as training, so it cannot be folded. Ulyanov et al. 2016.

    Args:
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=InstanceNorm(), policy=Local(), weights=weights)
