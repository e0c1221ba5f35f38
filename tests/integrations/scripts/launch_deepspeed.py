"""A DeepSpeed training script by accelerate, for CPU; it knows nothing of distnorm. Argument: a folder for reports."""

import json
import sys
from pathlib import Path

import deepspeed.ops
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # deepspeed 0.19.8 would compile it for 88 s

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
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
    "kind": accelerator.distributed_type.value,
    "zero_stage": accelerator.state.deepspeed_plugin.zero_stage,
    "layer": type(norm).__name__,
    "running_mean": norm.running_mean.tolist(),
    "running_var": norm.running_var.tolist(),
}
(Path(sys.argv[1]) / f"{accelerator.process_index}.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()
accelerator.end_training()
