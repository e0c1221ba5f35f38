"""Papers and practices as points of the grid, by name, with options that a config file can carry."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from distnorm.grid import Recipe
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce, Chain, Local, Periodic


def local_bn() -> Recipe:
    """Every rank normalizes by its own batch, as nn.BatchNorm does under DistributedDataParallel.

    No collective. Running statistics are each rank's own: ``distnorm.sync_running_stats(model)`` unites them. Ioffe &
    Szegedy 2015, algorithm 1, per rank.
    """
    return Recipe(method=BatchNorm(), policy=Local())


def sync_bn() -> Recipe:
    """Batch norm over the joined batch of all ranks, exactly.

    One collective per layer and direction, of sums and squared sums with their count: unequal and empty local batches
    are exact too. Peng et al., "MegDet", CVPR 2018, section 3.3; Zhang et al., "Context Encoding", CVPR 2018.
    """
    return Recipe(method=BatchNorm(), policy=AllReduce())


def group_bn(*, size: int | None = None, axis: str | None = None) -> Recipe:
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


def hierarchical_bn(*, local: str = "local", node: str = "node") -> Recipe:
    """Batch norm over all ranks, exactly, in two hops: within each node, then between nodes.

    Two collectives per layer and direction, each among few ranks. Equal to ``sync_bn`` to rounding.

    Args:
        local: the axis of ranks that are near; ``"local"`` needs no mesh.
        node: the axis across them; ``"node"`` needs no mesh.
    """
    if local is None or node is None:
        raise ValueError(f"hierarchical_bn takes the names of two axes; given are local={local!r}, node={node!r}.")
    return Recipe(method=BatchNorm(), policy=Chain(AllReduce(axis=local), AllReduce(axis=node)))


def periodic_bn(*, every: int = 8) -> Recipe:
    """Batch norm over all ranks in every ``every``-th step, over the local batch in between.

    In between, each rank normalizes by its own batch's statistics, forward and backward, without any collective;
    running statistics absorb the shared steps only, so they are equal on all ranks and global. A step ends with a
    backward pass that builds no graph and reaches the input of a converted layer. Our own construction.

    Args:
        every: steps from one shared step to the next; the first step is shared.
    """
    return Recipe(method=BatchNorm(), policy=Periodic(every=every))


_BUILDERS: dict[str, Callable[..., Recipe]] = {
    builder.__name__: builder for builder in (local_bn, sync_bn, group_bn, hierarchical_bn, periodic_bn)
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
    options = {each.name: f"{each.annotation} = {each.default!r}" for each in parameters}
    return Description(name=name, summary=text.partition("\n")[0], text=text, options=options)


def available() -> list[Description]:
    """Describe every named recipe."""
    return [describe(name) for name in _BUILDERS]


def build(name: str, **options: object) -> Recipe:
    """The recipe ``name`` with ``options``, as a config file would give them.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed.
    """
    builder = _builder(name)
    allowed = list(inspect.signature(builder).parameters)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"recipe {name!r} has no option {option!r}{_suggest(option, allowed)}; "
                f"it takes {', '.join(allowed) if allowed else 'none'}."
            )
    recipe = builder(**options)
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return replace(recipe, name=f"{name}({given})" if given else name)


def _builder(name: str) -> Callable[..., Recipe]:
    if name not in _BUILDERS:
        raise ValueError(f"unknown recipe {name!r}{_suggest(name, _BUILDERS)}; there are {', '.join(_BUILDERS)}.")
    return _BUILDERS[name]


def _suggest(given: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
