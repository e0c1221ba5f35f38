"""Which dispatch modes and transforms are active: they decide whether kernels may access tensors by address.

The only user of torch's private counts of dispatch and function modes and of functorch levels, of the level of
forward-mode differentiation, of the tests for wrapped tensors and traces, of the hooks on all modules and on all saved
tensors, of the flag of ``torch.export``, and of the context managers that disable modes and transforms (torch 2.13; see
tests/test_private_apis.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Module, Parameter
from torch.nn.modules import module
from torch.utils._python_dispatch import _disable_current_modes

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transform_level = torch._C._functorch.maybe_current_level


# docs/decisions.md#transforms-see-only-what-is-not-shared
def in_transform() -> bool:
    """Return whether functorch, forward-mode differentiation or ``torch.jit.trace`` replaces or records tensors."""
    return _transform_level() is not None or forward_ad._current_level >= 0 or torch._C._is_tracing()


def exporting() -> bool:
    """Return whether ``torch.export`` runs. In torch 2.11, ``torch.compiler.is_exporting()`` is true in any graph."""
    return torch.compiler._is_exporting_flag


def has_dispatch_mode() -> bool:
    """Return whether a dispatch mode is active: fake tensors, selective checkpoints, tracing, counting."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_function_mode() -> bool:
    """Return whether a mode sees calls of torch's functions, with their arguments and results."""
    return torch._C._len_torch_function_stack() > 0


@contextmanager
def modes_disabled() -> Iterator[None]:
    """Disable modes and transforms in this context, for work that is not part of the model, on tensors that persist."""
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.inference_mode(False):
        yield


def is_batch(gradient: Tensor) -> bool:
    """Return whether ``gradient`` is a batch of gradients (``is_grads_batched``, ``vectorize``) in a backward pass."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


# docs/decisions.md#kernels-take-plain-tensors-only
def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether kernels may access ``tensors`` by address: plain strided tensors, and no mode or transform."""
    # The rest is in_transform(), without the call.
    if (
        has_dispatch_mode()
        or _transform_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    ):
        return False
    for each in tensors:
        # The memory of a negative view holds negated values. A tensor that a finished transform left is a wrapper.
        if each is not None and (
            type(each) not in _OWN or each.layout is not torch.strided or each.is_neg() or _is_wrapped(each)
        ):
            return False
    return True


def are_own(*values_C: Tensor | None) -> bool:
    """Return whether ``values_C``, parameters and buffers of a layer, are plain tensors. They are never views."""
    for each in values_C:
        if each is not None and type(each) not in _OWN:
            return False
    return True


# Subclasses may have no memory, or interpret it differently.
_OWN = frozenset((Tensor, Parameter))


_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

saved_tensors_hooks: Callable[[], _Hooks | None] = partial(torch._C._autograd._top_saved_tensors_default_hooks, False)
"""Returns the innermost pair of hooks on all saved tensors, as checkpoints and offloading have; None without."""


def is_fake(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a fake tensor, which has a shape but no values."""
    return isinstance(tensor, FakeTensor)


def is_unobserved(child: Module) -> bool:
    """Return whether calling ``child`` runs the forward of its class and no hook, of its own or of all modules."""
    own = child.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own:
        return False
    if own.get("_backward_pre_hooks") or module._global_forward_hooks or module._global_forward_pre_hooks:
        return False
    return not (module._global_backward_hooks or module._global_backward_pre_hooks)
