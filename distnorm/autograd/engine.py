"""The state of the autograd engine: whether a backward pass runs, whether a forward is repeated, when the pass ends.

The only user of torch's private graph-task id, forward-gradient mode, ``queue_callback``, the ``apply`` that
``Function.apply`` wraps, and the two functions that call the engine and a Function's backward (torch 2.13; see
tests/test_private_apis.py). FSDP2 relies on the same callback. It runs after the last gradient of the pass and needs no
hook on a root module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

NO_BACKWARD = -1
ValueT = TypeVar("ValueT")

_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_FUNCTION = BackwardCFunction.apply.__code__


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the backward pass that this thread runs, or ``NO_BACKWARD`` outside of one."""


# docs/decisions.md#how-a-recomputation-is-recognized
def repeating() -> bool:
    """Return whether the current forward repeats an earlier one to compute its gradients.

    Checkpoints do this inside a Function's backward (``torch.utils.checkpoint`` if reentrant, and others), or when a
    saved tensor is unpacked. A forward that a hook of the backward pass runs is a new one. The call stack distinguishes
    them, since the values may be equal. Unpacking is recognized by the function's name, which must contain "unpack".
    """
    return graph_task() != NO_BACKWARD and any(
        code is _FUNCTION or "unpack" in code.co_name for code in _called_by_engine()
    )


def _called_by_engine() -> Iterator[CodeType]:
    """Yield the code of the calls within this thread's innermost backward pass, the last call first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        yield frame.f_code
        frame = frame.f_back


# docs/decisions.md#forward-passes-without-gradients
def backward_may_follow() -> bool:
    """Return whether a backward pass may follow the current forward.

    This is so if gradients are enabled, or in the first forward of a reentrant checkpoint. The latter runs inside an
    autograd Function, which, unlike ``no_grad``, disables forward-mode gradients too.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once when the backward pass that this thread is in has finished."""
    Variable._execution_engine.queue_callback(callback)


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without torch's search of each input for transforms, for inputs without any."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


class Deferred(Generic[ValueT]):
    """A value that one node of the graph defers to another node, which runs later in the same backward pass.

    A pass for some of the gradients may never reach the other node. A later pass does not get the value.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._deferred: tuple[int, Callable[[], ValueT]] | None = None

    def defer(self, value: Callable[[], ValueT]) -> None:
        """Store ``value``, a function that computes the value, for this backward pass."""
        self._deferred = graph_task(), value

    def take(self) -> Callable[[], ValueT] | None:
        """Return what this backward pass has stored, and remove it."""
        deferred, self._deferred = self._deferred, None
        return None if deferred is None or deferred[0] != graph_task() else deferred[1]
