"""The named recipes: methods from papers and practice, with options that a config file can hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

from distnorm.compat import source_code
from distnorm.method_recipes import gbn, group_norm, iebn, instance_norm, layer_norm, mixture_norm
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Local, Moving, Periodic, Policy, StaleMix, Warmup
from distnorm.policies.moving import LossReduction
from distnorm.recipe import Recipe, Weights
from distnorm.validation import (
    Axis,
    Clip,
    Period,
    Ranks,
    Steps,
    Window,
    checked,
    hints_of,
    refuse_duplicates,
    shown,
    suggest,
    written,
)

LONGEST = 1000
"""The greatest length of a recipe with its options, in characters."""


@checked
def local_bn(*, weights: Weights = "none") -> Recipe:
    """Batch norm over the local batch of each rank, as nn.BatchNorm does under DistributedDataParallel.

    Issues no collective. Running statistics differ between ranks; ``distnorm.sync_running_stats(model)`` averages them.
    Ioffe & Szegedy 2015, algorithm 1, per rank.

    Args:
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=BatchNorm(), policy=Local(), weights=weights)


@checked
def sync_bn(*, weights: Weights = "none", overlap: bool = False) -> Recipe:
    """Batch norm over the joined batch of all ranks, exactly.

    Issues one collective per layer and direction, of sums, squared sums and their count, so unequal and empty local
    batches are exact too. Peng et al., "MegDet", CVPR 2018; Zhang et al., "Context Encoding", CVPR 2018.

    Args:
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
        overlap: whether to overlap backward collectives with the weight gradients of the convolutions that follow.
            It has no effect under FSDP2 and ZeRO 3, which shard weights.
    """
    return Recipe(method=BatchNorm(), policy=AllReduce(), weights=weights, overlap=overlap)


@checked
def group_bn(*, size: Ranks | None = None, axis: Axis | None = None, weights: Weights = "none") -> Recipe:
    """Batch norm over groups of ranks: ``size`` neighbours, or all along a mesh ``axis``.

    Issues one collective per layer and direction among the ranks of a group. Running statistics differ between groups;
    ``distnorm.sync_running_stats(model)`` averages them. Ying et al., "Image Classification at Supercomputer Scale",
    2018 (contiguous groups; their 2-D tiling is a mesh axis here).

    Args:
        size: neighbouring ranks per group; must divide the number of ranks.
        axis: ``"local"``, ``"node"``, or an axis of the mesh given to ``convert``.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    if (size is None) == (axis is None):
        raise ValueError(f"group_bn: need either size or axis; got size={size!r}, axis={axis!r}.")
    return Recipe(method=BatchNorm(), policy=AllReduce(group_size=size, axis=axis), weights=weights)


@checked
def hierarchical_bn(*, local: Axis = "local", node: Axis = "node", weights: Weights = "none") -> Recipe:
    """Batch norm over all ranks, exactly, in two hops: within each node, then between nodes.

    Issues two collectives per layer and direction, each among few ranks. Equal to ``sync_bn`` up to rounding.

    Args:
        local: the axis of the ranks within a node; ``"local"`` needs no mesh.
        node: the axis across nodes; ``"node"`` needs no mesh.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=BatchNorm(), policy=Chain(AllReduce(axis=local), AllReduce(axis=node)), weights=weights)


@checked
def periodic_bn(*, every: Period = 8, weights: Weights = "none") -> Recipe:
    """Batch norm over all ranks in every ``every``-th step, over the local batch in between.

    In between, each rank uses the statistics of its local batch, forward and backward, and issues no collective. Only
    shared steps update the running statistics, which are therefore global and equal on all ranks. A step ends with a
    backward pass that builds no graph and reaches the input of a converted layer. Our own construction.

    Args:
        every: steps from one shared step to the next; the first step is shared.
        weights: "none", or how to compute every filter of the layers before the norms (see ``Recipe``).
    """
    return Recipe(method=BatchNorm(), policy=Periodic(every=every), weights=weights)


@checked
def mabn(
    *,
    window: Window = 16,
    warmup: Steps = 100,
    clip: Clip | None = 5.0,
    loss_reduction: LossReduction = "mean",
    weights: Weights = "centralized",
) -> Recipe:
    """Moving statistics: one asynchronous collective per step for the whole model, and none that a layer waits for.

    Layers normalize by the RMS over a window of steps: global values of past steps, local values of the newest one.
    Centralized weights replace the centring of activations. Running statistics are global and equal on all ranks.
    During the warm-up, layers synchronize exactly. Gradient accumulation and float16 need ``distnorm.attach``. Yan et
    al., ICLR 2020 (MABN), here shared across ranks.

    Args:
        window: its length in steps.
        warmup: the step from which windows are used, counted from 1 as in the paper's code. If the window is not full
            by then, they are used from the step at which it is.
        clip: bound of the correction by running statistics that is applied after 1000 steps (see ``RMS``), or None.
        loss_reduction: whether each rank's loss is a "mean" or a "sum" over its batch.
        weights: "centralized" as published, "none" to keep weights unchanged, or another way (see ``Recipe``).
    """
    moving = Moving(window=window, loss_reduction=loss_reduction)
    return _mabn(moving, window, warmup, clip, weights)


@checked
def hierarchical_mabn(
    *,
    local: Axis = "local",
    node: Axis = "node",
    window: Window = 16,
    warmup: Steps = 100,
    clip: Clip | None = 5.0,
    weights: Weights = "centralized",
) -> Recipe:
    """Moving statistics as in ``mabn`` between nodes, exact synchronization within each node.

    Issues one blocking collective per layer and direction in the node, and one asynchronous collective per step between
    nodes.

    Args:
        local: the axis of the ranks within a node; ``"local"`` needs no mesh.
        node: the axis across nodes; ``"node"`` needs no mesh.
        window: its length in steps.
        warmup: the step from which windows are used, counted from 1; as in ``mabn``.
        clip: as in ``mabn``.
        weights: as in ``mabn``.
    """
    policy = Chain(AllReduce(axis=local), Moving(window=window, axis=node))
    return _mabn(policy, window, warmup, clip, weights)


@checked
def lazy_bn(*, window: Window = 8, warmup: Steps = 16, weights: Weights = "centralized") -> Recipe:
    """Batch norm with one asynchronous collective per step: past statistics of other ranks, current ones of this rank.

    Synchronizes exactly for ``warmup`` steps. Running statistics are global and equal on all ranks. Our own
    construction; docs/moving.md derives it and explains why weights are centralized.

    Args:
        window: steps over which the statistics of the other ranks are averaged; with 1, accuracy on natural images is
            lower.
        warmup: exactly synchronized steps at the start.
        weights: "centralized", "none" to keep weights unchanged, or another way (see ``Recipe``).
    """
    return Recipe(method=BatchNorm(), policy=Warmup(then=StaleMix(window=window), steps=warmup), weights=weights)


def _mabn(policy: Policy, window: int, warmup: int, clip: float | None, weights: Weights) -> Recipe:
    # In the paper's code iteration i, counted from 1, is windowed if i > window and i >= warmup.
    relay = Warmup(then=policy, steps=max(warmup - 1, window))
    method = RMS(clip=clip, clip_after=max(1000, warmup))
    return Recipe(method=method, policy=relay, weights=weights, momentum=0.02)


_BUILDERS: dict[str, Callable[..., Recipe]] = {
    builder.__name__: builder
    for builder in (
        *(local_bn, sync_bn, group_bn, hierarchical_bn, periodic_bn, mabn, hierarchical_mabn, lazy_bn),
        *(gbn, iebn, mixture_norm, layer_norm, group_norm, instance_norm),
    )
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """A named recipe: the first line and the full text of its docstring, and its options with their defaults."""

    name: str
    summary: str
    text: str
    options: dict[str, str]


def describe(name: str) -> Description:
    """Describe the recipe ``name``.

    Raises:
        ValueError: no such recipe; the message suggests the nearest.
    """
    builder = _builder(name)
    text = inspect.getdoc(builder) or ""
    parameters = inspect.signature(builder).parameters.values()
    hints = hints_of(builder)
    options = {each.name: f"{written(hints[each.name])} = {each.default!r}" for each in parameters}
    return Description(name=name, summary=text.partition("\n")[0], text=text, options=options)


def available() -> list[Description]:
    """Describe every named recipe."""
    return [describe(name) for name in _BUILDERS]


def build(name: str, /, **options: object) -> Recipe:
    """Build the recipe ``name`` with ``options``; ``name`` may also be a call with options, as ``parse`` reads it.

    Raises:
        ValueError: an unknown name, an unknown option, or a value out of range; the message says what is allowed. Or
            options both in the name and as arguments.
    """
    if "(" in name:
        if options:
            raise ValueError(
                f"recipe {shown(name)} has options in its name, and separate options too: {', '.join(options)}. Write "
                "all of them in one place."
            )
        return parse(name)
    builder = _builder(name)
    allowed = list(inspect.signature(builder).parameters)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"recipe {name!r} has no option {option!r}{suggest(option, allowed)}; "
                f"its options are {', '.join(allowed)}."
            )
    recipe = builder(**options)
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return replace(recipe, name=f"{name}({given})" if given else name)


def parse(text: str) -> Recipe:
    """Build the recipe that ``text`` names, such as ``sync_bn`` or ``group_bn(size=4)``; ``Recipe.name`` has this form.

    Raises:
        ValueError: ``text`` does not have this form, or as ``build``.
    """
    try:
        if len(text) > LONGEST:
            raise SyntaxError
        expression = source_code.parse(text if "(" in text else f"{text}()", mode="eval")
        call = expression.body if isinstance(expression, ast.Expression) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        if any(each.arg is None for each in call.keywords):
            raise SyntaxError
        options = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"recipe {shown(text)}: need a name, or a name with options such as group_bn(size=4)."
        ) from None
    try:
        refuse_duplicates([str(each.arg) for each in call.keywords])
    except ValueError as error:
        raise ValueError(f"recipe {shown(text)}: {error}.") from None
    return build(call.func.id, **options)


def _builder(name: str) -> Callable[..., Recipe]:
    if name not in _BUILDERS:
        raise ValueError(f"unknown recipe {shown(name)}{suggest(name, _BUILDERS)}; allowed are {', '.join(_BUILDERS)}.")
    return _BUILDERS[name]
