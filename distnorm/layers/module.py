"""The layer: a batch norm of torch's whose statistics and sharing are a recipe's.

``convert`` makes one out of a stock layer by swapping its class, so parameters, buffers, hooks and every reference to
the module survive. The classes derive from torch's: ``isinstance(layer, nn.BatchNorm2d)`` stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd import normalize
from distnorm.autograd.operators import NOW, absorb_unseen
from distnorm.autograd.share import KeepLocal, LayerShare
from distnorm.compat.dispatch_state import are_own, are_plain, exporting, is_fake, transforming
from distnorm.layers import checks, overlap, running_statistics
from distnorm.layers.site import Site
from distnorm.layers.tracing import is_traced, leaf
from distnorm.methods import BatchNorm, ChannelAffine
from distnorm.methods.base import compute_dtype
from distnorm.policies import Local
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup
from distnorm.types import Affine, Running, Tail


class DistNorm(_BatchNorm):
    """Normalization by a recipe's statistics in training, by the running statistics in evaluation.

    Input and output ``[N, C, ...]`` of equal shape, dtype and memory format; statistics are at least float32.
    Evaluation never communicates. Training uses the recipe's policy once forward and once backward.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of dimensions or channels, or 1 value per channel over all sharing ranks.
        RuntimeError: ranks that share do not agree or do not answer.
    """

    _site: Site

    tail: str = ""
    """What ``convert(..., fuse=True)`` found that this layer does as well: "relu", "residual" or "residual, relu"."""

    @property
    def recipe(self) -> Recipe:
        """What normalizes here."""
        return self._site.conversion.recipe

    # What torch.jit.script shall not read; it compiles ``forward`` as far as ``is_scripting`` tells it to.
    __jit_ignored_attributes__ = ("_site", "tail")
    __jit_unused_properties__ = ["recipe", "_place"]  # noqa: RUF012
    __constants__ = [*_BatchNorm.__constants__, "_place"]  # noqa: RUF012

    @property
    def _place(self) -> str:
        """The layer's name in the model that was converted."""
        return self._site.name

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False, widen: bool = True) -> Tensor:
        """``relu(norm(input) + residual)``, with what is asked for of the tail.

        In training the kernels form it in the same passes over memory, and its gradients too, if ``residual`` has the
        shape, dtype and device of ``input``. Otherwise it is added as ``+`` does, which may give a wider dtype, or
        without ``widen`` as ``+=`` does.
        """
        if torch.jit.is_scripting():
            return _finish(self._evaluate_scripted(input), residual, relu, widen)
        else:
            return self._forward(input, residual, relu, widen)

    def _forward(self, input: Tensor, residual: Tensor | None, relu: bool, widen: bool) -> Tensor:
        if is_traced(input):
            return _finish(leaf(self, input), residual, relu, widen)
        state = running_statistics.running_of(self, guarded=self._site.conversion.guards)
        checks.check_input(self, self._site, input, state)
        affine = Affine(self.weight, self.bias, self.eps, state.var_C, state.updates)
        if not self.training:
            return _finish(self._evaluate(input, affine, state), residual, relu, widen)
        checks.check_training(self, self._site, input)
        plain = not torch.compiler.is_compiling() and are_plain(input, residual) and are_own(*affine[:2], *state[:3])
        method = self.recipe.method
        if not (plain and isinstance(method, ChannelAffine) and normalize.suits(method, input)):
            return _finish(self._train(input, affine, state, None, plain), residual, relu, widen)
        if _fits(residual, input):
            return self._train(input, affine, state, Tail(residual, relu), plain)
        return _finish(self._train(input, affine, state, normalize.NO_TAIL, plain), residual, relu, widen)

    def _train(self, input: Tensor, affine: Affine, state: Running, tail: Tail | None, plain: bool) -> Tensor:
        """Normalize: by the kernels, which add the ``tail``, or if that is None on the plain path."""
        share = self._share(input, plain)
        method, tracks = self.recipe.method, self.track_running_stats
        if isinstance(method, ChannelAffine) and tail is not None:
            tracked = state if tracks and state.is_whole else None
            between = overlap.arrangement(self, input) if self.recipe.overlap else None
            y = normalize.normalize(method, input, share, affine, between, tracked, tail)
        elif isinstance(share, KeepLocal) and isinstance(method, BatchNorm) and transforming():
            return _BatchNorm.forward(self, input)  # torch's own: nobody else knows its rules under transforms
        else:
            y = method.normalize(input, share, affine)
        if tracks and not (share.absorbed and state.is_whole):
            self._track(share)
        return y

    def _share(self, input: Tensor, plain: bool) -> LayerShare | KeepLocal:
        if torch.compiler.is_compiling():
            if isinstance(self.recipe.policy, Local) and exporting():  # it needs no model to run
                self._site.refuse_one_value(input)
                return KeepLocal()
            return LayerShare(self._site, NOW, opaque=True)
        if is_fake(input):  # there may be no ranks to ask, and there are no values to share
            return LayerShare(self._site, NOW, opaque=True)
        if self._site.alone(input):
            return KeepLocal()
        return LayerShare(self._site, self._site.begin() if plain else NOW, opaque=not plain)

    def extra_repr(self) -> str:
        """As torch's, and the recipe."""
        tail = f", fused with {self.tail}" if self.tail else ""
        return f"{super().extra_repr()}, {self.recipe.name or self.recipe}{tail}"

    def train(self, mode: bool = True) -> DistNorm:
        """Switch between training and evaluation; reports what a GPU could not report in time."""
        self._site.raise_if_starved()
        super().train(mode)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy registers itself with its own, unbound conversion."""
        super().__setstate__(state)
        self._site.conversion.add(self._site.index, self._site.name, self)

    def _evaluate(self, x_NCL: Tensor, affine: Affine, state: Running) -> Tensor:
        mean_C, var_C = self._running_statistics(state)
        if mean_C is None or var_C is None:
            return self.recipe.method.normalize(x_NCL, KeepLocal(), affine)
        weight_C, bias_C = (None if each is None else each.to(mean_C.dtype) for each in affine[:2])
        return F.batch_norm(x_NCL, mean_C, var_C, weight_C, bias_C, False, 0.0, self.eps)

    def _evaluate_scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(f"{self._place}: scripted from evaluation, where nothing is shared; call eval().")
        mean_C, var_C = self.running_mean, self.running_var
        dtype = input.dtype if mean_C is None else mean_C.dtype
        weight_C = None if self.weight is None else self.weight.to(dtype)
        bias_C = None if self.bias is None else self.bias.to(dtype)
        return F.batch_norm(input, mean_C, var_C, weight_C, bias_C, mean_C is None and var_C is None, 0.0, self.eps)

    def __prepare_scriptable__(self) -> DistNorm:
        if self.training:
            raise RuntimeError(
                f"{self._place}: torch.jit.script cannot share statistics in training. Script the model in evaluation, "
                "model.eval(), or a stock one, distnorm.revert(model)."
            )
        if self.running_mean is None and not isinstance(self.recipe.method, BatchNorm):
            raise RuntimeError(
                f"{self._place}: without running statistics torch.jit.script knows those of batch norm; this is "
                f"{self.recipe.method}."
            )
        return self

    def _running_statistics(self, state: Running) -> tuple[Tensor | None, Tensor | None]:
        """With what is in flight, if an asynchronous policy has sent statistics that no step's end has absorbed yet."""
        mean_C, var_C = state[:2]
        if self._site.conversion.facts.always_global or exporting() or mean_C is None or var_C is None:
            return mean_C, var_C
        if torch.compiler.is_compiling():
            ahead_of: tuple[Tensor, Tensor] = torch.ops.distnorm.running(mean_C, var_C, self._site.number)
            return ahead_of
        ahead = self._site.running(self)
        return (mean_C, var_C) if ahead is None else ahead[:2]

    def _track(self, share: LayerShare | KeepLocal) -> None:
        assert share.shared is not None
        conversion = self._site.conversion
        if torch.compiler.is_compiling():
            landed = conversion.facts.always_global or share.landed()
        elif not share.opaque and are_plain(share.shared):
            landed = share.landed()
        else:  # unseen by dispatch modes, for a repetition has no such operations
            absorb_unseen(self._site, share.shared)
            return
        running_statistics.absorb_shared(self, self.recipe.method, share.shared, landed, guarded=conversion.guards)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistNorm:
        """Move or cast as torch does, but keep running statistics in float32 or better, whatever an engine casts."""
        wide = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            cast = getattr(self, name)
            if buffer is not None and cast.dtype != compute_dtype(cast.dtype):
                # From the buffer as it was, for its digits; the meta device has none to give.
                kept = cast if buffer.is_meta else buffer
                setattr(self, name, kept.to(device=cast.device, dtype=compute_dtype(cast.dtype)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._site.conversion.means_to_fold = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._site.raise_if_starved()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self._ahead().items():
            destination[f"{prefix}{name}"] = values

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is bound to no ranks: nothing would land there, so it has what is in flight."""
        return {**self.__dict__, "_buffers": {**self._buffers, **self._ahead()}}

    @torch.no_grad()
    def absorb_in_flight(self) -> None:
        """Let the buffers hold what evaluation uses, for a layer that ends no more steps."""
        for name, values in self._ahead().items():
            getattr(self, name).copy_(values)

    def _ahead(self) -> dict[str, Tensor]:
        """Copies of the running statistics with what is in flight; empty if nothing is."""
        if self._site.conversion.ahead(self._site.name) is None:
            return {}
        ahead = self._site.running(self)
        found = zip(running_statistics.BUFFERS, (None, None, None) if ahead is None else ahead[:3], strict=True)
        return {name: each.clone() for name, each in found if each is not None}


def _fits(residual: Tensor | None, x_NCL: Tensor) -> bool:
    if residual is None:
        return True
    alike = isinstance(residual, Tensor) and residual.shape == x_NCL.shape and residual.dtype == x_NCL.dtype
    return alike and residual.device == x_NCL.device


def _finish(y_NCL: Tensor, residual: Tensor | None, relu: bool, widen: bool) -> Tensor:
    """A tail by itself."""
    if residual is not None:
        y_NCL = y_NCL + residual if widen else y_NCL.add_(residual)
    return y_NCL.relu() if relu else y_NCL


# Initialization and filters of public code ask for "BatchNorm", or "BatchNorm2d", in the name of a layer's class.


class DistBatchNorm1d(DistNorm, nn.BatchNorm1d):
    """``[N, C]`` or ``[N, C, L]``."""


class DistBatchNorm2d(DistNorm, nn.BatchNorm2d):
    """``[N, C, H, W]``."""


class DistBatchNorm3d(DistNorm, nn.BatchNorm3d):
    """``[N, C, D, H, W]``."""


# docs/decisions.md#syncbatchnorm-is-not-a-base-class
class DistSyncBatchNorm(DistNorm):
    """Any layout from ``[N, C]`` on, as torch's SyncBatchNorm takes it."""

    __jit_unused_properties__ = [*DistNorm.__jit_unused_properties__, "process_group"]  # noqa: RUF012

    @property
    def process_group(self) -> dist.ProcessGroup | LostGroup | None:
        """The group that the layer was given: nothing is shared beyond it. None means what the recipe says."""
        return self._site.conversion.process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


# Their names until 0.1, which pickles and register_converter's callers may hold.
DistNorm1d, DistNorm2d, DistNorm3d = DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d
