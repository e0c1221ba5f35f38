"""The work of the run module in one process: convert models, follow optimizers, and report on rank 0."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, field, fields
from typing import Any, Self
from weakref import ReferenceType, WeakSet, ref

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distnorm import messages
from distnorm.attach import conversions_of
from distnorm.diagnostics import Ledger
from distnorm.integrations.copies import computes_as_stock, difference, stock_twins
from distnorm.integrations.loss_scales import LossScales
from distnorm.integrations.optimizers import Optimizers, in_use
from distnorm.integrations.patching import after_init
from distnorm.integrations.script_checkpoints import ScriptCheckpoints
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm
from distnorm.patterns import Unused
from distnorm.selection import norms
from distnorm.settings import Settings

_ONE_PROCESS = (
    "has 1 process, so there is nothing to synchronize. Start it with several: torchrun --nproc_per_node, mpirun -n, "
    "accelerate launch --num_processes. (On the CPU, accelerate starts 1 unless its config has MULTI_GPU with "
    "use_cpu: true and ACCELERATE_USE_CPU=true is set, or it has an mpirun_config.)"
)


class Job:
    """The converted models of this process, and whether the script failed."""

    def __init__(self, settings: Settings) -> None:
        """Start with no converted models."""
        self.settings = settings
        self.failed = False
        # Whether the script starts several processes. Any of them may wrap models, so none warns that it wrapped none.
        self.is_one_of_several = False
        self._process = os.getpid()
        self._rank = messages.rank_of(os.environ)
        self._warned = False  # that there is nothing to convert or to synchronize
        self._unused = Unused(settings.where)
        self._seen: set[str] = set()  # the classes of wrapped models with batch norm
        self._wrapped: WeakSet[nn.Module] = WeakSet()
        self._untried: list[ReferenceType[nn.Module]] = []  # converted models of which copies were not looked for
        self._any_conversion = False
        self._unannounced: list[tuple[str, list[Conversion]]] = []
        self._ledgers: list[tuple[str, list[Conversion], Ledger]] = []
        self.scales = LossScales()
        self.optimizers = Optimizers()
        self.checkpoints = ScriptCheckpoints() if settings.save_state else None

    def watch(self) -> None:
        """Record optimizers, gradient scalers and conversions from now on, and report when the process ends."""
        after_init(Conversion, self._note_conversion)
        self.scales.watch()
        self.optimizers.watch()
        if self.checkpoints is not None:
            self.checkpoints.watch()
        register_optimizer_step_pre_hook(lambda *_: self._before_step())
        atexit.register(self._report)

    def convert_before_ddp(self, model: nn.Module) -> None:
        """Convert ``model`` before DistributedDataParallel wraps it, unless it is converted. Issues no collective.

        Warns:
            UserWarning: on rank 0, if the model has no batch norm or cannot be converted; if the job has one process.
        """
        if not any(norms(model)):
            self._warned = True  # so that there is no second warning when the script ends
            messages.warn(f"distnorm.run: {type(model).__name__} has no batch norm layer to convert.")
        self.convert_before_sharding(model)
        self.announce()

    def convert_before_sharding(self, model: nn.Module) -> None:
        """Convert ``model`` before it is sharded. It may be part of a model, so no batch norm is no reason to warn.

        FSDP's class shards the whole first, then its parts: what was decided for the whole holds for them.
        """
        if any(part is model for whole in self._wrapped if whole is not model for part in whole.modules()):
            return
        if WatchedSettings.of_job(self, follow=True).convert(model):
            self._warn_if_alone()

    def note_wrapped(self, model: nn.Module) -> None:
        """Record that ``model`` is about to be wrapped, before any of it is converted."""
        self._wrapped.add(model)
        names = [name for name, _ in norms(model)]
        self._unused.note(model, names)
        self._seen |= {type(model).__name__} if names else set()

    def note(self, model: nn.Module, *, follow: bool) -> None:
        """Record the converted ``model``; if ``follow``, let its optimizers end steps."""
        self._rank = dist.get_rank() if dist.is_initialized() else self._rank
        conversions = conversions_of(model)  # several if layers have process groups
        has_epilogue = [layer.epilogue != "" for layer in model.modules() if isinstance(layer, DistNorm)]
        fused = f", {sum(has_epilogue)} of them fused with their epilogues" if self.settings.fuse else ""
        recipe = conversions[0].recipe.name or str(conversions[0].recipe)
        text = f"{type(model).__name__}: {len(has_epilogue)} layers converted to {recipe}{fused}"
        self._unannounced.append((text, conversions))
        self._untried.append(ref(model))
        for conversion in conversions:
            self.scales.connect(conversion)
        if follow:
            self.optimizers.follow(model, conversions)
        if self.settings.ledger:
            self._ledgers.append((type(model).__name__, conversions, Ledger(model).__enter__()))

    def announce(self) -> None:
        """Print new conversions, except those of parts that were undone when the whole model was converted."""
        for text, conversions in self._unannounced:
            if any(map(in_use, conversions)):
                self._say(text)
        self._unannounced.clear()

    def _before_step(self) -> None:
        self.announce()
        if self.checkpoints is not None:
            self.checkpoints.before_step()
        models = [model for reference in self._untried if (model := reference()) is not None]
        self._untried.clear()
        if models and self._is_first():
            self._tell_of_twins(models)

    def _tell_of_twins(self, models: list[nn.Module]) -> None:
        for model, count in stock_twins(models, self._wrapped):
            stay = f"{count} other {type(model).__name__} built alike {'keeps' if count == 1 else 'keep'} stock layers"
            why = difference(model)
            if why:
                messages.warn(
                    f"distnorm.run: {stay}. If it takes over weights of the wrapped one (EMA, teacher), it evaluates "
                    f"otherwise, since {why}. Make it from the wrapped one instead: copy.deepcopy(ddp.module)."
                )
                continue
            itself = "" if computes_as_stock(model) else ", but not with statistics that it computes itself (update_bn)"
            self._say(f"{stay}. With all values of the wrapped one (EMA, teacher) it evaluates alike{itself}.")

    def _note_conversion(self, _: Conversion) -> None:
        self._any_conversion = True

    def _warn_if_alone(self) -> None:
        policy = self.settings.build().policy
        synchronizes = policy.facts.communicates
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if synchronizes and alone and not self._warned:
            self._warned = True
            messages.warn(f"distnorm.run: this job {_ONE_PROCESS}")

    def _report(self) -> None:
        if os.getpid() != self._process:  # a forked process inherits atexit handlers
            return
        self.announce()
        if not (self.failed or self.is_one_of_several):
            self._warn_of_what_was_not_done()
        if self.checkpoints is not None and not self.failed:
            self.checkpoints.report()
        for name, conversions, ledger in self._ledgers:
            if ledger.collectives or any(map(in_use, conversions)):
                self._say(f"ledger of {name}\n{ledger}")

    def _warn_of_what_was_not_done(self) -> None:
        if self._seen and self._unused.texts():
            self._say(
                f"warning: the patterns {self._unused.texts()} selected no norm layer of any model that the script "
                f"wrapped: {', '.join(sorted(self._seen))}."
            )
        if not (self._any_conversion or self._warned or self._seen):
            alone = os.environ.get("WORLD_SIZE", "1") == "1" and "OMPI_COMM_WORLD_SIZE" not in os.environ
            self._say(
                "warning: nothing was converted. A model with batch norm is converted when it is wrapped in "
                "DistributedDataParallel, FSDP (fully_shard) or DeepSpeed, and this script wrapped none. Wrap the "
                f"model, or call distnorm.convert(model, {self.settings.recipe!r}) in the script."
                + (f" Also, this job {_ONE_PROCESS}" if alone else "")
            )

    def _say(self, text: str) -> None:
        if self._is_first():
            messages.say(f"distnorm.run: {text}")

    def _is_first(self) -> bool:
        """Return whether this is the first rank, also after the job's process group was destroyed."""
        return (dist.get_rank() if dist.is_initialized() else self._rank) == 0


@dataclass(frozen=True, kw_only=True)
class WatchedSettings(Settings):
    """Settings whose conversions are recorded in a job.

    Args:
        job: the job.
        follow: whether optimizer steps end the steps of the converted models; False if an engine does so.
    """

    job: Job = field(repr=False, compare=False)
    follow: bool = field(default=True, repr=False, compare=False)

    @classmethod
    def of_job(cls, job: Job, *, follow: bool) -> Self:
        """Return the settings of ``job``."""
        values: dict[str, Any] = {each.name: getattr(job.settings, each.name) for each in fields(Settings)}
        return cls(**values, job=job, follow=follow)

    def attempt(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> str | None:
        """Convert as ``Settings.attempt`` does, and record the model."""
        self.job.note_wrapped(model)
        reason = super().attempt(model, mesh=mesh)
        if reason is None:
            self.job.note(model, follow=self.follow)
        return reason
