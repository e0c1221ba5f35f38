"""Accelerate with synchronized statistics.

ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/accelerate_plugin.py sync_bn
"""

import sys

import torch
from accelerate import Accelerator
from task import GLOBAL_BATCH, LEARNING_RATE, build_model, report, train_data
from torch.nn import functional
from torch.utils.data import DataLoader

from distnorm.integrations.accelerate import DistNormPlugin  # distnorm


def main(recipe: str = "sync_bn") -> None:
    """Train with ``recipe``, evaluate, report."""
    accelerator = Accelerator()
    DistNormPlugin(recipe).register(accelerator)  # distnorm
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(train_data(), batch_size=GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    report(model, losses)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
