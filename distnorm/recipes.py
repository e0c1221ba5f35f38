"""Papers and practices as points of the grid, by name, with options that a config file can carry."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

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
    refuse_twins,
    shown,
    suggest,
    written,
)

LONGEST = 1000
"""Characters that a recipe with its options may take."""


@checked
def local_bn(*, weights: Weights = "none") -> Recipe:
    """Every rank normalizes by its own batch, as nn.BatchNorm does under DistributedDataParallel.

    No collective. Running statistics are each rank's own: ``distnorm.sync_running_stats(model)`` unites them. Ioffe &
    Szegedy 2015, algorithm 1, per rank.

    Args:
        weights: "none", or "centralized" to take the mean out of every filter that feeds a norm.
    """
    return Recipe(method=BatchNorm(), policy=Local(), weights=weights)


@checked
def sync_bn(*, weights: Weights = "none", overlap: bool = False) -> Recipe:
    """Batch norm over the joined batch of all ranks, exactly.

    One collective per layer and direction, of sums and squared sums with their count: unequal and empty local batches
    are exact too. Peng et al., "MegDet", CVPR 2018; Zhang et al., "Context Encoding", CVPR 2018.

    Args:
        weights: "none", or "centralized" to take the mean out of every filter that feeds a norm.
        overlap: whether to hide backward collectives behind the weight gradients of the convolutions that follow;
            not for FSDP2 and ZeRO 3, whose weights come and go.
    """
    return Recipe(method=BatchNorm(), policy=AllReduce(), weights=weights, overlap=overlap)


@checked
def group_bn(*, size: Ranks | None = None, axis: Axis | None = None) -> Recipe:
    """Batch norm over groups of ranks: ``size`` neighbours, or all along a mesh ``axis``.

    One collective per layer and direction among fewer ranks. Running statistics are each group's own:
    ``distnorm.sync_running_stats(model)`` unites them. Ying et al., "Image Classification at Supercomputer
    Scale", 2018 (contiguous groups; their 2-D tiling is a mesh axis here).

    Args:
        size: neighbouring ranks per group; must divide the number of ranks.
        axis: ``"local"``, ``"node"``, or an axis of the mesh given to ``convert``.
    """
    if (size is None) == (axis is None):
        raise ValueError(f"group_bn takes either size or axis; given are size={size!r}, axis={axis!r}.")
    return Recipe(method=BatchNorm(), policy=AllReduce(group_size=size, axis=axis))


@checked
def hierarchical_bn(*, local: Axis = "local", node: Axis = "node") -> Recipe:
    """Batch norm over all ranks, exactly, in two hops: within each node, then between nodes.

    Two collectives per layer and direction, each among few ranks. Equal to ``sync_bn`` to rounding.

    Args:
        local: the axis of ranks that are near; ``"local"`` needs no mesh.
        node: the axis across them; ``"node"`` needs no mesh.
    """
    return Recipe(method=BatchNorm(), policy=Chain(AllReduce(axis=local), AllReduce(axis=node)))


@checked
def periodic_bn(*, every: Period = 8) -> Recipe:
    """Batch norm over all ranks in every ``every``-th step, over the local batch in between.

    In between, each rank normalizes by its own batch's statistics, forward and backward, without any collective;
    running statistics absorb the shared steps only, so they are equal on all ranks and global. A step ends with a
    backward pass that builds no graph and reaches the input of a converted layer. Our own construction.

    Args:
        every: steps from one shared step to the next; the first step is shared.
    """
    return Recipe(method=BatchNorm(), policy=Periodic(every=every))


@checked
def mabn(
    *,
    window: Window = 16,
    warmup: Steps = 100,
    clip: Clip | None = 5.0,
    loss_reduction: LossReduction = "mean",
    weights: Weights = "centralized",
) -> Recipe:
    """Moving statistics: one asynchronous collective per step for the whole model, none that a layer waits for.

    RMS over a window of steps, global but for the newest; centralized weights stand in for centring. Running
    statistics are global and equal on all ranks. Exact synchronization before. Gradient accumulation
    and float16 need ``distnorm.attach``. Yan et al., ICLR 2020 (MABN), here shared across ranks.

    Args:
        window: steps.
        warmup: the step from which windows are used, counted from 1 as in the paper's code; never before the window
            is full, which it is after as many steps as it has.
        clip: bound of the correction that follows the running statistics after 1000 steps, see ``RMS``; None for none.
        loss_reduction: whether each rank's loss is a "mean" or a "sum" over its batch.
        weights: "centralized" as published, or "none" to leave them alone.
    """
    moving = Moving(window=window, loss_reduction=loss_reduction)
    return _mabn(moving, window, warmup, clip, weights)


@checked
def hierarchical_mabn(
    *, local: Axis = "local", node: Axis = "node", window: Window = 16, warmup: Steps = 100, clip: Clip | None = 5.0
) -> Recipe:
    """``mabn`` between nodes, exact within each.

    One blocking collective per layer and direction in the node, one asynchronous collective per step between nodes.

    Args:
        local: the axis of ranks that are near; ``"local"`` needs no mesh.
        node: the axis across them; ``"node"`` needs no mesh.
        window: steps.
        warmup: the step from which windows are used, counted from 1; as in ``mabn``.
        clip: as in ``mabn``.
    """
    policy = Chain(AllReduce(axis=local), Moving(window=window, axis=node))
    return _mabn(policy, window, warmup, clip, "centralized")


@checked
def lazy_bn(*, window: Window = 8, warmup: Steps = 16, weights: Weights = "centralized") -> Recipe:
    """Batch norm with one asynchronous collective per step: other ranks by their last steps, this one as it is.

    Exact synchronization for ``warmup`` steps. Running statistics are global and equal on all ranks. Our own
    construction: docs/moving.md, which also says why weights are centralized.

    Args:
        window: steps of the other ranks, whose mean stands for them; with 1 training suffers on natural images.
        warmup: synchronous steps at the start.
        weights: "centralized", or "none" to leave them alone.
    """
    return Recipe(method=BatchNorm(), policy=Warmup(then=StaleMix(window=window), steps=warmup), weights=weights)


def _mabn(policy: Policy, window: int, warmup: int, clip: float | None, weights: Weights) -> Recipe:
    # In the paper's code iteration i, counted from 1, is windowed if i > window and i >= warmup.
    relay = Warmup(then=policy, steps=max(warmup - 1, window))
    method = RMS(clip=clip, clip_after=max(1000, warmup))
    return Recipe(method=method, policy=relay, weights=weights, momentum=0.02)


_BUILDERS: dict[str, Callable[..., Recipe]] = {
    builder.__name__: builder
    for builder in (local_bn, sync_bn, group_bn, hierarchical_bn, periodic_bn, mabn, hierarchical_mabn, lazy_bn)
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a named recipe is: its first sentence, full text, and options with their defaults."""

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
    """The recipe ``name`` with ``options``, as a config file would give them; or what ``parse`` takes, alone.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed. Options
            both in the name and apart.
    """
    if "(" in name:
        if options:
            raise ValueError(
                f"recipe {shown(name)} has options in its name, and more are given apart: {', '.join(options)}. Write "
                "all of them in one place."
            )
        return parse(name)
    builder = _builder(name)
    allowed = list(inspect.signature(builder).parameters)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"recipe {name!r} has no option {option!r}{suggest(option, allowed)}; "
                f"it takes {', '.join(allowed) if allowed else 'none'}."
            )
    recipe = builder(**options)
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return replace(recipe, name=f"{name}({given})" if given else name)


def parse(text: str) -> Recipe:
    """The recipe that ``text`` writes as a call, such as ``sync_bn`` or ``group_bn(size=4)``: a ``Recipe.name``.

    Raises:
        ValueError: not of this form, or as ``build``.
    """
    try:
        if len(text) > LONGEST:
            raise SyntaxError
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        if any(each.arg is None for each in call.keywords):
            raise SyntaxError
        options = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"recipe {shown(text)}: write a name, or a name with options such as group_bn(size=4)."
        ) from None
    try:
        refuse_twins([str(each.arg) for each in call.keywords])
    except ValueError as error:
        raise ValueError(f"recipe {shown(text)}: {error}.") from None
    return build(call.func.id, **options)


def _builder(name: str) -> Callable[..., Recipe]:
    if name not in _BUILDERS:
        raise ValueError(f"unknown recipe {shown(name)}{suggest(name, _BUILDERS)}; there are {', '.join(_BUILDERS)}.")
    return _BUILDERS[name]
