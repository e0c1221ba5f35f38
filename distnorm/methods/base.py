"""The interface of a method: how a layer's input is normalized, in training with statistics that ranks share.

Shapes: x_NCL is the input, of any layout from ``[N, C]`` to ``[N, C, D, H, W]``. sums_KC, means_KC and theta_KC have K
kinds of statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm.kernels.arithmetic import RAW_MOMENTS, Formula
from distnorm.types import Affine, Link, Op


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for arithmetic on activations: at least float32."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def per_channel(values_C: Tensor, x_NCL: Tensor) -> Tensor:
    """View ``[C]`` values so that they broadcast against ``x_NCL``, in the dtype of its arithmetic."""
    return values_C.to(compute_dtype(x_NCL.dtype)).view(1, -1, *(1,) * (x_NCL.dim() - 2))


def identity(means: Tensor) -> Tensor:
    """Return the argument: the default coordinates of shared means."""
    return means


class Declared(NamedTuple):
    """What a method needs of every layer, by name: ``convert`` registers it, and ``revert`` removes it.

    Fields:
        parameters: initial values of trainable parameters, of any shape; the layer's dtype and device are used.
        buffers: initial values of buffers, of any shape; floating-point ones have at least one dimension.
            ``Method.targets`` says what they move towards.
    """

    parameters: Mapping[str, Tensor] = {}
    buffers: Mapping[str, Tensor] = {}


class Layer(NamedTuple):
    """What a method sees of its layer.

    Fields:
        eps: the layer's ``eps``.
        parameters: ``"weight"`` and ``"bias"``, each ``[C]`` or None, and the declared ones.
        buffers: ``"running_mean"`` and ``"running_var"``, each ``[C]`` or None, and the declared ones. In evaluation
            they include sums that are in flight. In training they are copies, so that a graph may keep them.
        updates: the number of updates of the buffers, or None.
    """

    eps: float
    parameters: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor | None] = MappingProxyType({})
    updates: Tensor | None = None

    def declared(self, name: str) -> Tensor:
        """Return the declared parameter or buffer of this ``name``, which no user can set to None."""
        found = self.parameters[name] if name in self.parameters else self.buffers[name]
        assert found is not None, name
        return found


class Shared(NamedTuple):
    """Global statistics of one share, without gradient: ``means``, of the shape of its sums, and their ``weight``.

    For ``op="max"`` they are the maxima, and how often each of them occurs.
    """

    means: Tensor
    weight: Tensor


class Share(Protocol):
    """Turns local statistics into shared ones: a method's only access to other ranks."""

    def __call__(
        self, sums: Tensor, weight: Tensor | float, link: Link = identity, *, name: str = "", op: Op = "sum"
    ) -> tuple[Tensor, Tensor]:
        """Return ``(link(S / W), W)``, where S and W are ``sums`` and ``weight`` over all ranks that share.

        They are equal on these ranks, and differentiable any number of times. Uses the policy once per direction.

        Args:
            sums: local additive sums of any shape, float64. With ``op="max"``: local maxima, -inf where there is no
                value.
            weight: what the sums are divided by: a number, or a tensor that broadcasts against ``sums``, such as one
                count per component. If it is a tensor that carries gradient, W does too. With ``op="max"``: how many
                local values attain each maximum.
            link: the coordinates in which cotangents are shared; it has no parameters.
            name: tells several shares of one forward apart; every forward has the same names.
            op: ``"sum"``, or ``"max"``, which returns ``(link(M), W)``: the maximum over ranks, and how many values of
                all ranks attain it. Each of these gets 1 / W of its gradient.
        """
        ...

    def affine(self, x_NCL: Tensor, core: ChannelAffine, layer: Layer) -> Tensor:
        """Return ``core.normalize(x_NCL, share, layer)``, computed by the kernels where they accept ``x_NCL``.

        Uses the share without a name. The running statistics are updated as ``core`` does.
        """
        ...


class Method(ABC):
    """Which statistics are computed, and how they transform the input. Concrete ones are final frozen dataclasses."""

    centred: ClassVar[bool] = True
    """Whether evaluation subtracts ``running_mean``. If not, ``running_var`` tracks the second moment."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """The names of what ``forward`` takes beside x, such as a class index."""

    needs_max: ClassVar[bool] = False
    """Whether it shares with ``op="max"``, which policies that average over steps cannot."""

    @property
    def follows(self) -> bool:
        """Return whether the transform may depend on the running statistics."""
        return True

    def check(self, features: int) -> None:
        """Raise a ValueError that says what is wrong if layers of so many ``features`` cannot use this method."""
        return None

    def declare(self, features: int) -> Declared:
        """Return the parameters and buffers that a layer of so many ``features`` has beside those of batch norm."""
        return Declared()

    def examples(self, x_NCL: Tensor) -> tuple[Tensor, ...]:
        """Return further inputs that fit ``x_NCL``, one for each of ``inputs``; only their shapes matter."""
        return tuple(torch.zeros_like(x_NCL) for _ in self.inputs)

    @abstractmethod
    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize ``x_NCL`` in training with shared statistics; shape and dtype are kept.

        Every value that passes through ``share`` is equal on all sharing ranks afterwards. Trainable parameters must be
        applied after it, never before: their gradients then stay local, and data parallelism averages them.
        """

    @abstractmethod
    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize ``x_NCL`` in evaluation; shape and dtype are kept. Nothing is shared."""

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        """Return what buffers move towards, by name, given global statistics by the name of their share.

        Each buffer becomes ``buffer + momentum * (target - buffer)``, or the plain average over all steps if the
        layer's momentum is None. Called where the statistics become known: after the forward, or at the end of a step.
        """
        return {}

    def folded(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Return ``scale_C, shift_C`` if evaluation is ``scale_C * x + shift_C``, else None."""
        return None

    def stock(self, features: int, layer: Layer) -> nn.Module | None:
        """Return a new module of torch that computes the same in training and evaluation, else None.

        ``revert`` puts it in the place of a layer whose evaluation is not affine per channel.
        """
        return None


class ChannelAffine(Method):
    """Methods of the form ``y = scale_C * x + shift_C``, defined by C-sized float64 arithmetic alone.

    ``normalize`` below is their executable specification. ``kernels`` compute the same with one memory pass per loop.
    """

    raw: ClassVar[slice]
    """Which raw moments the method shares: rows of (mean of x, mean of x squared)."""

    @property
    def kinds(self) -> int:
        """Return the number of raw moments. All values of the last one have one sign."""
        return len(range(RAW_MOMENTS)[self.raw])

    @property
    def follows(self) -> bool:
        """Return whether the transform depends on the running statistics."""
        return False

    def formula(self, affine: Affine | None = None) -> Formula | None:
        """Return the name of its arithmetic if ``kernels`` has it in C; ``affine`` if the transform is wanted."""
        return None

    @abstractmethod
    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """Return the coordinates theta_KC of the shared means, in which cotangents are exchanged."""

    @abstractmethod
    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return ``scale_C, shift_C``, float64."""

    @abstractmethod
    def moments(self, means_KC: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Return what the running statistics move towards, given shared ``means_KC`` over ``count`` values."""

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize on the plain path: differentiable any number of times, traceable, on any device.

        Moments are computed about the local mean, and y is ``(x - mean) * scale + (shift + mean * scale)``. The last
        term is C-sized and float64, so large means cost no accuracy.
        """
        count = x_NCL.numel() // x_NCL.shape[1]
        values_NCL = x_NCL.to(compute_dtype(x_NCL.dtype))
        raw_KC, pivot_C = _raw_means(values_NCL) if count else _no_values(values_NCL)
        theta_KC, _ = share(raw_KC[self.raw] * count, count, partial(self.link, eps=layer.eps))
        scale_C, shift_C = self.coefficients(theta_KC, affine_of(layer))
        centred_NCL = values_NCL - per_channel(pivot_C, values_NCL)
        shift_C = shift_C + pivot_C * scale_C
        return (centred_NCL * per_channel(scale_C, x_NCL) + per_channel(shift_C, x_NCL)).to(x_NCL.dtype)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize by the running statistics, as torch's batch norm does."""
        mean_C, var_C = layer.buffers["running_mean"], layer.buffers["running_var"]
        assert mean_C is not None and var_C is not None, "without them, the batch is normalized by its own statistics"
        weight_C, bias_C = (
            None if each is None else each.to(mean_C.dtype)
            for each in (layer.parameters["weight"], layer.parameters["bias"])
        )
        return F.batch_norm(x_NCL, mean_C, var_C, weight_C, bias_C, False, 0.0, layer.eps)

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        """Return the ``moments``."""
        return self.moments(*shared[""])

    def folded(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Return ``batch_norm_folded``."""
        return batch_norm_folded(layer)


def affine_of(layer: Layer) -> Affine:
    """Return what kernels take of ``layer``."""
    parameters, buffers = layer.parameters, layer.buffers
    return Affine(parameters["weight"], parameters["bias"], layer.eps, buffers.get("running_var"), layer.updates)


def layer_of(affine: Affine) -> Layer:
    """Return ``affine`` as a method sees it: the layer's part that is in it."""
    parameters = {"weight": affine.weight_C, "bias": affine.bias_C}
    return Layer(affine.eps, parameters, {"running_var": affine.running_var_C}, affine.updates)


def batch_norm_folded(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Return ``scale_C, shift_C`` of torch's batch norm in evaluation, float64; None without running statistics."""
    mean_C, var_C = layer.buffers["running_mean"], layer.buffers["running_var"]
    if mean_C is None or var_C is None:
        return None
    weight_C, bias_C = layer.parameters["weight"], layer.parameters["bias"]
    scale_C = (var_C.double() + layer.eps).rsqrt()
    scale_C = scale_C if weight_C is None else scale_C * weight_C
    shift_C = -mean_C * scale_C
    return scale_C, shift_C if bias_C is None else shift_C + bias_C


def _raw_means(values_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 (mean, mean of squares) ``[2, C]``, and the detached mean."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    var_C, mean_C = torch.var_mean(values_NCL, dims, correction=0)
    var_C, mean_C = var_C.double(), mean_C.double()
    return torch.stack((mean_C, var_C + mean_C.square())), mean_C.detach()


def _no_values(values_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return zeros that are part of the graph: a rank without values must take part in the backward collective."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    zero_C = values_NCL.sum(dims, dtype=torch.float64)
    return torch.stack((zero_C, zero_C)), zero_C.detach()
