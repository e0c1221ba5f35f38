"""Train the shared task under Lightning, with one line for distnorm.

``python examples/lightning_plugin.py --devices 2``: Lightning starts the processes itself. Under torchrun it joins
those that are there.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from task import GLOBAL_BATCH, LEARNING_RATE, build_model, report, train_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distnorm.integrations.lightning import DistNormSync


class Classifier(LightningModule):
    """The shared task's network, as any LightningModule: it does not know of distnorm."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_model()
        self.losses: list[float] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """This rank's part of every joined batch."""
        return train_loader(self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Mean cross entropy."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def main() -> None:
    """Train for 40 steps and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--recipe", default="sync_bn")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    arguments = parser.parse_args()
    if GLOBAL_BATCH % arguments.devices:
        parser.error(f"--devices must divide the batch of {GLOBAL_BATCH}")

    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp",
        precision=arguments.precision,
        plugins=[DistNormSync(arguments.recipe)],  # the one line
        max_epochs=1,
        use_distributed_sampler=False,  # train_loader splits the batches
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model)
    report(model.network, model.losses)  # stock layers again


if __name__ == "__main__":
    main()
