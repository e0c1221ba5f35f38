"""Where autograd's engine stands: inside a backward pass or not, and when that pass ends.

The only user of torch's private graph-task id, forward-gradient mode and ``queue_callback`` (torch 2.13; see
tests/test_private_apis.py). FSDP2 relies on the same callback. It runs after the last gradient of the pass and needs no
hook on a root module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

NO_BACKWARD = -1


def graph_task() -> int:
    """The number of the backward pass that this thread is in, or ``NO_BACKWARD`` outside of one."""
    task: int = torch._C._current_graph_task_id()
    return task


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
