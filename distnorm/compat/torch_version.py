"""Check torch's version and its private attributes when the package is imported.

torch may change private attributes in any release. tests/test_private_apis.py pins what each of them does, and
``make test-torch VERSION=...`` runs the core tests with another torch.
"""

from __future__ import annotations

from functools import reduce

import torch

# docs/decisions.md#torch-211-or-newer
OLDEST = (2, 11)
"""As in pyproject.toml. In 2.8, compiled steps of moving statistics are wrong after the warm-up."""

NEWEST_TRIED = (2, 15)

PRIVATE = (
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._current_graph_task_id",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.maybe_current_level",
    "_C._is_fwd_grad_enabled",
    "_C._is_tracing",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "autograd.Variable._execution_engine.queue_callback",
    "autograd.forward_ad._current_level",
    "autograd.function.BackwardCFunction.apply",
    "autograd.graph._engine_run_backward",
    "compiler._is_exporting_flag",
    "nn.modules.batchnorm._BatchNorm._check_input_dim",
    "nn.parallel.DistributedDataParallel._active_ddp_module",
    "nn.parallel.DistributedDataParallel._assign_modules_buffers",
    "nn.parallel.DistributedDataParallel._run_ddp_forward",
)
PRIVATE_DISTRIBUTED = (
    "distributed.ProcessGroup._device_types",
    "distributed.ProcessGroup._get_backend",
    "distributed.ProcessGroup.bound_device_id",
    "distributed.distributed_c10d._get_default_store",
    "distributed.distributed_c10d._new_process_group_helper",
    "distributed.distributed_c10d._world",
    "distributed.distributed_c10d.default_pg_timeout",
)


def check_torch() -> None:
    """Raise if this torch is too old or lacks a private attribute.

    Raises:
        ImportError: the message names the version and the missing attributes.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    wanted = f"distnorm needs torch {_show(OLDEST)} or newer, and was tried up to {_show(NEWEST_TRIED)}"
    if found < OLDEST:
        raise ImportError(f"{wanted}; found {torch.__version__}. Run pip install 'torch>={_show(OLDEST)}'.")
    names = PRIVATE + (PRIVATE_DISTRIBUTED if torch.distributed.is_available() else ())
    missing = [f"torch.{name}" for name in names if not _has(name)]
    if missing:
        raise ImportError(
            f"{wanted}; found {torch.__version__}, which lacks {', '.join(missing)}. Run "
            f"pip install 'torch>={_show(OLDEST)},<={_show(NEWEST_TRIED)}', or a newer distnorm."
        )


def _has(name: str) -> bool:
    try:
        reduce(getattr, name.split("."), torch)
    except AttributeError:
        return False
    return True


def _show(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


check_torch()
