"""HF Trainer: ``Trainer(..., callbacks=[DistNormCallback("mabn")])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from distnorm.attach import Attachment
from distnorm.integrations import checkpoint, deepspeed
from distnorm.recipe import Recipe
from distnorm.selection import Where

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, DistributedType
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        "distnorm.integrations.transformers needs transformers and accelerate: pip install 'distnorm[transformers]'"
    ) from error

from distnorm.integrations.accelerate import DistNormPlugin, attach_prepared


class DistNormCallback(TrainerCallback):
    """Converts the model of a ``Trainer`` to ``recipe``; it stays converted after training.

    Optimizer steps end the steps of moving statistics, and the loss scale of fp16 is passed on. Checkpoints get a file
    per rank, so that ``train(resume_from_checkpoint=...)`` continues bit for bit. The files are read from
    ``args.resume_from_checkpoint`` if that is set, else from ``args.output_dir``, since the Trainer does not pass
    ``train``'s argument to callbacks.

    Args:
        recipe: a ``Recipe``, or the name of one, with its ``options``; as ``distnorm.convert``. None converts nothing,
            for a model that the script or ``distnorm.run`` converts, and only connects steps and checkpoints.
        where: which layers; as ``distnorm.convert``.
        options: options of a named recipe, such as ``size=4``, and other arguments of ``distnorm.convert``.

    Raises:
        ValueError: an unknown recipe, option or value.
    """

    def __init__(self, recipe: Recipe | str | None = "sync_bn", *, where: Where | None = None, **options: Any) -> None:
        self._plugin = None if recipe is None else DistNormPlugin(recipe, where=where, **options)
        self._attachment: Attachment | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Convert the model, which is not wrapped yet. Issues no collective.

        Raises:
            ValueError: as ``distnorm.convert``.
        """
        self._convert(objects["model"])
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            deepspeed.enable()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Attach the model to its optimizer; when resuming, load this rank's state. Collective, as ``distnorm.attach``.

        Raises:
            RuntimeError, ValueError: as ``distnorm.convert`` and ``distnorm.attach``.
        """
        model, optimizer = objects["model"], objects["optimizer"]
        self._convert(model)  # again: Trainer(model_init=...) has built another one, or add_callback came too late
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if type(optimizer) is not AcceleratedOptimizer or not checkpoint.is_converted(model):
            return  # the engine of DeepSpeed ends steps and saves the state
        self._attachment = attach_prepared(model, optimizer)
        if state.global_step > 0:
            checkpoint.load([model], args.resume_from_checkpoint or _folder(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Write this rank's state into the checkpoint. Issues no collective."""
        if self._attachment is not None:
            checkpoint.save([objects["model"]], _folder(args, state))

    def _convert(self, model: nn.Module) -> None:
        if self._plugin is not None:
            self._plugin.convert(model)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
