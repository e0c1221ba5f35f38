"""Where autograd's engine stands: inside a backward pass or not, repeating a forward or not, and when that pass ends.

The only user of torch's private graph-task id, forward-gradient mode, ``queue_callback``, of the ``apply`` below that
of Functions, and of the two functions through which the engine is called and calls a Function's backward (torch 2.13;
see tests/test_private_apis.py). FSDP2 relies on the same callback. It runs after the last gradient of the pass and
needs no hook on a root module.
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


def graph_task() -> int:
    """The number of the backward pass that this thread is in, or ``NO_BACKWARD`` outside of one."""
    task: int = torch._C._current_graph_task_id()
    return task


# docs/decisions.md#how-a-recomputation-is-recognized
def repeating() -> bool:
    """Whether a forward that runs now repeats an earlier one, for its gradients.

    Checkpoints do: inside of a Function's backward (``torch.utils.checkpoint`` if reentrant, and others), or where a
    saved tensor is unpacked. A forward that a hook of the backward pass runs is a new one. Told from the calls that led
    here, since values may be the same. An unpacking is known by its name, which must have "unpack" in it.
    """
    return torch._C._current_graph_task_id() != NO_BACKWARD and any(
        code is _FUNCTION or "unpack" in code.co_name for code in _called_by_engine()
    )


def _called_by_engine() -> Iterator[CodeType]:
    """What this thread's innermost backward pass has called, the last call first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        yield frame.f_code
        frame = frame.f_back


# docs/decisions.md#forward-passes-without-gradients
def backward_may_follow() -> bool:
    """Whether a backward pass may come for a forward that runs now.

    Gradients are on, or this is the first forward of a reentrant checkpoint: inside of an autograd Function, unlike
    under ``no_grad``, forward-mode gradients are off too.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once when the backward pass that this thread is in has finished."""
    Variable._execution_engine.queue_callback(callback)


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for inputs that no transform has, or had, to do with: torch looks at each of them for one."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


class Left(Generic[ValueT]):
    """What one node of the graph leaves for another, which runs later in the same backward pass.

    A pass for some gradients only may never come to the other node: what it left is not for a later pass.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._left: tuple[int, Callable[[], ValueT]] | None = None

    def leave(self, value: Callable[[], ValueT]) -> None:
        """Leave what computes a value, for this backward pass."""
        self._left = graph_task(), value

    def take(self) -> Callable[[], ValueT] | None:
        """What this backward pass has left, once."""
        left, self._left = self._left, None
        return None if left is None or left[0] != graph_task() else left[1]
