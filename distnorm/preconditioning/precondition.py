"""``precondition``: check what is given, meet the other ranks, and put the hooks in place."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.distributed as dist
from torch import nn

from distnorm.preconditioning import gradients, ranks
from distnorm.preconditioning.handle import Preconditioner, preconditioners_of
from distnorm.preconditioning.statistics import Statistics
from distnorm.preconditioning.targets import Target, select
from distnorm.selection import Where
from distnorm.validation import Momentum, Rule, check, hints_of, number

Damping = Annotated[float, number(0, 10**6)]
Eps = Annotated[float, Rule(lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a number above 0")]


def precondition(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    where: Where | None = None,
    process_group: dist.ProcessGroup | None = None,
    momentum: Momentum = 0.01,
    damping: Damping = 0.01,
    eps: Eps = 1e-4,
    scaling: bool = True,
) -> Preconditioner:
    """Precondition the gradients of linear layers and convolutions before each step of ``optimizer`` (BNP).

    Batch normalization preconditioning (Lange, Helfrich and Ye, 2022): no layer is normalized, but the gradient is the
    one that the layer would have if its input were normalized by its running mean and variance, in the layer's own
    parameters. Covers Linear and Conv1d/2d/3d with a bias, not transposed. docs/bnp.md has the equations, and says what
    is a reconstruction. Issues one asynchronous collective per step, of 2 values per input channel and 1 per layer.
    Call it after ``init_process_group``, on all ranks: it is collective over ``process_group``.

    Args:
        model: the model, wrapped in DistributedDataParallel or not. It is not changed.
        optimizer: steps parameters of the model, on gradients of the joined batch. Of a wrapper that holds another one
            as ``optimizer``, that one.
        where: which layers: a function of name and layer, or glob patterns of names. Leave out layers that a norm
            follows. None: all layers that can be preconditioned.
        process_group: the data-parallel ranks, if they are not the whole job.
        momentum: the newest step's weight in the running mean and variance, in (0, 1].
        damping: added to every variance, as a part of the largest variance of the layer's input.
        eps: added to every variance.
        scaling: divide the gradients of a layer by max(1, weights per output / values per channel in the step).

    Returns:
        A handle: ``remove()``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        RuntimeError: ranks precondition different layers, or do not answer within the job's timeout.
        ValueError: a value that is not allowed; no layer is left to precondition, or one is preconditioned already;
            an uninitialized lazy layer; or an optimizer that searches along the gradient (LBFGS).
    """
    options = {"momentum": momentum, "damping": damping, "eps": eps, "scaling": scaling}
    check("precondition", hints_of(precondition), {"model": model, "optimizer": optimizer, **options})
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped  # Accelerate's wrapper, for one, takes no hooks
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("precondition(optimizer=LBFGS): its line search needs true gradients. Use another optimizer.")
    targets, left_out = select(model, optimizer, where)
    for each in preconditioners_of(model):
        twice = sorted({*each.layers} & {target.name for target in targets})
        if twice:
            raise ValueError(f"{twice[0]}: preconditioned already. Call remove() on the handle of that call first.")
    group = ranks.join(process_group, [str(options), *map(str, targets)])
    device = targets[0].parameters[0].device
    statistics = Statistics([target.channels for target in targets], device, momentum)

    def condition(number: int, target: Target) -> None:
        weight, bias = (each.grad for each in target.parameters)
        if weight is not None and bias is not None:  # else frozen, or not used in this step
            moments = statistics.of(number)
            gradients.precondition_(weight, bias, moments, target.groups, damping, eps)
            if scaling:
                gradients.scale_(weight, bias, moments)

    return Preconditioner(targets, left_out, optimizer, group, statistics, condition)
