"""Lightning: ``Trainer(plugins=[DistNormSync("sync_bn")])`` converts before training and reverts after it.

The plugin adds its callback to the trainer. The only user of Lightning's private ``Trainer._checkpoint_connector``
(2.6; see tests/integrations/test_lightning.py): ddp restores a checkpoint before it calls the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import distnorm
from distnorm import recipes
from distnorm.attach import Attachment, check_state_dict
from distnorm.integrations.checkpoint import is_converted
from distnorm.recipe import Recipe
from distnorm.selection import Where

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
    from lightning.pytorch.plugins.layer_sync import LayerSync
    from lightning.pytorch.utilities import rank_zero_warn
except ModuleNotFoundError as error:
    raise ImportError("distnorm.integrations.lightning needs Lightning: pip install 'distnorm[lightning]'") from error

_SECTION = "distnorm"
"""The key of a checkpoint under which the state of moving statistics is stored."""


class DistNormSync(LayerSync):
    """A plugin that converts the model to ``recipe`` during ``Trainer.fit``.

    Lightning calls it in its ddp and fsdp strategies, before they wrap the model, and again when training ends.

    Args:
        recipe: a ``Recipe``, or the name of one, with its ``options``; as ``distnorm.convert``.
        where: which layers; as ``distnorm.convert``.
        options: options of a named recipe, such as ``size=4``.

    Raises:
        ValueError: an unknown recipe, option or value.

    Warns:
        UserWarning: at the process's first optimizer step, if no strategy has called the plugin by then.
    """

    def __init__(self, recipe: Recipe | str = "sync_bn", *, where: Where | None = None, **options: object) -> None:
        if options and not isinstance(recipe, str):
            raise ValueError(
                f"DistNormSync: options {sorted(options)} are allowed with the name of a recipe only; set them in "
                f"{recipe!r}."
            )
        self.recipe = recipes.build(recipe, **options) if isinstance(recipe, str) else recipe
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"DistNormSync(recipe={recipe!r}): need a Recipe or the name of one.")
        self.where = where
        # Most strategies ignore the plugin without an error.
        self._not_applied = register_optimizer_step_post_hook(self._warn)
        self._warned = False

    def _warn(self, *_: object) -> None:
        if self._warned:  # a hook cannot remove itself while torch iterates over the hooks
            return
        self._warned = True
        rank_zero_warn(
            f"An optimizer steps, and {self} has not been applied: only Lightning's ddp and fsdp strategies call it. "
            "Use one of them (strategy='ddp' works with one device too), or convert in the LightningModule's __init__, "
            "distnorm.convert(self, ...), and pass Trainer(callbacks=[DistNormCallback()])."
        )

    def __repr__(self) -> str:
        return f"DistNormSync({self.recipe.name or self.recipe})"

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert ``model`` in place, and add a ``DistNormCallback`` to the trainer. Issues no collective.

        Raises:
            ValueError: as ``distnorm.convert``.
        """
        assert isinstance(model, LightningModule)
        self._not_applied.remove()
        distnorm.convert(model, self.recipe, where=self.where)
        trainer = model.trainer
        attached = any(isinstance(each, DistNormCallback) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if is_converted(model) and not attached:
            callback = DistNormCallback()
            callback.on_load_checkpoint(trainer, model, trainer._checkpoint_connector._loaded_checkpoint)
            # First, so that running statistics are averaged before other callbacks save.
            trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Revert ``model`` to stock layers, in place. Issues no collective."""
        return distnorm.revert(model)


class DistNormCallback(Callback):
    """Connects converted layers to Lightning's training loop.

    ``DistNormSync`` adds it. For models that convert themselves, pass ``Trainer(callbacks=[DistNormCallback()])``.

    * Steps of moving statistics end when an optimizer steps, also with gradient accumulation and in manual
      optimization. The loss scale of float16 is passed on.
    * Checkpoints hold the state of moving statistics of every rank. ``fit(ckpt_path=...)`` continues bit for bit.
    * Running statistics that differ between ranks (``local_bn``, ``group_bn``) are averaged before each validation and
      when training ends.

    Warns:
        UserWarning: the model has no converted layer when training starts.
    """

    def __init__(self) -> None:
        self._attachments: list[Attachment] = []
        self._resumed: Mapping[str, Any] | None = None
        self._last: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of earlier runs."""
        self._resumed = None
        if stage == "fit":
            self._last = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Keep the section of the checkpoint until training starts, since layers may not be converted yet."""
        self._resumed = checkpoint.get(_SECTION)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume moving statistics, bind to the ranks, and let optimizers end the steps. Collective."""
        if not is_converted(pl_module):
            rank_zero_warn(
                f"DistNormCallback: {type(pl_module).__name__} has no converted layer. Only Lightning's ddp and fsdp "
                f"strategies call DistNormSync; the strategy is {type(trainer.strategy).__name__}. With another one, "
                "convert in the LightningModule's __init__: distnorm.convert(self, ...)."
            )
            return
        if self._resumed is not None:
            _resume(pl_module, self._resumed, trainer.global_rank, trainer.world_size)
            self._resumed = None
        scale = _loss_scale(trainer)
        self._attachments = [
            distnorm.attach(pl_module, optimizer=optimizer, loss_scale=scale) for optimizer in trainer.optimizers
        ]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average running statistics, so that all ranks validate one model. Collective if they differ between ranks."""
        if not trainer.sanity_checking and is_converted(pl_module):
            distnorm.sync_running_stats(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average running statistics, and keep the state for a checkpoint after ``fit``. Collective likewise."""
        if is_converted(pl_module):
            distnorm.sync_running_stats(pl_module)
            self._last = _own_state(pl_module)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the optimizers."""
        self._detach()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every rank's state to the checkpoint that rank 0 writes. Collective, as saving is in Lightning."""
        state = _own_state(pl_module) if is_converted(pl_module) else self._last
        if state is not None:
            checkpoint[_SECTION] = _join(state)

    def _detach(self) -> None:
        for attachment in self._attachments:
            attachment.remove()
        self._attachments.clear()


def _loss_scale(trainer: Trainer) -> Callable[[], Tensor | float] | None:
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision | FSDPPrecision) and precision.scaler is not None:
        return precision.scaler.get_scale
    return None


def _own_state(model: nn.Module) -> dict[str, Any]:
    """Return this rank's state, on the CPU."""
    state = distnorm.state_dict(model)
    leaves = {path: leaf.cpu() for path, leaf in _leaves(state).items() if isinstance(leaf, Tensor)}
    return {"state": _with_leaves(state, leaves)}


def _join(own: dict[str, Any]) -> dict[str, Any]:
    """Return rank 0's state and the few leaves that differ on each other rank; complete on rank 0 only."""
    if not (dist.is_available() and dist.is_initialized()):
        return {**own, "differences": [{}]}
    first = [own["state"]]
    dist.broadcast_object_list(first, src=0)
    theirs = _leaves(first[0])
    mine = {path: leaf for path, leaf in _leaves(own["state"]).items() if not _equal(leaf, theirs[path])}
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    return {**own, "differences": gathered}


def _resume(model: nn.Module, section: Mapping[str, Any], rank: int, world_size: int) -> None:
    if not {"state", "differences"} <= section.keys():
        raise ValueError(
            f'distnorm: section "{_SECTION}" of the checkpoint has keys {sorted(section)}, so DistNormCallback did not '
            "write it. Remove the section from the checkpoint to start cold."
        )
    differences = section["differences"]
    # At another world size, use rank 0's state; load_state_dict logs that.
    mine = differences[rank] if len(differences) == world_size else {}
    state = _with_leaves(section["state"], mine)
    try:
        check_state_dict(model, state)
    except ValueError as error:  # on all ranks, since they read one file
        rank_zero_warn(f"{error} The checkpoint's moving statistics are ignored.")
        return
    distnorm.load_state_dict(model, state)


def _branches(tree: object, path: str) -> Iterable[tuple[Any, object, str]] | None:
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [(key, branch, f"{path}/{key}") for key, branch in pairs]
    return None


def _leaves(tree: object, path: str = "") -> dict[str, Any]:
    branches = _branches(tree, path)
    if branches is None:
        return {path: tree}
    return {key: leaf for _, branch, at in branches for key, leaf in _leaves(branch, at).items()}


def _with_leaves(tree: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """Return ``tree`` with the leaves in ``leaves`` replaced."""
    branches = _branches(tree, path)
    if branches is None:
        return leaves.get(path, tree)
    replaced = {key: _with_leaves(branch, leaves, at) for key, branch, at in branches}
    return replaced if isinstance(tree, dict) else list(replaced.values())


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one == other
