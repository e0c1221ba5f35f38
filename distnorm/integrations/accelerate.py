"""Accelerate: ``DistNormPlugin("mabn").register(accelerator)``, and ``accelerator.prepare`` converts models.

The only user of Accelerate's private lists of prepared objects, ``_models`` and ``_optimizers`` (1.15; see
tests/integrations/test_accelerate.py). Its checkpoint hooks receive the models too, but not those of FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from distnorm.attach import Attachment, attach, conversions_of, is_converted_by_call
from distnorm.convert import convert
from distnorm.integrations import checkpoint, deepspeed
from distnorm.recipe import Recipe
from distnorm.selection import Where

try:
    from accelerate import Accelerator, DistributedType
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as error:
    raise ImportError(
        "distnorm.integrations.accelerate needs Accelerate: pip install 'distnorm[accelerate]'"
    ) from error


class DistNormPlugin:
    """Converts every model that an ``Accelerator`` prepares to ``recipe``.

    Example::

        accelerator = Accelerator(gradient_accumulation_steps=2)
        DistNormPlugin("mabn").register(accelerator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    Args:
        recipe: a ``Recipe``, or the name of one, with its ``options``; as ``distnorm.convert``.
        where: which layers; as ``distnorm.convert``.
        options: options of a named recipe, such as ``size=4``, and other arguments of ``distnorm.convert``.

    Raises:
        ValueError: an unknown recipe, option or value.
    """

    def __init__(self, recipe: Recipe | str = "sync_bn", *, where: Where | None = None, **options: Any) -> None:
        convert(nn.BatchNorm1d(1), recipe, **options)  # raises for wrong arguments here rather than in prepare
        self.recipe = recipe
        self.where = where
        self.options = options

    def register(self, accelerator: Accelerator) -> None:
        """Convert the models that ``accelerator`` prepares from now on, and connect their steps and checkpoints.

        Call it before ``prepare``. Models, optimizers and loaders may be prepared in any order, in one call or several.
        Models are converted before they are wrapped; ``keep_steps`` and ``keep_state`` do the rest.
        """
        for name in ("prepare", "prepare_model"):
            setattr(accelerator, name, _before(getattr(accelerator, name), self._convert_each))
        keep_steps(accelerator)
        keep_state(accelerator)

    def convert(self, model: nn.Module) -> None:
        """Convert ``model`` in place, unless it has converted layers. Issues no collective.

        Raises:
            ValueError: as ``distnorm.convert``.
        """
        if not is_converted_by_call(model):
            convert(model, self.recipe, where=self.where, **self.options)

    def _convert_each(self, *prepared: object, **_: object) -> None:
        for each in prepared:
            if isinstance(each, nn.Module):
                self.convert(each)


def keep_steps(accelerator: Accelerator) -> None:
    """Let optimizer steps end the steps of moving statistics in converted models that ``accelerator`` prepares.

    A model is attached to the first prepared optimizer that has one of its parameters, and to the loss scale of
    ``accelerator.scaler``. All backward passes before an optimizer step (``accelerator.accumulate``) belong to that
    step. A model that the script has attached to an optimizer is skipped. ``prepare`` becomes collective, since it
    binds models to their ranks. With DeepSpeed, ``distnorm.integrations.deepspeed`` does all this.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.enable()
        return
    attachments: dict[torch.optim.Optimizer, list[Attachment]] = {}

    def pair_up() -> None:
        optimizers = [each for each in accelerator._optimizers if type(each) is AcceleratedOptimizer]
        for gone in attachments.keys() - {each.optimizer for each in optimizers}:
            for attachment in attachments.pop(gone):
                attachment.remove()
        for model in accelerator._models:
            stepping = next((each for each in optimizers if _steps(each, model)), None)
            if stepping is not None and checkpoint.is_converted(model) and _ends_with_backward(model):
                attachments.setdefault(stepping.optimizer, []).append(attach_prepared(model, stepping))

    for name in ("prepare", "prepare_model", "prepare_optimizer", "free_memory"):
        setattr(accelerator, name, _after(getattr(accelerator, name), pair_up))


def attach_prepared(model: nn.Module, optimizer: AcceleratedOptimizer) -> Attachment:
    """Attach ``model`` to the optimizer that ``optimizer`` wraps, and to the loss scale of its scaler, if it has one.

    Collective over the ranks that share statistics.

    Raises:
        RuntimeError, ValueError: as ``distnorm.attach``.
    """
    scale = None if optimizer.scaler is None else optimizer.scaler.get_scale
    return attach(model, optimizer=optimizer.optimizer, loss_scale=scale)


def keep_state(accelerator: Accelerator) -> None:
    """Let ``save_state`` and ``load_state`` include the statistics of converted models, in a file per rank.

    With the same number of ranks, a resumed run continues bit for bit. With another number, windows start warm from
    rank 0's file. With DeepSpeed, the checkpoint of its engine holds them.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.register_save_state_pre_hook(lambda *given: checkpoint.save(accelerator._models, given[-1]))
        accelerator.register_load_state_pre_hook(lambda *given: checkpoint.load(accelerator._models, given[-1]))


def _steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in stepped for parameter in model.parameters())


def _ends_with_backward(model: nn.Module) -> bool:
    return all(conversion.ends_with_backward for conversion in conversions_of(model))


def _before(method: Callable[..., Any], act: Callable[..., None]) -> Callable[..., Any]:
    @wraps(method)
    def acting(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return method(*args, **kwargs)

    return acting


def _after(method: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    @wraps(method)
    def acting(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        act()
        return result

    return acting
