"""Convert models just before a framework wraps them, for all frameworks."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from distnorm.integrations.import_hook import when_imported
from distnorm.integrations.job import Job, WatchedSettings
from distnorm.integrations.patching import after_init, before_init
from distnorm.settings import Settings


def install(settings: Settings | None) -> Job:
    """Convert every model of this process just before it is wrapped, from now on. Issues no collective.

    Args:
        settings: None if no source sets anything; then the section in DeepSpeed's JSON is used, else ``sync_bn``.

    Returns:
        The job, which reports on rank 0 when the process ends. Set its ``failed`` if the script fails.
    """
    job = Job(settings or Settings())
    job.watch()

    def deepspeed(module: Any) -> None:
        from distnorm.integrations.deepspeed import wrap_initialize

        watched = WatchedSettings.of_job(job, follow=False)
        wrap_initialize(module, settings and watched, default=watched)

    def accelerate(module: Any) -> None:
        from distnorm.integrations.accelerate import keep_state

        after_init(module.Accelerator, keep_state)

    def fsdp(module: Any) -> None:
        from distnorm.integrations.fsdp import wrap_fully_shard

        wrap_fully_shard(WatchedSettings.of_job(job, follow=True))
        before_init(module.FullyShardedDataParallel, "module", job.convert_before_sharding)

    before_init(DistributedDataParallel, "module", job.convert_before_ddp)
    when_imported("deepspeed", deepspeed)
    when_imported("accelerate", accelerate)
    when_imported("torch.distributed.fsdp", fsdp)
    return job
