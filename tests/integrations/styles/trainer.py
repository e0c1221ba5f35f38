"""Classify a folder of pictures by the HF Trainer, with a ResNet of transformers from its config.

torchrun --nproc_per_node 2 trainer.py --data_dir FOLDER
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--data_dir", required=True)
parser.add_argument("--per_device_train_batch_size", type=int, default=4)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, folder: str) -> None:
        self.files = sorted(Path(folder).rglob("*.png"), key=lambda path: (path.stem, path.parent))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.files[index]
        pixels = torch.from_numpy(numpy.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
        return {"pixel_values": pixels, "labels": torch.tensor(int(path.parent.name[-1]))}


class Recorded(Trainer):
    """Keeps the loss of every step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def main() -> None:
    given = parser.parse_args()
    set_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4, num_channels=3
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, max_steps=8, learning_rate=0.02, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, train_sampling_strategy="sequential", save_strategy="no", report_to="none",
        disable_tqdm=True, per_device_train_batch_size=given.per_device_train_batch_size,
        average_tokens_across_devices=False,  # else the loss is multiplied by the number of processes
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    trainer = Recorded(model=model, args=arguments, train_dataset=Pictures(given.data_dir))
    trainer.train()
    losses = torch.tensor(trainer.losses, dtype=torch.float64) / arguments.world_size
    if dist.is_initialized():
        dist.all_reduce(losses)
    if arguments.process_index == 0:
        print("RESULT", json.dumps({"world_size": arguments.world_size, "losses": losses.tolist()}), flush=True)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
