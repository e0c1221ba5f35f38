"""Select the layers of a model that are to be converted, and the class that each becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from distnorm import messages
from distnorm.layers.class_swap import underlying
from distnorm.layers.module import DistNorm
from distnorm.layers.subclasses import Target, is_batch_norm, reason_against_layer, target_of
from distnorm.recipe import Recipe

Layers = list[tuple[str, _BatchNorm]]
Targets = dict[type[nn.Module], type[DistNorm]]
"""By the class of a layer, the converted class."""
Where = Callable[[str, nn.Module], bool] | Sequence[str]

_named: WeakSet[type] = WeakSet()
"""The classes that a warning has named in this process."""


# docs/decisions.md#converting-twice
def select(
    model: nn.Module, recipe: Recipe, where: Where | None, registered: Mapping[type[_BatchNorm], type[DistNorm]]
) -> tuple[Layers, Targets]:
    """Return the layers of ``model`` to convert to ``recipe``, with their classes; warn of those that are left alone.

    A batch norm with others inside, such as one with auxiliary norms, is converted with all of them or not at all.
    ``where`` selects it by its own name.

    Raises:
        ValueError: ``where`` selects nothing; a lazy layer is not initialized; another recipe has converted a layer.
    """
    candidates = list(norms(model))
    if not candidates:
        messages.warn(f"distnorm.convert: {type(model).__name__} has no batch norm layer.")
        return [], {}
    wanted = [(name, layer) for name, layer in candidates if matches(where, name, layer)]
    if not wanted:
        raise ValueError(f"convert(where={where!r}) selects none of {[name for name, _ in candidates]}.")
    judge = _Judge(recipe, registered)
    units = [list(_batch_norms(layer, name)) for name, layer in wanted]
    reasons = [judge.reason(unit) for unit in units]
    _warn_of_left([(layer, reason) for (_, layer), reason in zip(wanted, reasons, strict=True) if reason])
    found = [each for unit, reason in zip(units, reasons, strict=True) if reason is None for each in unit]
    return [(name, layer) for name, layer in found if judge.converts(layer)], judge.targets


class _Judge:
    """Decides layer by layer, reading the code of each class once."""

    def __init__(self, recipe: Recipe, registered: Mapping[type[_BatchNorm], type[DistNorm]]) -> None:
        self._recipe, self._registered = recipe, registered
        self._by_class: dict[type[nn.Module], Target] = {}

    @property
    def targets(self) -> Targets:
        return {cls: target.cls for cls, target in self._by_class.items() if target.cls is not None}

    def reason(self, unit: Layers) -> str | None:
        """Return why a norm, with those inside of it, is left alone; None if it is not."""
        for name, layer in unit:
            if isinstance(layer, LazyModuleMixin):
                raise ValueError(
                    f"{name}: {type(layer).__name__} is not initialized. Run one forward pass, then convert the model."
                )
            if isinstance(layer, DistNorm) and layer.recipe != self._recipe:
                raise ValueError(f"{name}: already converted to {layer.recipe}. Call distnorm.revert(model) first.")
        return next((reason for _, layer in unit if (reason := self._reason_against(layer))), None)

    def _reason_against(self, layer: _BatchNorm) -> str | None:
        cls = layer._site.original if isinstance(layer, DistNorm) else underlying(layer)
        if cls not in self._by_class:
            self._by_class[cls] = target_of(cls, self._registered)
        if isinstance(layer, DistNorm):
            return None
        return self._by_class[cls].reason or reason_against_layer(layer)

    # docs/decisions.md#norms-inside-layers-join-the-model
    def converts(self, layer: _BatchNorm) -> bool:
        """Return whether ``layer`` is not converted, or by a constructor in ``distnorm.nn`` and not bound yet."""
        if not isinstance(layer, DistNorm):
            return True
        conversion = layer._site.conversion
        return conversion.is_provisional and conversion.binding is None


def _warn_of_left(left: list[tuple[_BatchNorm, str]]) -> None:
    """Warn, once per job, of the classes of layers that are left alone, with the reasons."""
    counts = Counter(underlying(layer) for layer, _ in left)
    reasons = {underlying(layer): reason for layer, reason in left}
    if _named.issuperset(reasons):
        return
    _named.update(reasons)
    listed = [f"{counts[cls]} {cls.__module__}.{cls.__qualname__} ({reason})" for cls, reason in reasons.items()]
    messages.warn(
        f"distnorm.convert did not convert unknown subclasses of batch norm: {'; '.join(listed)}. To convert them, let "
        "their forward go through super().forward(...), or call distnorm.register_converter(their class, a DistNorm "
        "subclass)."
    )


def norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield names and batch norms of ``model``, without those that are inside of another one."""
    inside: set[int] = set()
    for name, layer in _batch_norms(model, ""):
        if id(layer) not in inside:
            yield name, layer
        inside.update(map(id, layer.modules()))


def _batch_norms(model: nn.Module, prefix: str) -> Iterator[tuple[str, _BatchNorm]]:
    for name, layer in model.named_modules(prefix=prefix):
        if is_batch_norm(layer):
            yield name or type(layer).__name__, cast(_BatchNorm, layer)


def matches(where: Where | None, name: str, layer: nn.Module) -> bool:
    """Return whether ``where`` selects the layer; None selects every one."""
    if where is None:
        return True
    if callable(where):
        return where(name, layer)
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(name, pattern) for pattern in patterns)
