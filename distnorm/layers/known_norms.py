"""Batch norms of other packages that replace torch's code, known by their qualified names.

Their packages are not imported. ``docs/subclasses.md`` has the table of what happens to each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm.layers.activations import activation_of, is_identity
from distnorm.layers.module import DistBatchNorm2d, DistNorm, DistSyncBatchNorm
from distnorm.layers.tracing import is_traced, leaf
from distnorm.types import Activation


class Replacing(DistNorm):
    """A layer whose forward stands for that of another package's class, unless somebody has replaced that."""

    _theirs: ClassVar[type[nn.Module] | None] = None
    """The class of the other package, if this one derives from it."""
    _as_known: ClassVar[Callable[..., Tensor] | None] = None
    """Its forward when this class was made."""

    def _stand_in(self, input: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        """Call ``_replace``, or the forward that was put on the other class since; under torch.fx make one node."""
        if is_traced(input):
            node: Tensor = leaf(self, input, rest)
            return node
        if self._is_patched():
            assert self._theirs is not None
            return self._theirs.forward(self, input, *rest)  # type: ignore[no-any-return]
        return self._replace(input, *rest, **options)

    def _is_patched(self) -> bool:
        return self._theirs is not None and self._theirs.forward is not type(self)._as_known

    def _replace(self, input: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        """Compute what the forward of the other class does. Each subclass defines it."""
        raise NotImplementedError


class Activated(Replacing):
    """timm's: a norm, then its ``drop``, then its ``act``."""

    def forward(self, input: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """Return ``act(drop(norm(input, **options)))``."""
        if not isinstance(self, Replacing):  # reverted, and called by what has wrapped the forward before
            return type(self).forward(self, input, **options)
        return self._stand_in(input, **options)

    def _replace(self, input: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        fuses = self.epilogue and not options and self.training and not torch.compiler.is_compiling()
        activation = self.own_activation() if fuses else None
        if activation is not None:
            return super().forward(input, activation=activation.name, parameter=activation.parameter)
        y = super().forward(input, **options)
        # Not in every release, nor in every layer that was made from another one.
        drop, act = getattr(self, "drop", None), getattr(self, "act", None)
        y = y if drop is None else drop(y)
        return y if act is None else act(y)

    def own_activation(self) -> Activation | None:
        """Return the activation that follows at once, if the norm can compute it."""
        return activation_of(getattr(self, "act", None)) if self._is_idle("drop") else None

    def only_normalizes(self) -> bool:
        """Return whether nothing follows the norm."""
        return self._is_idle("drop") and self._is_idle("act") and not self._is_patched()

    def _is_idle(self, name: str) -> bool:
        child = getattr(self, name, None)
        return child is None or is_identity(child)


class NamedActivation(Replacing):
    """inplace_abn's ABN: a norm, then the activation that ``activation`` names."""

    activation: str
    activation_param: float

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return the activation of the normalized input."""
        if not isinstance(self, Replacing):  # reverted, and called by what has wrapped the forward before
            return type(self).forward(self, input)
        return self._stand_in(input)

    def _replace(self, input: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        y, parameter = super().forward(input), self.activation_param
        match str(getattr(self.activation, "value", self.activation)):  # an enumeration before release 1.0
            case "relu":
                return F.relu(y, inplace=True)
            case "leaky_relu":
                return F.leaky_relu(y, parameter, inplace=True)
            case "elu":
                return F.elu(y, parameter, inplace=True)
            case "identity" | "none":
                return y
        raise RuntimeError(f"{self._site.name}: unknown activation {self.activation!r}.")


class Apex(Replacing, DistSyncBatchNorm):
    """apex's: channels may be last, and a summand and a ReLU may follow."""

    channel_last: bool
    fuse_relu: bool

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the normalized input, plus ``z`` if given; with ``fuse_relu`` the ReLU of that."""
        if not isinstance(self, Replacing):  # reverted, and called by what has wrapped the forward before
            return type(self).forward(self, input, z)
        return self._stand_in(input) if z is None else self._stand_in(input, z)

    def _replace(self, input: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        z = rest[0] if rest else None
        last = self.channel_last and input.dim() > 2
        if last:
            input, z = input.movedim(-1, 1), None if z is None else z.movedim(-1, 1)
        y = super().forward(input, residual=z, relu=getattr(self, "fuse_relu", False))
        return y.movedim(1, -1) if last else y


class Known(NamedTuple):
    """How layers of one class convert."""

    base: type[DistNorm] | None = None
    """The converted layer that takes the place of the class's own normalization; None if there is none."""
    derives: bool = True
    """Whether the converted class also derives from the original one."""
    group: str | None = None
    """The attribute that holds a process group."""
    left: str = ""
    """Why such layers are left alone."""


class ActivatedBatchNorm2d(Activated, DistBatchNorm2d):
    """A base for timm's BatchNormAct2d."""


class ActivatedSyncBatchNorm(Activated, DistSyncBatchNorm):
    """A base for timm's SyncBatchNormAct."""


class NamedActivationBatchNorm(NamedActivation, DistSyncBatchNorm):
    """A base for inplace_abn's ABN, which takes any layout."""


_APEX = Known(Apex, group="process_group")
_ACTIVATED = Known(ActivatedBatchNorm2d)
# DDP refuses subclasses of SyncBatchNorm on the CPU, so that one does not derive from its original.
_ACTIVATED_SYNC = Known(ActivatedSyncBatchNorm, derives=False, group="process_group")
_IN_PLACE = Known(left="it scales by |weight| + eps, not by the weight; ABN, which scales by the weight, is converted")

KNOWN: dict[str, Known] = {
    "timm.layers.norm_act.BatchNormAct2d": _ACTIVATED,
    "timm.layers.norm_act.SyncBatchNormAct": _ACTIVATED_SYNC,
    "timm.models.layers.norm_act.BatchNormAct2d": _ACTIVATED,
    "timm.models.layers.norm_act.SyncBatchNormAct": _ACTIVATED_SYNC,
    "mmcv.ops.sync_bn.SyncBatchNorm": Known(DistSyncBatchNorm, group="group"),
    "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm": _APEX,
    "apex.parallel.sync_batchnorm.SyncBatchNorm": _APEX,
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": Known(DistBatchNorm2d),
    "inplace_abn.abn.ABN": Known(NamedActivationBatchNorm),
    "inplace_abn.abn.InPlaceABN": _IN_PLACE,
    "inplace_abn.abn.InPlaceABNSync": _IN_PLACE,
}


def known(cls: type) -> Known | None:
    """Return how layers of exactly the class ``cls`` convert, or None for a class that is not known."""
    return KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
