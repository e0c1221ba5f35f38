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
from torch.nn.modules.batchnorm import _BatchNorm

import distnorm.layers.operators  # noqa: F401  what torch.ops.distnorm has
from distnorm.autograd import normalize
from distnorm.autograd.engine import backward_may_follow
from distnorm.autograd.keep_local import KeepLocal
from distnorm.compat.dispatch_state import are_own, are_plain, exporting, in_transform
from distnorm.kernels import stock
from distnorm.kernels.activations import named
from distnorm.layers import checks, epilogues, initial, overlap, repeated
from distnorm.layers.exchanges import exchange_of
from distnorm.layers.line import Line
from distnorm.layers.running_statistics import running_of, seen
from distnorm.layers.scripting import Scriptable
from distnorm.layers.site import Site, update_layer
from distnorm.layers.small import Small
from distnorm.layers.tracing import is_traced, leaf
from distnorm.methods import BatchNorm
from distnorm.methods.base import compute_dtype
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup
from distnorm.types import RELU, Affine, Epilogue, Running


class DistNorm(Scriptable):
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

    def forward(
        self,
        input: Tensor,
        *inputs: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        widen: bool | None = True,
        activation: str | None = None,
        parameter: float = 0.0,
    ) -> Tensor:
        """Return ``activation(norm(input, *inputs) + residual)``, where ``residual`` and ``activation`` are optional.

        In training the kernels compute this epilogue and its gradients in the same passes over memory, if ``residual``
        has the shape, dtype and device of ``input`` and the activation behind it is a ReLU. Otherwise it is computed
        separately. The residual is then added as ``+`` does, which may give a wider dtype; with ``widen=False`` as in
        ``norm(input) += residual``, with None as in ``residual += norm(input)``. ``inputs`` are those that the recipe's
        method names. ``activation`` is a name in ``kernels/activations.py``, such as "silu"; ``relu`` is short for
        "relu". ``parameter`` is the negative slope of "leaky_relu" or the alpha of "elu".
        """
        if not isinstance(self, DistNorm):  # reverted, and called by what has wrapped the forward before
            return type(self).forward(self, input)
        plain = not torch.compiler.is_compiling() and are_plain(input, residual)
        node = leaf(self, input, inputs) if not plain and is_traced(input) else None
        wanted = RELU if relu else None if activation is None else named(activation, parameter)
        nothing = residual is None and wanted is None
        epilogue = normalize.NO_EPILOGUE if nothing else Epilogue(residual, wanted)
        if node is not None:
            return epilogues.apart(node, epilogue, widen)
        small = self._site.small if plain and not inputs else None
        y = None if small is None else small.batch_norm(self, input)
        if y is not None:
            return y if nothing else epilogues.in_place(y, epilogue, widen)
        return self._train_or_evaluate(input, inputs, epilogue, widen, plain)

    def _train_or_evaluate(
        self, input: Tensor, inputs: tuple[Tensor, ...], epilogue: Epilogue, widen: bool | None, plain: bool
    ) -> Tensor:
        """Check everything, and compute on the path that suits it; ``plain``: tensors are, and nothing is compiled."""
        site, (residual, activation) = self._site, epilogue
        running = running_of(self, site.conversion.guards)
        checks.check_input(self, site, input, running)
        if inputs or site.inputs:
            checks.check_inputs(site, inputs)
        parameters = self._parameters
        weight_C = parameters["weight"] if "weight" in parameters else self.weight  # tools may compute one
        bias_C = parameters["bias"] if "bias" in parameters else self.bias
        if not self.training:
            return epilogues.apart(self._evaluate(input, inputs, running), epilogue, widen)
        checks.check_training(self, site, input)
        plain = plain and are_own(weight_C, bias_C, *running[:3])
        method, tracked = site.channel_affine if plain else None, running if self.track_running_stats else None
        if method is None or not normalize.suits(method, input):
            return epilogues.apart(self._train_plainly(input, inputs, running, tracked, plain), epilogue, widen)
        affine = Affine(weight_C, bias_C, self.eps, running.var_C, running.updates)
        fits = residual is None or (epilogues.fits(residual, input) and activation in (None, RELU))
        fused = epilogue if fits else normalize.NO_EPILOGUE
        exchange = exchange_of(site, input, True)
        if isinstance(exchange, KeepLocal) and stock.suits(method, input, affine, running):
            updates = tracked is not None and exchange.updates_running()
            y = stock.batch_norm(input, weight_C, bias_C, *running[:4], self.eps, updates_running=updates)
            site.small = Small(site.conversion, site.name, input) if updates else None
            return y if epilogue is normalize.NO_EPILOGUE else epilogues.in_place(y, epilogue, widen)
        site.small = None
        between = overlap.arrangement(self, input) if site.conversion.recipe.overlap else None
        y = normalize.normalize(method, input, exchange, affine, between, tracked, fused)
        return y if fits else epilogues.apart(y, epilogue, widen)

    def _train_plainly(
        self, input: Tensor, inputs: tuple[Tensor, ...], running: Running, tracked: Running | None, plain: bool
    ) -> Tensor:
        """Normalize by the method's specification, for inputs that the kernels do not accept."""
        method, share = self.recipe.method, exchange_of(self._site, input, plain)
        transformed = not torch.compiler.is_compiling() and in_transform()
        if transformed and isinstance(share, KeepLocal) and isinstance(method, BatchNorm):
            return _BatchNorm.forward(self, input)  # torch's own, which has the rules for transforms
        layer = seen(self, running)
        record = None
        if method.follows and plain and self._site.measured is not None:
            layer, record = repeated.as_of_first(input, self._site, layer)
        elif method.follows:
            layer = repeated.with_copies(layer)
        y = method.normalize(input, share, layer, *inputs)
        if record is not None:
            repeated.remember(record, self._site, y)
        if tracked is not None and share.shared:
            self._update_running(share, tracked)
        return y

    def _added_parameters(self) -> dict[str, nn.Parameter]:
        site = self._site
        return {f"{site.name}.{name}": getattr(self, name) for name in site.parameters}

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

    def _evaluate(self, x_NCL: Tensor, inputs: tuple[Tensor, ...], running: Running) -> Tensor:
        method, layer = self.recipe.method, seen(self, self._ahead_of(running))
        if running.mean_C is None or running.var_C is None:
            return method.normalize(x_NCL, KeepLocal(x_NCL.numel() // x_NCL.shape[1]), layer, *inputs)
        return method.evaluate(x_NCL, layer, *inputs)

    def _ahead_of(self, running: Running) -> Running:
        """Return the running statistics; with what is in flight, if a policy is asynchronous."""
        if self._site.conversion.facts.always_global or exporting() or running.mean_C is None or running.var_C is None:
            return running
        if torch.compiler.is_compiling():
            names = list(running.buffers)
            mean_C, var_C, *declared = torch.ops.distnorm.running(list(running.buffers.values()), self._site.number)
            return running._replace(mean_C=mean_C, var_C=var_C, declared=dict(zip(names[2:], declared, strict=True)))
        return self._site.running(self) or running

    def _update_running(self, share: Line | KeepLocal, running: Running) -> None:
        """Update the ``running`` statistics with what the plain path has shared, if it is global."""
        site, completed = self._site, True
        parts = ("",) if site.measured is None else site.measured.parts
        shared = [share.shared[name] for name in parts]
        if torch.compiler.is_compiling():
            if isinstance(share, Line) and not site.conversion.facts.always_global:
                completed = torch.ops.distnorm.is_global(shared[0][-1], site.number, share.learning)
        elif (isinstance(share, Line) and share.opaque) or not are_plain(*shared):
            # Hidden from dispatch modes, since a repetition has no such operations.
            torch.ops.distnorm.update_running(shared, site.scalar(), backward_may_follow())
            return
        elif not share.updates_running():
            return
        update_layer(self, running, site, shared, completed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistNorm:
        """Move or cast as torch does, but keep running statistics in float32 or wider, whatever an engine casts."""
        wide = {name: getattr(self, name) for name in ("running_mean", "running_var", *self._site.buffers)}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            cast = getattr(self, name)
            if buffer is not None and cast.is_floating_point() and cast.dtype != compute_dtype(cast.dtype):
                # Convert the original buffer, to keep its digits; a meta tensor has no values to keep.
                kept = cast if buffer.is_meta else buffer
                setattr(self, name, kept.to(device=cast.device, dtype=compute_dtype(cast.dtype)))
        return self

    def reset_running_stats(self) -> None:
        """Reset the running statistics, and the buffers that the method has declared."""
        super().reset_running_stats()
        site = self.__dict__.get("_site")  # torch's constructor calls this before there is one
        if site is not None:
            initial.reset(self, site, site.buffers)

    def reset_parameters(self) -> None:
        """Reset all parameters and buffers to their initial values."""
        super().reset_parameters()
        site = self.__dict__.get("_site")
        if site is not None:
            initial.reset(self, site, site.parameters)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._site.conversion.resume_pending = True
        initial.complete(self, self._site, state_dict, prefix)
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
        if ahead is None:
            return {}
        found = {**ahead.buffers, "num_batches_tracked": ahead.updates}
        return {name: each.clone() for name, each in found.items() if each is not None}


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
