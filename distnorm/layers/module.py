"""The layer: a PyTorch batch norm layer whose statistics and sharing follow a recipe.

``convert`` turns a stock layer into this one by swapping its class, so parameters, buffers, hooks and all references to
the module stay valid. The classes derive from torch's: ``isinstance(layer, nn.BatchNorm2d)`` stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

import distnorm.layers.operators  # noqa: F401  what torch.ops.distnorm has
from distnorm.autograd import normalize
from distnorm.autograd.engine import backward_may_follow
from distnorm.autograd.share import KeepLocal
from distnorm.compat.dispatch_state import are_own, are_plain, exporting, in_transform, is_fake
from distnorm.kernels import stock
from distnorm.kernels.activations import activate, named
from distnorm.kernels.running import update_from_sums
from distnorm.layers import checks, overlap
from distnorm.layers.line import NOW, Line
from distnorm.layers.running_statistics import BUFFERS, running_of
from distnorm.layers.site import Site
from distnorm.layers.tracing import is_traced, leaf
from distnorm.methods import BatchNorm
from distnorm.methods.base import compute_dtype
from distnorm.policies import Local
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup
from distnorm.types import RELU, Affine, Epilogue, Running


class DistNorm(_BatchNorm):
    """Normalize by a recipe's statistics in training, by the running statistics in evaluation.

    Input and output ``[N, C, ...]`` have equal shape, dtype and memory format; statistics are at least float32.
    Evaluation never communicates. Training uses the recipe's policy once in the forward and once in the backward pass.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of dimensions or channels, or 1 value per channel over all sharing ranks.
        RuntimeError: ranks that share do not agree or do not answer.
    """

    _site: Site

    epilogue: str = ""
    """The epilogue that ``convert(..., fuse=True)`` found for this layer: "relu", "residual" or "residual, relu"."""

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of this layer."""
        return self._site.conversion.recipe

    # Hide from torch.jit.script what it cannot compile; ``is_scripting`` limits how much of ``forward`` it compiles.
    __jit_ignored_attributes__ = ("_site", "epilogue")
    __jit_unused_properties__ = ["recipe", "_place"]  # noqa: RUF012
    __constants__ = [*_BatchNorm.__constants__, "_place"]  # noqa: RUF012

    @property
    def _place(self) -> str:
        """Return the layer's name in the model that was converted."""
        return self._site.name

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        widen: bool = True,
        activation: str | None = None,
        parameter: float = 0.0,
    ) -> Tensor:
        """Return ``activation(norm(input) + residual)``, where ``residual`` and ``activation`` are optional.

        In training the kernels compute this epilogue and its gradients in the same passes over memory, if ``residual``
        has the shape, dtype and device of ``input``. Otherwise the residual is added as ``+`` does, which may give a
        wider dtype, or with ``widen=False`` as ``+=`` does. With a residual, they compute no activation but a ReLU.

        Args:
            input: ``[N, C, ...]``.
            residual: what is added to the normalized input.
            relu: short for ``activation="relu"``.
            widen: see above.
            activation: a name in ``kernels/activations.py``: "relu", "silu", "leaky_relu" and others.
            parameter: its parameter, if it has one: the negative slope of "leaky_relu", the alpha of "elu".
        """
        if torch.jit.is_scripting():
            assert activation is None, "scripted layers compute no activation but ReLU"
            y = _add(self._evaluate_scripted(input), residual, widen)
            return y.relu() if relu else y
        else:
            wanted = RELU if relu else None if activation is None else named(activation, parameter)
            if wanted is None or wanted == RELU or residual is None:
                return self._forward(input, Epilogue(residual, wanted), widen)
            return activate(self._forward(input, Epilogue(residual), widen), wanted)

    def _forward(self, input: Tensor, epilogue: Epilogue, widen: bool) -> Tensor:
        residual = epilogue.residual_NCL
        if is_traced(input):
            return _finish(leaf(self, input), epilogue, widen)
        site = self._site
        running = running_of(self, site.conversion.guards)
        checks.check_input(self, site, input, running)
        parameters = self._parameters
        weight_C = parameters["weight"] if "weight" in parameters else self.weight  # tools may compute one
        bias_C = parameters["bias"] if "bias" in parameters else self.bias
        affine = Affine(weight_C, bias_C, self.eps, running.var_C, running.updates)
        if not self.training:
            return _finish(self._evaluate(input, affine, running), epilogue, widen)
        checks.check_training(self, site, input)
        plain = not torch.compiler.is_compiling() and are_plain(input, residual) and are_own(*affine[:2], *running[:3])
        method, tracked = site.channel_affine if plain else None, running if self.track_running_stats else None
        if method is None or not normalize.suits(method, input):
            return _finish(self._train_plainly(input, affine, tracked, plain), epilogue, widen)
        fits = residual is None or _fits(residual, input)
        plainly = residual is None and epilogue.activation is None
        fused = epilogue if fits and not plainly else normalize.NO_EPILOGUE
        exchange = self._exchange(input, True)
        alone = fused is normalize.NO_EPILOGUE and isinstance(exchange, KeepLocal)
        if alone and stock.suits(method, input, affine, running):
            y = stock.batch_norm(input, affine, running, updates=tracked is not None and exchange.updates_running())
        else:
            between = overlap.arrangement(self, input) if site.conversion.recipe.overlap else None
            y = normalize.normalize(method, input, exchange, affine, between, tracked, fused)
        return y if fits else _finish(y, epilogue, widen)

    def _train_plainly(self, input: Tensor, affine: Affine, running: Running | None, plain: bool) -> Tensor:
        """Normalize by the method's specification, for inputs that the kernels do not accept."""
        method, share = self.recipe.method, self._exchange(input, plain)
        transformed = not torch.compiler.is_compiling() and in_transform()
        if transformed and isinstance(share, KeepLocal) and isinstance(method, BatchNorm):
            return _BatchNorm.forward(self, input)  # torch's own, which has the rules for transforms
        y = method.normalize(input, share, affine)
        if running is not None:
            self._update_running(share, running)
        return y

    def _exchange(self, input: Tensor, plain: bool) -> Line | KeepLocal:
        """Start a training forward, and return what it shares through; ``plain``: no mode or transform is active."""
        site = self._site
        if not plain and torch.compiler.is_compiling():
            if isinstance(self.recipe.policy, Local) and exporting():  # the exported graph then needs no live model
                checks.check_alone(site, input)
                return KeepLocal()
            return Line(site, None, NOW, opaque=True)
        if not plain and is_fake(input):  # there may be no ranks, and there are no values to share
            return Line(site, None, NOW, opaque=True)
        binding = site.conversion.bound()
        alone = binding.alone and (input.is_cpu or input.is_cuda)
        if alone:
            checks.check_alone(site, input)
        if alone or plain:
            binding.forward_begins(site.name)
        return KeepLocal() if alone else Line(site, binding, binding.step, opaque=not plain)

    def extra_repr(self) -> str:
        """Return torch's text, and the recipe."""
        epilogue = f", fused with {self.epilogue}" if self.epilogue else ""
        return f"{super().extra_repr()}, {self.recipe.name or self.recipe}{epilogue}"

    def train(self, mode: bool = True) -> DistNorm:
        """Switch between training and evaluation. Report errors that a GPU could not report earlier."""
        self._site.raise_if_too_few()
        super().train(mode)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register a copy with its own, unbound conversion."""
        super().__setstate__(state)
        self._site.conversion.add(self._site.index, self._site.name, self)

    def _evaluate(self, x_NCL: Tensor, affine: Affine, running: Running) -> Tensor:
        mean_C, var_C = self._running_statistics(running)
        if mean_C is None or var_C is None:
            return self.recipe.method.normalize(x_NCL, KeepLocal(), affine)
        weight_C, bias_C = (None if each is None else each.to(mean_C.dtype) for each in affine[:2])
        return F.batch_norm(x_NCL, mean_C, var_C, weight_C, bias_C, False, 0.0, self.eps)

    def _evaluate_scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(f"{self._place}: scripted in evaluation, so it cannot train; call eval().")
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
                f"{self._place}: without running statistics torch.jit.script supports batch norm only; this is "
                f"{self.recipe.method}."
            )
        return self

    def _running_statistics(self, running: Running) -> tuple[Tensor | None, Tensor | None]:
        """Return the running statistics; with what is in flight, if a policy is asynchronous."""
        mean_C, var_C = running[:2]
        if self._site.conversion.facts.always_global or exporting() or mean_C is None or var_C is None:
            return mean_C, var_C
        if torch.compiler.is_compiling():
            ahead_of: tuple[Tensor, Tensor] = torch.ops.distnorm.running(mean_C, var_C, self._site.number)
            return ahead_of
        ahead = self._site.running(self)
        return (mean_C, var_C) if ahead is None else ahead[:2]

    def _update_running(self, share: Line | KeepLocal, running: Running) -> None:
        """Update the ``running`` statistics with what the plain path has shared, if it is global."""
        shared, conversion, completed = share.shared, self._site.conversion, True
        assert shared is not None, "the method has shared"
        if torch.compiler.is_compiling():
            if isinstance(share, Line) and not conversion.facts.always_global:
                completed = torch.ops.distnorm.is_global(shared[-1], self._site.number, share.learning)
        elif (isinstance(share, Line) and share.opaque) or not are_plain(shared):
            # Hidden from dispatch modes, since a repetition has no such operations.
            torch.ops.distnorm.update_running(shared, self._site.scalar(), backward_may_follow())
            return
        elif not share.updates_running():
            return
        update_from_sums(conversion.recipe.method, shared, running, self.num_features, completed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistNorm:
        """Move or cast as torch does, but keep running statistics in float32 or wider, whatever an engine casts."""
        wide = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            cast = getattr(self, name)
            if buffer is not None and cast.dtype != compute_dtype(cast.dtype):
                # Convert the original buffer, to keep its digits; a meta tensor has no values to keep.
                kept = cast if buffer.is_meta else buffer
                setattr(self, name, kept.to(device=cast.device, dtype=compute_dtype(cast.dtype)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._site.conversion.resume_pending = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._site.raise_if_too_few()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self._ahead().items():
            destination[f"{prefix}{name}"] = values

    def __getstate__(self) -> dict[str, Any]:
        """Include what is in flight: a copy or a pickle is bound to no ranks, so it would never receive it."""
        return {**self.__dict__, "_buffers": {**self._buffers, **self._ahead()}}

    @torch.no_grad()
    def apply_in_flight(self) -> None:
        """Write to the buffers what evaluation uses, for a layer that ends no more steps."""
        for name, values in self._ahead().items():
            getattr(self, name).copy_(values)

    def _ahead(self) -> dict[str, Tensor]:
        """Return copies of the running statistics with what is in flight; empty if nothing is."""
        if self._site.conversion.ahead(self._site.name) is None:
            return {}
        ahead = self._site.running(self)
        found = zip(BUFFERS, (None, None, None) if ahead is None else ahead[:3], strict=True)
        return {name: each.clone() for name, each in found if each is not None}


def _fits(residual: Tensor, x_NCL: Tensor) -> bool:
    alike = isinstance(residual, Tensor) and residual.shape == x_NCL.shape and residual.dtype == x_NCL.dtype
    return alike and residual.device == x_NCL.device


def _finish(y_NCL: Tensor, epilogue: Epilogue, widen: bool) -> Tensor:
    """Apply the epilogue separately."""
    return activate(_add(y_NCL, epilogue.residual_NCL, widen), epilogue.activation)


def _add(y_NCL: Tensor, residual: Tensor | None, widen: bool) -> Tensor:
    if residual is None:
        return y_NCL
    return y_NCL + residual if widen else y_NCL.add_(residual)


# Initialization code and filters in public code look for "BatchNorm" or "BatchNorm2d" in a layer's class name.


class DistBatchNorm1d(DistNorm, nn.BatchNorm1d):
    """A converted ``nn.BatchNorm1d``: ``[N, C]`` or ``[N, C, L]``."""


class DistBatchNorm2d(DistNorm, nn.BatchNorm2d):
    """A converted ``nn.BatchNorm2d``: ``[N, C, H, W]``."""


class DistBatchNorm3d(DistNorm, nn.BatchNorm3d):
    """A converted ``nn.BatchNorm3d``: ``[N, C, D, H, W]``."""


# docs/decisions.md#syncbatchnorm-is-not-a-base-class
class DistSyncBatchNorm(DistNorm):
    """A converted ``nn.SyncBatchNorm``: any layout from ``[N, C]`` on."""

    __jit_unused_properties__ = [*DistNorm.__jit_unused_properties__, "process_group"]  # noqa: RUF012

    @property
    def process_group(self) -> dist.ProcessGroup | LostGroup | None:
        """Return the group that the layer was given, the limit of its sharing. None leaves that to the recipe."""
        return self._site.conversion.process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


# The names until 0.1. Pickles and callers of register_converter may use them.
DistNorm1d, DistNorm2d, DistNorm3d = DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d
