"""The detector of ``detection.py`` under Lightning: several forwards of one head, sizes that differ, no proposals.

python examples/detection_lightning.py [--recipe mabn], which starts 2 processes, or under torchrun.
"""

import argparse

import torch
from detection import Detector, sample
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from distnorm.integrations.lightning import DistNormSync


class Detection(LightningModule):
    """The detector as any LightningModule: it does not know of distnorm."""

    def __init__(self, detector: Detector, steps: int) -> None:
        super().__init__()
        self.detector, self.steps, self.last_loss = detector, steps, 0.0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """One image a step and rank, as it is."""
        samples = [sample(step, self.trainer.global_rank) for step in range(self.steps)]
        return DataLoader(samples, batch_size=None)  # type: ignore[arg-type]  # a list will do

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Sum of squared scores."""
        loss: Tensor = self.detector(*batch)
        self.last_loss = loss.item()
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Plain SGD."""
        return SGD(self.parameters(), lr=0.05)


def fit(module: Detection, plugin: DistNormSync, **options: object) -> None:
    """Train with 2 processes; ``options`` are more of Trainer's."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_find_unused_parameters_true",  # a rank with a small image skips the mask head
        plugins=[plugin],
        max_epochs=1,
        use_distributed_sampler=False,  # ranks have samples of their own
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(module)


def main(recipe: str) -> None:
    """Train and report."""
    torch.manual_seed(0)
    module = Detection(Detector(), steps=12)
    fit(module, DistNormSync(recipe))
    print(f"rank {module.global_rank}: loss {module.last_loss:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="sync_bn")
    main(**vars(parser.parse_args()))
