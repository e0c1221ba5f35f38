"""Lightning's own demo model with a norm in it; Lightning starts the processes.

python lightning_demo.py --devices 2
"""

import argparse
import json

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--devices", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=4)


class Normalized(BoringModel):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        self.losses: list[Tensor] = []

    def train_dataloader(self) -> DataLoader:
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(64, 32)), self.batch_size, shuffle=False)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.layer(batch[0]).sub(1).square().mean()
        self.losses.append(self.all_gather(loss.detach()).mean())
        return loss


def main() -> None:
    given = parser.parse_args()
    seed_everything(0)
    model = Normalized(given.batch_size)
    trainer = Trainer(
        accelerator="cpu", devices=given.devices, strategy="ddp", max_epochs=1, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model)
    if trainer.global_rank == 0:
        losses = [each.item() for each in model.losses]
        print("RESULT", json.dumps({"world_size": trainer.world_size, "losses": losses}), flush=True)


if __name__ == "__main__":
    main()
