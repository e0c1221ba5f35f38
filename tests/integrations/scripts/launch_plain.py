"""A plain accelerate training script that knows nothing of distnorm. ``--report FOLDER``: how each process ended."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--num_processes", type=int)  # the script's own, though launch has one of this name
parser.add_argument("--report", type=Path)
chosen = parser.parse_args()

accelerator = Accelerator()
torch.manual_seed(0)
images, classes = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(images, classes), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for inputs, targets in loader:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    accelerator.backward(loss)
    optimizer.step()

norm = accelerator.unwrap_model(model)[1]
report = {
    "processes": accelerator.num_processes,
    "rank": accelerator.process_index,
    "device": accelerator.device.type,
    "layer": type(norm).__name__,
    "weight": norm.weight.tolist(),
    "running_mean": norm.running_mean.tolist(),
    "running_var": norm.running_var.tolist(),
    "num_processes": chosen.num_processes,
}
if chosen.report is not None:
    (chosen.report / f"{accelerator.process_index}.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()
accelerator.end_training()
