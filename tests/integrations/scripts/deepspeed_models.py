"""The model, the data and the engines of the DeepSpeed jobs; the tests import the first two for their references."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, PER_RANK = 20, 4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 4),
    )


def batch(step: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The joined batch of ``step``; rank r has its r-th piece of ``PER_RANK``."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(ranks * PER_RANK, 3, 6, 6, generator=generator) * 2 + 1
    return images, torch.randint(0, 4, (ranks * PER_RANK,), generator=generator)


def piece(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    images, labels = batch(step, ranks)
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    return images[mine], labels[mine]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running statistics and counters, by name."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def configuration(stage: int, recipe: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    section = {} if recipe is None else {"distnorm": recipe}
    return {
        "train_micro_batch_size_per_gpu": PER_RANK,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0,  # 1 by default
        **section,
        **extra,
    }
