"""The weights axis: what happens to the convolutions and linear layers that feed a converted layer.

``centralized``: W <- W - mean of W per output filter. It stands in for the centring that RMS lacks. Yan et al., ICLR
2020 (CenConv2d in their code). Two forms with one trajectory:

* forward form: every forward centres the weight, and the gradient passes through the projection;
* projected form, for SGD: weights are projected once per optimizer step. Projection P is linear, and so is SGD with
  momentum and weight decay: P (W - lr v) with v from plain gradients is what the forward form's PW goes through.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.class_swap import swap, underlying
from distnorm.tracing import is_traced, leaf


def centred(weight: Tensor) -> Tensor:
    """``weight`` less its mean per output filter (dimension 0)."""
    return weight - weight.mean(dim=list(range(1, weight.dim())), keepdim=True)


class Centralized:
    """A layer whose weight acts centred. ``projected`` says that its values are kept centred.

    ``stock`` tells whether the norm that it feeds still holds the running statistics of a stock model: those belong to
    the weight as it is, and evaluation gives what the stock model gave, until training goes on.
    """

    weight: Tensor
    training: bool
    projected: bool = False
    stock: Callable[[], bool]

    def effective_weight(self, weight: Tensor) -> Tensor:
        """What the layer computes with."""
        evaluating = not self.training and not torch.compiler.is_compiling()
        return weight if self.projected or (evaluating and self.stock()) else centred(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centred weight; one node to torch.fx, so that what is centred is decided when its graph runs."""
        y: Tensor = leaf(self, input) if is_traced(input) else super().forward(input)  # type: ignore[arg-type, misc]
        return y

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"{self}: torch.jit.script does not know centred weights. Script a stock model, which evaluates alike: "
            "distnorm.revert(copy.deepcopy(model))."
        )

    @torch.no_grad()
    def project(self) -> None:
        """Centre the weight in place."""
        self.weight.copy_(centred(self.weight))

    @torch.no_grad()
    def take_over(self) -> None:
        """Centre a weight that comes from elsewhere; filters that are centred but for rounding stay bit for bit.

        Projecting twice changes last bits, and what a checkpoint holds has been projected.
        """
        filters = list(range(1, self.weight.dim()))
        rounding = 4 * torch.finfo(self.weight.dtype).eps * self.weight.abs().amax(filters, keepdim=True)
        settled = self.weight.mean(filters, keepdim=True).abs() <= rounding
        self.weight.copy_(torch.where(settled, self.weight, centred(self.weight)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """No optimizer keeps a copy's values centred."""
        super().__setstate__({name: value for name, value in state.items() if name != "projected"})  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)  # type: ignore[misc]
        if self.projected:
            self.take_over()


class CentralizedConv1d(Centralized, nn.Conv1d):
    """``nn.Conv1d`` with a centred weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, self.effective_weight(weight), bias)
        return y


class CentralizedConv2d(Centralized, nn.Conv2d):
    """``nn.Conv2d`` with a centred weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, self.effective_weight(weight), bias)
        return y


class CentralizedConv3d(Centralized, nn.Conv3d):
    """``nn.Conv3d`` with a centred weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, self.effective_weight(weight), bias)
        return y


class CentralizedLinear(Centralized, nn.Linear):
    """``nn.Linear`` with a centred weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centred weight."""
        if is_traced(input):
            return super().forward(input)
        return nn.functional.linear(input, self.effective_weight(self.weight), self.bias)


_TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CentralizedConv1d,
    nn.Conv2d: CentralizedConv2d,
    nn.Conv3d: CentralizedConv3d,
    nn.Linear: CentralizedLinear,
}
_ORIGINALS = {target: original for original, target in _TARGETS.items()}


def feeders(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[tuple[str, nn.Module, _BatchNorm]]:
    """What feeds each of ``layers``: the nearest layer registered before it that has as many outputs.

    Registration order is call order in the models of this field; blocks that register convolutions first and norms
    after them pair up differently, but to the same set.
    """
    wanted = {id(layer) for layer in layers}
    open_: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if underlying(module) in _TARGETS:
            open_.append((name, module))
        elif isinstance(module, _BatchNorm) and id(module) in wanted:
            fits = [each for each in open_ if _outputs(each[1]) == module.num_features]
            if fits:
                open_.remove(fits[-1])
                yield *fits[-1], module


def centralize(model: nn.Module, layers: Iterable[_BatchNorm], stock: Callable[[_BatchNorm], bool]) -> None:
    """Give the feeders of ``layers`` centred weights, by class swap: parameters and state_dict keys stay.

    ``stock`` tells whether a layer holds the running statistics of a stock model. It travels with copies and pickles,
    so it is a function of a module.

    Warns:
        UserWarning: naming feeders with a single weight per filter, which centring would zero; they are left alone.
    """
    left_alone = []
    for name, module, layer in list(feeders(model, layers)):
        if _inputs(module) == 1:
            left_alone.append(name)
        else:
            swap(module, _TARGETS[underlying(module)])
            # Not an attribute set the usual way: the norm must not become a child of what feeds it.
            module.__dict__["stock"] = partial(stock, layer)
    if left_alone:
        warnings.warn(
            f"distnorm: centring would zero the weights of {left_alone}, which have one weight per filter; they are "
            "left as they are.",
            stacklevel=4,
        )


def bake(model: nn.Module) -> None:
    """Write centred weights into the parameters."""
    for module in centralized(model):
        if not module.stock():
            module.project()


def release(model: nn.Module) -> None:
    """Give layers with centred weights their original classes back; the parameters stay as they are."""
    for module in centralized(model):
        del module.__dict__["stock"]
        module.__dict__.pop("projected", None)
        swap(module, _ORIGINALS[underlying(module)])


def centralized(model: nn.Module) -> list[Any]:
    """The layers of ``model`` with centred weights."""
    return [module for module in model.modules() if isinstance(module, Centralized)]


def project_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
    """Use the projected form for the weights that ``optimizer`` steps, if it is SGD; None if it is not.

    Returns what goes back to the forward form.

    Clipping gradients by their norm sees the gradient before projection in this form, after it in the other.
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [module for module in centralized(model) if id(module.weight) in stepped]
    for layer in layers:
        layer.take_over()
        layer.projected = True

    def project(*_: Any) -> None:
        for layer in layers:
            layer.project()

    handle = optimizer.register_step_post_hook(project)

    def undo() -> None:
        handle.remove()
        for layer in layers:
            layer.projected = False

    return undo


def _outputs(module: nn.Module) -> int:
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def _inputs(module: nn.Module) -> int:
    """Weights per filter. Not from the weight: ``deepspeed.zero.Init`` leaves an empty one in place of it."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return module.in_channels // module.groups * math.prod(module.kernel_size)
