"""Converted classes for subclasses of batch norm, made when the first such layer is converted.

``class Scaled(nn.BatchNorm2d)`` becomes ``DistScaled(Scaled, DistBatchNorm2d)``: ``super().forward(x)`` in ``Scaled``
then finds the converted layer, and all that ``Scaled`` adds stays its own. A class of ``known_norms.py``, whose forward
replaces torch's, becomes ``DistOther(ItsBase, Other)``, where the base comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.class_swap import note_contents, swap
from distnorm.layers.known_norms import known
from distnorm.layers.module import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d, DistNorm, DistSyncBatchNorm
from distnorm.layers.super_calls import reason_against
from distnorm.layers.tracing import ADDS


class DerivedSyncBatchNorm(DistSyncBatchNorm, nn.SyncBatchNorm):  # type: ignore[override]  # read-only
    """The base for subclasses of SyncBatchNorm, which must find it before torch's. DDP refuses it on the CPU."""


_BASES: dict[type[nn.Module], type[DistNorm]] = {
    nn.BatchNorm1d: DistBatchNorm1d,
    nn.BatchNorm2d: DistBatchNorm2d,
    nn.BatchNorm3d: DistBatchNorm3d,
    nn.SyncBatchNorm: DerivedSyncBatchNorm,
    _BatchNorm: DistNorm,
}
"""What to put behind a subclass of one of torch's classes."""
_TORCH_FORWARDS = {cls: cls.forward for cls in _BASES}
_PROTOCOL = ("forward", "_apply", "_load_from_state_dict", "_save_to_state_dict", "__getstate__", "__setstate__")
"""Methods of DistNorm that it relies on; a subclass that has its own must call these too."""


_ORIGIN = "_origin"


class Made(nn.Module):
    """Marks classes that are made here. It is their first base."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep an ``__init_subclass__`` of the author's class, such as a registry, from seeing classes made here."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the author's class: classes made here cannot be found by name, so ``_remade`` makes them again."""
        reduced, cls = super().__reduce_ex__(protocol), type(self)
        if isinstance(reduced, str) or _ORIGIN not in vars(cls):
            return reduced
        make, args, *rest = reduced
        source, base = vars(cls)[_ORIGIN]
        make, *args = (source if each is cls else each for each in (make, *args))
        return _remade, (source, base, make, *args), *rest

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which reads no ``super()``."""
        assert isinstance(self, DistNorm)
        raise RuntimeError(
            f"{self._site.name}: torch.jit.script cannot compile a converted {self._site.original.__name__}. Script a "
            "reverted copy, which evaluates alike: distnorm.revert(copy.deepcopy(model))."
        )


class Target(NamedTuple):
    """What a class is converted to, or why it is left alone."""

    cls: type[DistNorm] | None
    reason: str = ""


# docs/decisions.md#subclasses-convert-by-their-code
def target_of(cls: type[nn.Module], registered: Mapping[type[_BatchNorm], type[DistNorm]]) -> Target:
    """Return the converted class for layers of the class ``cls``; ``registered`` classes come first."""
    base = _base_of(cls)
    found = known(base)
    if base in _BASES and base.forward is not _TORCH_FORWARDS[base]:
        return Target(None, f"{base.__name__}.forward has been replaced")
    if cls in registered:
        return Target(registered[cls])  # type: ignore[index]
    if found is not None and found.base is None:
        return Target(None, found.left)
    for name in _PROTOCOL:
        reason = reason_against(cls, base, name)
        if reason is not None:
            return Target(None, reason)
    own = {name for each in cls.__mro__[: cls.__mro__.index(base)] for name in vars(each)}
    if taken := _NAMES & own:
        return Target(None, _shares(taken))
    try:
        return Target(made_class(cls, base))
    except TypeError as error:  # its bases have no common order, or their metaclasses conflict
        return Target(None, str(error))


def reason_against_layer(layer: nn.Module) -> str | None:
    """Return why ``layer`` cannot get its converted class, whatever that is; None if it can."""
    if "forward" in vars(layer):
        return "its forward has been replaced on the object"
    taken = _NAMES & {*vars(layer), *layer._modules, *layer._parameters, *layer._buffers}
    return _shares(taken) if taken else None


def _shares(names: set[str]) -> str:
    return f"it has {', '.join(sorted(names))}, as converted layers have for themselves"


def made_class(source: type[nn.Module], base: type[nn.Module]) -> type[DistNorm]:
    """Return the converted class for ``source``, whose normalization is that of ``base``; equal calls share one class.

    ``base`` is ``source`` itself or among its bases: a class of torch, or one of ``known_norms.py``.
    """
    found = known(base)
    target = _BASES[base] if found is None else found.base
    assert target is not None
    if source is base and found is not None:
        bases: tuple[type, ...] = (Made, target, source) if found.derives else (Made, target)
    elif found is not None:
        target = made_class(base, base)
        bases = (source, target)
    else:
        bases = (Made, source, target)
    for cls in target.__subclasses__():
        if vars(cls).get(_ORIGIN) == (source, base):
            return cls
    name = f"Dist{source.__name__}"
    names: dict[str, object] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": source.__doc__,
        _ORIGIN: (source, base),
    }
    names[ADDS] = any("forward" in vars(each) for each in source.__mro__[: source.__mro__.index(base)])
    if found is not None and source is base and found.derives:
        names |= {"_theirs": source, "_as_known": source.forward}
    made: type[DistNorm] = type(name, bases, names)
    note_contents(made)
    return made


def _remade(source: type[nn.Module], base: type[nn.Module], make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Rebuild a pickled layer. Pickles hold the name of this function, so it must not change."""
    module = make(*args)
    swap(module, made_class(source, base))
    return module


def is_batch_norm(layer: nn.Module) -> bool:
    """Return whether ``layer`` derives from torch's batch norm or from one that is known by name."""
    return isinstance(layer, _BatchNorm) or any(known(each) is not None for each in type(layer).__mro__)


def group_attribute(cls: type[nn.Module]) -> str | None:
    """Return the name of the attribute for the process group of layers of the class ``cls``; None if it has none."""
    base = _base_of(cls)
    found = known(base)
    if found is not None:
        return found.group
    return "process_group" if issubclass(base, nn.SyncBatchNorm) else None


def _base_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the first of ``cls`` and its bases whose normalization is known."""

    def is_known(each: type[nn.Module]) -> bool:
        found = known(each)
        return each in _BASES or (found is not None and (found.derives or each is cls))

    return next(filter(is_known, cls.__mro__))


_NAMES = {
    name
    for cls in DistSyncBatchNorm.__mro__
    if issubclass(cls, DistNorm)
    for name in vars(cls)
    if not name.startswith("__") and name not in {*dir(nn.SyncBatchNorm), "process_group"}
}
"""The names that converted layers have and torch's have not."""
