"""Batch norms of other packages that replace torch's code, known by their qualified names.

Their packages are not imported. ``docs/subclasses.md`` has the table of what happens to each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm.layers.module import DistBatchNorm2d, DistNorm, DistSyncBatchNorm
from distnorm.layers.tracing import is_traced, leaf


class Replacing(DistNorm):
    """A layer whose forward stands for that of another package's class, unless somebody has replaced that."""

    _theirs: ClassVar[type[nn.Module] | None] = None
    """The class of the other package, if this one derives from it."""
    _as_known: ClassVar[Callable[..., Tensor] | None] = None
    """Its forward when this class was made."""

    def _stand_in(self, input: Tensor, *rest: Tensor) -> Tensor:
        """Call ``_replace``, or the forward that was put on the other class since; under torch.fx make one node."""
        if is_traced(input):
            node: Tensor = leaf(self, input, rest)
            return node
        theirs = None if self._theirs is None else self._theirs.forward
        if theirs is not None and theirs is not type(self)._as_known:
            return theirs(self, input, *rest)  # type: ignore[no-any-return]
        return self._replace(input, *rest)

    def _replace(self, input: Tensor, *rest: Tensor) -> Tensor:
        """Compute what the forward of the other class does. Each subclass defines it."""
        raise NotImplementedError


class Activated(Replacing):
    """timm's: a norm, then its ``drop``, then its ``act``."""

    drop: Callable[[Tensor], Tensor]
    act: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return ``act(drop(norm(input)))``."""
        return self._stand_in(input)

    def _replace(self, input: Tensor, *rest: Tensor) -> Tensor:
        y = super().forward(input)
        if hasattr(self, "drop"):  # not in every release, nor in every layer that was made from another one
            y = self.drop(y)
        return self.act(y) if hasattr(self, "act") else y


class NamedActivation(Replacing):
    """inplace_abn's ABN: a norm, then the activation that ``activation`` names."""

    activation: str
    activation_param: float

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return the activation of the normalized input."""
        return self._stand_in(input)

    def _replace(self, input: Tensor, *rest: Tensor) -> Tensor:
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
        return self._stand_in(input) if z is None else self._stand_in(input, z)

    def _replace(self, input: Tensor, *rest: Tensor) -> Tensor:
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
