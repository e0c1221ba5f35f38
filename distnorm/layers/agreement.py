"""Check that the ranks of a conversion agree before they share: on model, recipe, groups and the ranks these join."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import chain, zip_longest
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.layout import layout_of
from distnorm.layers.running_statistics import buffers_of
from distnorm.policies import Reducer
from distnorm.policies.routes import Routes, joined
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup, Topology, check_group, choice, mpi
from distnorm.transport.rendezvous import all_gather_text, connected, group_timeout
from distnorm.transport.topology import node_id
from distnorm.types import Layout, Transport


# docs/decisions.md#which-ranks-a-conversion-concerns
def narrower(process_group: dist.ProcessGroup | LostGroup | None, owner: str) -> dist.ProcessGroup | None:
    """Return the ``process_group`` of a layer, or None if it holds all ranks of the job.

    Raises:
        ValueError: this rank is not in the group, or pickling has lost it; the message begins with ``owner``.
    """
    check_group(process_group, owner)
    if isinstance(process_group, LostGroup):
        raise ValueError(
            f"{owner}: {process_group.what} cannot be pickled, so this copy of the layer has none. Set the layer's "
            "process_group to a group of this process, or to None for all ranks."
        )
    if process_group is None or len(dist.get_process_group_ranks(process_group)) == dist.get_world_size():
        return None
    return process_group


def ranks_of(groups: Iterable[dist.ProcessGroup | LostGroup]) -> list[tuple[int, ...]]:
    """Return the global ranks of each of ``groups``.

    Raises:
        RuntimeError: a group could not be copied from another process.
    """
    found = []
    for group in groups:
        if isinstance(group, LostGroup):
            raise group.refuse()
        found.append(tuple(dist.get_process_group_ranks(group)))
    return found


def ranks_within(groups: list[tuple[int, ...]], timeout: timedelta) -> tuple[int, ...]:
    """Return all ranks that ``groups`` connect. Collective over these, unless all groups are the same."""
    return groups[0] if len(set(groups)) == 1 else connected(groups, timeout)


class Agreement(NamedTuple):
    """The ranks that agreed, their reducer, and whether their running statistics are always equal (``agrees``)."""

    topology: Topology
    reducer: Reducer
    agrees: bool
    resumed: tuple[int | None, ...]
    """By rank, the step of the state that it resumes; None if it has no state."""


def bind_policy(
    world: dist.ProcessGroup | None,
    ranks: tuple[int, ...],
    recipe: Recipe,
    layers: Sequence[tuple[str, _BatchNorm]],
    mesh: DeviceMesh | None,
    transport: Transport,
    resumed: int | None,
) -> Agreement:
    """Bind the recipe's policy to ``ranks``. Collective over these, through the job's store, if there is a job.

    ``resumed``: the step of the state that this rank resumes, if any.

    Raises:
        RuntimeError: ranks converted differently, do not answer, pass groups that do not match, or are not an MPI job.
        ValueError: the policy does not fit the ranks, or continues a warm-up that shared among other ranks.
    """
    layout = layout_of(layers, recipe.method)
    if world is None:
        topology = Topology(ranks)
        return Agreement(topology, recipe.policy.bind(topology, layout), agrees=True, resumed=(resumed,))
    timeout = group_timeout(world)
    topology, steps = _agree(world, ranks, recipe, layers, layout, mesh, transport, resumed, timeout)
    reducer = recipe.policy.bind(topology, layout)
    return Agreement(topology, reducer, _running_statistics_agree(ranks, recipe, reducer, timeout), steps)


_models = 0
"""The number of the last model that was bound in this process; all of its ranks use the same number."""


def _agree(
    world: dist.ProcessGroup,
    ranks: tuple[int, ...],
    recipe: Recipe,
    layers: Sequence[tuple[str, _BatchNorm]],
    layout: Layout,
    mesh: DeviceMesh | None,
    transport: Transport,
    resumed: int | None,
    timeout: timedelta,
) -> tuple[Topology, tuple[int | None, ...]]:
    """Compare what ``ranks`` converted, and return their topology and the steps of the states that they resume."""
    place = mpi.place(layout.device) if transport == "mpi" else None
    groups = ranks_of(recipe.policy.facts.groups)
    global _models
    lines = _fingerprint(recipe, transport, layers)
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    mine = {
        **{"node": node_id(), "converted": digest, "device": layout.device.type, "mpi": place, "model": _models + 1},
        **{"groups": [None if group == ranks else group for group in groups], "resumed": resumed},
    }
    answers = [json.loads(text) for text in all_gather_text(ranks, json.dumps(mine), timeout)]
    _compare_all({rank: other["converted"] for rank, other in zip(ranks, answers, strict=True)}, lines, timeout)
    named = {rank: other["groups"] for rank, other in zip(ranks, answers, strict=True)}
    _compare_groups({rank: [list(ranks) if one is None else one for one in each] for rank, each in named.items()})
    nodes = tuple(other["node"] for other in answers)
    places = mpi.check_places(ranks, [other["mpi"] for other in answers]) if transport == "mpi" else None
    devices = [other["device"] for other in answers]
    choice.check(transport, ranks, devices, world)
    on_cpu = all(device in ("cpu", "meta") for device in devices)
    _models = max(other["model"] for other in answers)
    topology = Topology(
        ranks, mesh=mesh, nodes=nodes, timeout=timeout, mpi=places, on_cpu=on_cpu, transport=transport, model=_models
    )
    return topology, tuple(other["resumed"] for other in answers)


def _fingerprint(recipe: Recipe, transport: Transport, layers: Sequence[tuple[str, _BatchNorm]]) -> list[str]:
    """Return lines that are equal on ranks that converted alike. The ranks of explicit groups may differ.

    They contain all that must be equal later: what is shared, and which running statistics rank 0 broadcasts.
    """
    text = repr(recipe)
    for ranks in ranks_of(recipe.policy.facts.groups):
        text = text.replace(f"process_group={list(ranks)}", "process_group=given")
    lines = [text, f"transport={transport!r}"]
    for name, layer in layers:
        lines.append(
            f"{name}: {layer.num_features} features, eps={layer.eps}, momentum={layer.momentum}, {_tracked(layer)}"
        )
    return lines


def _tracked(layer: _BatchNorm) -> str:
    buffers = [(name, getattr(layer, name)) for name in buffers_of(layer)]
    found = [f"{name} {each.dtype} on {each.device.type}" for name, each in buffers if each is not None]
    return ", ".join(found).replace("torch.", "") or "no running statistics"


def _compare_all(digests: dict[int, str], lines: list[str], timeout: timedelta) -> None:
    """Raise unless ``lines`` are the same on all ranks. The lines are exchanged only if their digests differ.

    Raises:
        RuntimeError: on all ranks, with the first difference.
    """
    if len(set(digests.values())) == 1:
        return
    firsts = {digest: rank for rank, digest in reversed(digests.items())}
    mine = lines if dist.get_rank() in firsts.values() else None
    ranks = tuple(digests)
    told = dict(zip(ranks, map(json.loads, all_gather_text(ranks, json.dumps(mine), timeout)), strict=True))
    for rank in sorted(firsts.values(), key=ranks.index):
        _compare(ranks[0], told[ranks[0]], rank, told[rank])


def _compare(first: int, expected: list[str], rank: int, given: list[str]) -> None:
    for line, other in zip_longest(expected, given, fillvalue="nothing"):
        if line != other:
            raise RuntimeError(
                f"distnorm: rank {rank} converted another model or recipe than rank {first}. Rank {first} has "
                f"[{line}] where rank {rank} has [{other}]. Build and convert the model in the same way on every rank "
                "that shares statistics, or bind each set of ranks with distnorm.attach(model, process_group=...)."
            )


def _compare_groups(groups: dict[int, list[list[int]]]) -> None:
    """Raise unless all ranks of each group were given the same group."""
    for rank, mine in groups.items():
        for at, ranks in enumerate(mine):
            for peer in ranks:
                if peer in groups and groups[peer][at] != ranks:
                    raise RuntimeError(
                        f"distnorm: rank {rank} shares statistics in a process group of ranks {ranks}, but rank {peer} "
                        f"was given one of ranks {groups[peer][at]}. Pass the same group on all of its ranks."
                    )


def _running_statistics_agree(ranks: tuple[int, ...], recipe: Recipe, reducer: Reducer, timeout: timedelta) -> bool:
    """Return whether the same sums update the running statistics of all ranks. Raises on all ranks or on none."""
    own = [reducer.facts.global_routes, *chain.from_iterable(reducer.facts.handovers)]
    texts = all_gather_text(ranks, json.dumps([_written(each, ranks) for each in own]), timeout)
    by_rank = [[_read(each, ranks) for each in json.loads(text)] for text in texts]
    global_routes, *handovers = (_joined(ranks, [each[at] for each in by_rank]) for at in range(len(own)))
    for first, then in zip(handovers[::2], handovers[1::2], strict=True):
        _check_handover(recipe, first, then)
    return global_routes is not None and all(map(_all_equal, global_routes))


Joined = dict[int, Counter[int]]


def _joined(ranks: tuple[int, ...], routes: list[Routes]) -> list[Joined] | None:
    """Return the ranks that each route joins; None if the routes of any rank are unknown."""
    by_route = zip(*(each for each in routes if each is not None), strict=True)
    return None if None in routes else [joined(dict(zip(ranks, each, strict=True))) for each in by_route]


def _all_equal(joined: Joined) -> bool:
    distinct = list({id(sums): sums for sums in joined.values()}.values())  # comparing P counters takes P^2
    return all(sums == distinct[0] for sums in distinct)


# docs/decisions.md#a-warm-up-among-other-ranks-is-refused
def _check_handover(recipe: Recipe, first: list[Joined] | None, then: list[Joined] | None) -> None:
    if first is None or then is None:
        raise ValueError(
            f"{recipe}: a custom policy in a warm-up must name the ranks that it joins. Define its reducer's routes()."
        )
    for given in (*first, *then):
        distinct = {(id(sums), id(first[0][rank])): rank for rank, sums in reversed(given.items())}
        for rank in sorted(distinct.values()):
            if given[rank] != first[0][rank]:
                expected, found = (sorted(each.elements()) for each in (first[0][rank], given[rank]))
                raise ValueError(
                    f"{recipe}: moving statistics continue those of the warm-up, but rank {rank} shares with ranks "
                    f"{expected} in one step and with {found} in another. Let both policies share among the same ranks."
                )


def _written(routes: Routes, ranks: tuple[int, ...]) -> list[list[tuple[int, ...] | None]] | None:
    """Return ``routes`` for JSON, with None for a group of all ``ranks``."""
    return None if routes is None else [[None if hop == ranks else hop for hop in route] for route in routes]


def _read(routes: list[list[list[int] | None]] | None, ranks: tuple[int, ...]) -> Routes:
    if routes is None:
        return None
    return [tuple(ranks if hop is None else tuple(hop) for hop in route) for route in routes]
