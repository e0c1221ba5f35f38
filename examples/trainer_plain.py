"""The HF Trainer and stock batch norm: a script that knows nothing of this package.

torchrun --standalone --nproc_per_node 2 examples/trainer_plain.py
"""

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from task import GLOBAL_BATCH, LEARNING_RATE, STEPS, build_model, report, train_data
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments


class Classifier(nn.Module):
    """What the Trainer asks of a model: a loss among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_model()
        self.losses: list[float] = []

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


def main() -> None:
    """Train, evaluate, report."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments.per_device_train_batch_size = GLOBAL_BATCH // arguments.world_size
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_data(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    report(model.network, model.losses)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """A batch by the names of ``forward``'s arguments."""
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


if __name__ == "__main__":
    main()
