"""Convert the batch norm layers of a model to a recipe, and revert them.

``convert`` never communicates, so it can run before process groups exist and before ``.to(device)``. It swaps the class
of each layer in place, so an optimizer that was built before keeps its parameters.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TypeVar, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import recipes
from distnorm.fusion import epilogue
from distnorm.layers import agreement, ddp, feeders, initial, overlap, reverting, weights
from distnorm.layers.class_swap import hand_down, swap, underlying
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import (
    DistBatchNorm1d,
    DistBatchNorm2d,
    DistBatchNorm3d,
    DistNorm,
    DistSyncBatchNorm,
)
from distnorm.layers.site import Site
from distnorm.layers.subclasses import Made, group_attribute
from distnorm.methods import ChannelAffine
from distnorm.recipe import Recipe
from distnorm.selection import Layers, Targets, Where, select
from distnorm.transport.choice import chosen
from distnorm.transport.mpi import load_mpi
from distnorm.transport.topology import mesh_ranks
from distnorm.types import Transport
from distnorm.validation import check, hints_of, refuse_unknown_variables, shown

ModelT = TypeVar("ModelT", bound=nn.Module)
_GROUP = "process_group"

# Exact types only: subclasses get a class of their own, distnorm/layers/subclasses.py.
_targets: dict[type[_BatchNorm], type[DistNorm]] = {
    nn.BatchNorm1d: DistBatchNorm1d,
    nn.BatchNorm2d: DistBatchNorm2d,
    nn.BatchNorm3d: DistBatchNorm3d,
    nn.SyncBatchNorm: DistSyncBatchNorm,
}


def register_converter(source: type[_BatchNorm], target: type[DistNorm]) -> None:
    """Let ``convert`` swap layers of exactly the class ``source`` to the class ``target``.

    This is for subclasses of batch norm that do more than normalize, such as one with a fused activation. ``target``
    derives from one of the DistNorm classes and does the rest in its ``forward``. The layer's ``__dict__`` is kept.

    Raises:
        TypeError: ``source`` is not a subclass of torch's batch norm, or ``target`` not one of DistNorm.
    """
    if not (isinstance(source, type) and issubclass(source, _BatchNorm)):
        raise TypeError(f"register_converter(source={source!r}): need a subclass of torch's batch norm.")
    if not (isinstance(target, type) and issubclass(target, DistNorm)):
        raise TypeError(
            f"register_converter(target={target!r}): need a subclass of distnorm.DistNorm, such as "
            "distnorm.DistBatchNorm2d."
        )
    _targets[source] = target


def convert(
    model: ModelT,
    recipe: Recipe | str,
    *,
    where: Where | None = None,
    mesh: DeviceMesh | None = None,
    transport: Transport | None = None,
    fuse: bool = False,
    **options: object,
) -> ModelT:
    """Convert the model's batch norm layers to ``recipe``, in place, and return the model.

    Converts layers of type BatchNorm1d/2d/3d and SyncBatchNorm, those of ``register_converter``, subclasses whose
    ``forward`` goes through ``super().forward(...)``, and others that docs/subclasses.md lists. Parameters,
    buffers, hooks, names and the keys of the state_dict do not change; ``weights="normalized"`` adds a parameter
    ``gain`` to layers before norms, so convert before you create the optimizer or wrap the model. Layers that the same
    recipe has converted before are skipped, except norms inside layers of ``distnorm.nn`` that are not bound yet: they
    join, with the name that they have in ``model``. If a SyncBatchNorm has a ``process_group``, its layer shares among
    those ranks only, with any recipe. Issues no collective: ranks first communicate at the first training forward
    pass, or in ``attach``.

    Args:
        model: any module. It may be a batch norm itself, or be wrapped in DistributedDataParallel already.
        recipe: a ``Recipe``, or the name of one (``distnorm.recipes.available()``), with its ``options``.
        where: which layers: a function of name and layer, or glob patterns of names such as ``["backbone.*"]``.
        mesh: the data-parallel device mesh, whose axes a recipe can name. Statistics are shared inside it only. Slice
            a mesh that has other axes too: ``mesh["dp"]``.
        transport: what sends statistics. ``"torch"``: process groups of the job's backend, and on the CPU shared memory
            and sockets where they are available, since they are faster than gloo. ``"gloo"``: only gloo. ``"shm"`` or
            ``"sockets"``: only shared memory or only sockets, with gloo for long vectors. ``"mpi"``: mpi4py, for
            layers on the CPU in a job that mpirun started. None: the value of ``DISTNORM_TRANSPORT``, by default
            ``"torch"``.
        fuse: whether a norm also computes its epilogue: the addition, activation or both that follow it in the model's
            code. This needs fewer passes over memory, for equal values and gradients. ``print(model)`` shows the
            epilogue of each layer.
        options: options of a named recipe, such as ``size=4``.

    Raises:
        ImportError: ``transport="mpi"`` without mpi4py.
        ValueError: an unknown recipe, option, transport or value; an uninitialized lazy layer; a layer that another
            recipe has converted, or whose process group has other ranks than the mesh or recipe; ``where`` selects
            no layer; ``weights="normalized"`` for a model that is wrapped or sharded already; an unknown environment
            variable ``DISTNORM_*``. The model is unchanged.

    Warns:
        UserWarning: on the first rank, once per job, naming the classes of batch norms that were not converted, with
            the reason; or if the model has no batch norm, or nothing to ``fuse``.
    """
    refuse_unknown_variables(os.environ)
    wanted = _recipe(recipe, options)
    check("convert", hints_of(convert), {"transport": transport, "fuse": fuse})
    transport = chosen(transport)
    if transport == "mpi":
        load_mpi("transport='mpi'")
    layers, targets = select(model, wanted, where, _targets)
    for name, layer in layers:
        initial.measured(name, layer, wanted.method)  # before anything changes
    feeders.check(model, [layer for _, layer in layers], wanted)
    parts = _by_group(layers, wanted, mesh, transport)
    for _, layer in layers:
        if isinstance(layer, DistNorm):
            undo(layer)
    apply_to(model, parts, targets)
    if fuse and layers and not epilogue.fuse(model):
        warnings.warn(
            f"distnorm.convert(fuse=True) fused nothing: in {type(model).__name__}, no readable code passes the output "
            "of a converted norm to an activation or an addition only.",
            stacklevel=2,
        )
    return model


def apply_to(model: nn.Module, parts: Mapping[Conversion, Layers], targets: Targets) -> None:
    """Swap the classes of layers of ``model`` to their ``targets``. All conversions have the same recipe."""
    for conversion, layers in parts.items():
        for index, (name, layer) in enumerate(layers):
            _replace(layer, targets[underlying(layer)], conversion, index, name)
        if conversion.recipe.weights != "none":
            feeders.reweight(model, [layer for _, layer in layers], conversion)
    every = [layer for layers in parts.values() for _, layer in layers]
    if any(conversion.recipe.overlap for conversion in parts):
        overlap.pair(model, every)


def _replace(layer: _BatchNorm, target: type[DistNorm], conversion: Conversion, index: int, name: str) -> None:
    original = cast(type[_BatchNorm], underlying(layer))
    measured = initial.measured(name, layer, conversion.recipe.method)
    site = Site(conversion, index, name, original, layer.momentum, _group_of(layer), measured)
    if issubclass(target, DistSyncBatchNorm):  # its property process_group reads the conversion
        layer.__dict__.pop(group_attribute(original) or _GROUP, None)
    swap(layer, target)
    if conversion.recipe.momentum is not None:
        layer.momentum = conversion.recipe.momentum
    layer.__dict__["_site"] = site
    conversion.add(index, name, layer)
    if measured is not None:
        initial.register(layer, measured)


def revert(model: ModelT) -> ModelT:
    """Restore the original class of every converted layer, in place, and return the model.

    Evaluation output does not change. Computed weights (``Recipe.weights``) are written into
    the parameters. Layers whose evaluation is
    affine per channel become their original class; those of other methods become a module of torch that computes the
    same. Issues no collective.

    Raises:
        RuntimeError: a layer's method computes what no module of torch does, or a weight cannot be written, as
            ``distnorm.layers.weights.bake``. The model is unchanged.
    """
    for layer in _converted(model):
        reverting.check(layer)
    weights.bake(model)
    for layer in _converted(model):
        layer.apply_in_flight()
    outcomes = [(layer, reverting.outcome(layer)) for layer in _converted(model)]
    undo(model)
    return reverting.finish(model, outcomes)


def as_stock(model: nn.Module) -> None:
    """Revert, in place, the layers of ``model`` whose evaluation is affine per channel; leave the others."""
    for layer in _converted(model):
        layer.apply_in_flight()
        found = reverting.outcome(layer)
        if not isinstance(found, nn.Module) and (found is not None or isinstance(layer.recipe.method, ChannelAffine)):
            _unswap(layer)
            reverting.finish(model, [(layer, found)])


def _converted(model: nn.Module) -> list[DistNorm]:
    return [layer for layer in model.modules() if isinstance(layer, DistNorm)]


def undo(model: ModelT) -> ModelT:
    """Revert without writing computed weights: for a conversion that was never used."""
    feeders.release(model)
    overlap.release(model)
    epilogue.release(model)
    layers = _converted(model)
    ddp.relist(model, layers)
    for layer in layers:
        _unswap(layer)
    return model


def _unswap(layer: DistNorm) -> None:
    layer.forget_scripting()
    initial.remove(layer, layer._site)
    site = layer.__dict__.pop("_site")
    mine = underlying(layer)
    swap(layer, site.original)
    if issubclass(mine, Made):
        hand_down(mine, site.original)
    given = site.conversion.recipe.momentum
    if given is not None and layer.momentum == given:  # nobody has set another one since
        layer.momentum = site.momentum
    # Stock layers need buffers of their parameters' dtype. Computed weights (parametrizations) are not parameters.
    dtype = next((parameter.dtype for parameter in layer.parameters()), None)
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        if buffer is not None and dtype is not None:
            setattr(layer, name, buffer.to(dtype))
    group = group_attribute(site.original)
    if group is not None:
        layer.__dict__.setdefault(group, site.process_group)


def _group_of(layer: nn.Module) -> dist.ProcessGroup | None:
    group: dist.ProcessGroup | None = layer.__dict__.get(group_attribute(underlying(layer)) or _GROUP)
    return group


def _by_group(
    layers: Layers, recipe: Recipe, mesh: DeviceMesh | None, transport: Transport
) -> dict[Conversion, Layers]:
    """Return one conversion for the layers without a process group, and one for the layers of each group."""
    conversions: dict[tuple[int, ...] | None, Conversion] = {}
    found: dict[Conversion, Layers] = {}
    for name, layer in layers:
        group = agreement.narrower(_group_of(layer), f"{name}: {type(layer).__name__}")
        ranks = None if group is None else tuple(dist.get_process_group_ranks(group))
        if ranks is not None:
            _check_ranks(name, ranks, recipe, mesh)
        if ranks not in conversions:
            conversions[ranks] = Conversion(recipe, mesh, transport, group)
        found.setdefault(conversions[ranks], []).append((name, layer))
    return found


def _check_ranks(name: str, ranks: tuple[int, ...], recipe: Recipe, mesh: DeviceMesh | None) -> None:
    named = [(f"the recipe {recipe}", each) for each in agreement.ranks_of(recipe.policy.facts.groups)]
    if mesh is not None:
        named.append((f"the mesh {mesh}", mesh_ranks(mesh, mesh.mesh_dim_names or ())))
    for what, given in named:
        if set(given) != set(ranks):
            raise ValueError(
                f"{name}: the layer's process_group has ranks {list(ranks)}, but {what} has ranks {list(given)}. "
                "Use the same ranks in both, or set the layer's process_group to None before you convert."
            )


def _recipe(recipe: Recipe | str, options: dict[str, object]) -> Recipe:
    if isinstance(recipe, str):
        return recipes.build(recipe, **options)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"convert(recipe={shown(recipe)}): need a Recipe or the name of one.")
    if options:
        raise ValueError(
            f"convert: options {sorted(options)} are allowed with the name of a recipe only; set them in the Recipe."
        )
    return recipe
