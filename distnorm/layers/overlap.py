"""Overlap the backward collective of a norm with the weight gradient of the convolution that follows it.

The backward pass of a convolution computes two gradients, and the norm before it needs only the input gradient. So the
convolution is split. Its own autograd node computes the input gradient, and defers the weight gradient to a node
``_Late``, which the norm's forward pass creates just before its own node. The autograd engine runs ready nodes newest
first: input gradient, the norm's sums (the collective starts), weight gradient, the norm's gradient (which waits for
the collective). Values do not depend on which convolution is paired with which norm; a bad pairing only overlaps less.
docs/autograd.md draws the order.

The convolution runs as in torch under autocast, no_grad and torch.compile, for frozen weights, tensor subclasses
(sharded parameters) and convolutions with other than zero padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.engine import Deferred
from distnorm.compat.dispatch_state import are_plain, is_batch
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.tracing import ScriptedConv, is_traced, leaf

_ARRANGED = "_arranged"
_FOLLOWER = "_follower"

Gradients = tuple[Tensor | None, Tensor | None]


class _Arrangement(NamedTuple):
    late: tuple[Tensor, Tensor | None]
    parameters: tuple[Tensor, Tensor | None]
    versions: list[int]
    deferred: Deferred[Gradients]

    def holds(self, conv: nn.Module) -> bool:
        """Return whether ``conv`` still has these parameters, unchanged. It may be called in a later step, or never."""
        same = all(one is two for one, two in zip(self.parameters, (conv.weight, conv.bias), strict=True))
        return same and self.versions == _versions(self.parameters)


class LateConv(ScriptedConv):
    """A convolution whose weight gradient can be deferred. A mixin that precedes torch's class."""

    def _forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            node: Tensor = leaf(self, input)
            return node
        arranged: _Arrangement | None = self.__dict__.pop(_ARRANGED, None) if _ARRANGED in self.__dict__ else None
        if arranged is None or not self._suits(input) or not arranged.holds(self):
            output: Tensor = self._conv_forward(input, self.weight, self.bias)
            return output
        geometry = self.stride, self.padding, self.dilation, self.groups
        output = _Convolve.apply(input, *arranged.late, *arranged.parameters, arranged.deferred, geometry)
        return output

    def _suits(self, input: Tensor) -> bool:
        batched = input.dim() == self.weight.dim()
        return batched and input.requires_grad and torch.is_grad_enabled() and are_plain(input)


class LateConv1d(LateConv, nn.Conv1d):
    """``nn.Conv1d``."""


class LateConv2d(LateConv, nn.Conv2d):
    """``nn.Conv2d``."""


class LateConv3d(LateConv, nn.Conv3d):
    """``nn.Conv3d``."""


_TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: LateConv1d,
    nn.Conv2d: LateConv2d,
    nn.Conv3d: LateConv3d,
}
_ORIGINALS = {late: original for original, late in _TARGETS.items()}


# docs/decisions.md#overlap-is-optional
def pair(model: nn.Module, layers: Iterable[_BatchNorm]) -> None:
    """Pair each of ``layers`` with the next convolution registered after it, unless another norm comes first."""
    wanted = {id(layer) for layer in layers}
    waiting: _BatchNorm | None = None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            waiting = module if id(module) in wanted else None
        elif waiting is not None and underlying(module) in _TARGETS and _pads_zeros(module):
            swap(module, _TARGETS[underlying(module)])
            # Through __dict__, so that the convolution does not become a child of the norm.
            waiting.__dict__[_FOLLOWER] = module
            waiting = None


def release(model: nn.Module) -> None:
    """Undo ``pair``."""
    for module in model.modules():
        module.__dict__.pop(_FOLLOWER, None)
        if underlying(module) in _ORIGINALS:
            module.__dict__.pop(_ARRANGED, None)
            swap(module, _ORIGINALS[underlying(module)])


def arrangement(layer: nn.Module, x_NCL: Tensor) -> Callable[[], None] | None:
    """Return a function that creates the node ``_Late``, to call before the node of ``layer``; None without overlap."""
    conv = layer.__dict__.get(_FOLLOWER)
    if conv is None or not (torch.is_grad_enabled() and x_NCL.requires_grad) or underlying(conv) not in _ORIGINALS:
        return None
    conv.__dict__.pop(_ARRANGED, None)  # from a forward pass that did not reach the convolution
    if torch.is_autocast_enabled(x_NCL.device.type) or not _is_plain(conv):
        return None

    def arrange() -> None:
        deferred: Deferred[Gradients] = Deferred()
        parameters = conv.weight, conv.bias
        late = _Late.apply(*parameters, deferred)
        conv.__dict__[_ARRANGED] = _Arrangement(late, parameters, _versions(parameters), deferred)

    return arrange


def _versions(parameters: tuple[Tensor, Tensor | None]) -> list[int]:
    return [each._version for each in parameters if each is not None]


def _pads_zeros(conv: nn.Module) -> bool:
    return getattr(conv, "padding_mode", None) == "zeros" and not isinstance(getattr(conv, "padding", ""), str)


def _is_plain(conv: nn.Module) -> bool:
    # Attributes are not read, since reading a computed one can change state, as in torch's spectral_norm.
    parameters = conv._parameters
    computed = any(name not in parameters for name in ("weight", "bias"))
    return not computed and all(
        each is None or (type(each) is nn.Parameter and each.requires_grad) for each in parameters.values()
    )


class _Late(torch.autograd.Function):
    """Returns the parameters; its backward pass computes their deferred gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, deferred: Deferred[Gradients]
    ) -> tuple[Tensor, Tensor | None]:
        ctx.deferred = deferred
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor | None, dbias: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the deferred gradients. The incoming ones are placeholders, unless nothing was deferred."""
        gradients = ctx.deferred.take()
        return *((dweight, dbias) if gradients is None else gradients()), None


class _Convolve(torch.autograd.Function):
    """A convolution, as a function of its first three arguments.

    ``weight`` and ``bias`` are the inputs of ``_Late``. Second derivatives use these, since gradients that pass through
    ``_Late`` would be replaced by the deferred ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        late_weight: Tensor,
        late_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        deferred: Deferred[Gradients],
        geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    ) -> Tensor:
        ctx.deferred, ctx.geometry = deferred, geometry
        ctx.save_for_backward(x, weight, bias)
        stride, padding, dilation, groups = geometry
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the input gradient, and placeholders for the others."""
        x, weight, bias = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]

        def gradients(of_x: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            stride, padding, dilation, groups = ctx.geometry
            sizes = None if bias is None else list(bias.shape)
            found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
                *(dy, x, weight, sizes, stride, padding, dilation, False, (0,) * len(stride), groups),
                [of_x, of_weight, of_bias],
            )
            return found

        if torch.is_grad_enabled() or not are_plain(dy, x, weight, bias) or is_batch(dy):
            return *gradients(wants_x, wants_weight, wants_bias), None, None, None, None
        ctx.deferred.defer(lambda: gradients(False, wants_weight, wants_bias)[1:])
        dx = gradients(True, False, False)[0] if wants_x else None
        return dx, weight if wants_weight else None, bias if wants_bias else None, None, None, None, None
