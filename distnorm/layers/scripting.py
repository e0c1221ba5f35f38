"""What torch.jit.script compiles of a layer: its evaluation, without anything of distnorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.methods import BatchNorm, ChannelAffine


class Scriptable(_BatchNorm):
    """A layer whose ``forward`` torch.jit.script cannot compile, since it takes ``*inputs``.

    Preparing it for torch.jit.script gives the instance another ``forward``, which does the same for one input.
    Returning another module instead would change the model: torch.jit.script puts that in the layer's place (torch
    2.13, ``call_prepare_scriptable_func``).
    """

    if TYPE_CHECKING:  # torch.jit.script would use the annotations of a class for its graph
        _site: Any

    # Hide from torch.jit.script what it cannot compile.
    __jit_ignored_attributes__ = ("_site", "epilogue")
    __jit_unused_properties__ = ["recipe", "_place"]  # noqa: RUF012
    __constants__ = [*_BatchNorm.__constants__, "_place"]  # noqa: RUF012

    @property
    def _place(self) -> str:
        """Return the layer's name in the model that was converted."""
        name: str = self._site.name
        return name

    def __prepare_scriptable__(self) -> Scriptable:
        method = self._site.conversion.recipe.method
        if self.training:
            raise RuntimeError(
                f"{self._place}: torch.jit.script cannot share statistics in training. Script the model in evaluation, "
                "model.eval(), or a stock one, distnorm.revert(model)."
            )
        if not isinstance(method, ChannelAffine):
            raise RuntimeError(
                f"{self._place}: torch.jit.script cannot compile {method}. Script distnorm.fold(model) or "
                "distnorm.revert(model) where these can replace it, or use torch.export on the model in eval()."
            )
        if self.running_mean is None and not isinstance(method, BatchNorm):
            raise RuntimeError(
                f"{self._place}: without running statistics torch.jit.script supports batch norm only; this is "
                f"{method}."
            )
        self.__dict__["forward"] = self._forward_one
        return self

    def forget_scripting(self) -> None:
        """Let the instance use the ``forward`` of its class again."""
        if getattr(self.__dict__.get("forward"), "__func__", None) is Scriptable._forward_one:
            del self.__dict__["forward"]

    def _forward_one(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        widen: bool | None = True,
        activation: str | None = None,
        parameter: float = 0.0,
    ) -> Tensor:
        if torch.jit.is_scripting():
            y_NCL = self._evaluate_scripted(input)
            if residual is not None:
                if widen is None:
                    y_NCL = residual.add_(y_NCL)
                else:
                    y_NCL = y_NCL + residual if widen else y_NCL.add_(residual)
            return activated(y_NCL, "relu" if relu else activation, parameter)
        else:
            return self._run_on(input, residual, relu, widen, activation, parameter)

    def _run_on(
        self,
        input: Tensor,
        residual: Tensor | None,
        relu: bool,
        widen: bool | None,
        activation: str | None,
        parameter: float,
    ) -> Tensor:
        """Run outside of the script, from now on with the forward of the class: fused code looks for another one."""
        self.forget_scripting()
        forward: Callable[..., Tensor] = self.forward
        return forward(input, residual=residual, relu=relu, widen=widen, activation=activation, parameter=parameter)

    def _evaluate_scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(f"{self._place}: scripted in evaluation, so it cannot train; call eval().")
        mean_C, var_C = self.running_mean, self.running_var
        dtype = input.dtype if mean_C is None else mean_C.dtype
        weight_C = None if self.weight is None else self.weight.to(dtype)
        bias_C = None if self.bias is None else self.bias.to(dtype)
        return F.batch_norm(input, mean_C, var_C, weight_C, bias_C, mean_C is None and var_C is None, 0.0, self.eps)


def activated(y_NCL: Tensor, name: str | None, parameter: float) -> Tensor:
    """Apply the activation of this ``name`` in ``kernels/activations.py``, in code that torch.jit.script compiles."""
    if name is None:
        return y_NCL
    if name == "relu":
        return F.relu(y_NCL)
    if name == "relu6":
        return F.relu6(y_NCL)
    if name == "leaky_relu":
        return F.leaky_relu(y_NCL, parameter)
    if name == "elu":
        return F.elu(y_NCL, parameter)
    if name == "sigmoid":
        return torch.sigmoid(y_NCL)
    if name == "silu":
        return F.silu(y_NCL)
    if name == "mish":
        return F.mish(y_NCL)
    if name == "gelu":
        return F.gelu(y_NCL)
    if name == "gelu_tanh":
        return F.gelu(y_NCL, approximate="tanh")
    if name == "hardsigmoid":
        return F.hardsigmoid(y_NCL)
    if name == "hardswish":
        return F.hardswish(y_NCL)
    raise ValueError(f"unknown activation {name}")
