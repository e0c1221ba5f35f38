"""The task that all framework examples share: scikit-learn's digits, a small convolutional network, 40 steps.

The joined batch of step s is always samples ``s * GLOBAL_BATCH`` up to ``(s + 1) * GLOBAL_BATCH`` of ``train_data()``,
whose order is fixed; a rank takes ``GLOBAL_BATCH // world_size`` of them. Which ones does not matter, so any splitting
without shuffling will do: ``train_loader`` (contiguous pieces), a ``DistributedSampler(shuffle=False)`` (strided), or
what Accelerate and the HF Trainer do with ``train_data()``. A mean loss, gradients averaged over ranks, plain SGD at
``LEARNING_RATE`` and ``sync_bn`` then train as one process with stock batch norm does on the joined batch.
"""

import json

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

STEPS, GLOBAL_BATCH, LEARNING_RATE = 40, 8, 0.05


def train_data(first: int = 0, count: int = STEPS * GLOBAL_BATCH) -> TensorDataset:
    """Images (1 x 8 x 8) and labels in a fixed order, as many as the 40 steps consume."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[first : first + count]
    return TensorDataset(images[order].float().view(-1, 1, 8, 8) / 16, labels[order])


def train_loader(rank: int = 0, world_size: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    """This rank's part of every joined batch, for frameworks that leave the splitting to the script."""
    part = GLOBAL_BATCH // world_size
    mine = [step * GLOBAL_BATCH + rank * part + each for step in range(STEPS) for each in range(part)]
    return DataLoader(Subset(train_data(), mine), batch_size=part)


def build_model() -> nn.Sequential:
    """The network, with the same weights in every process."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))


def report(model: nn.Module, losses: list[float]) -> None:
    """Evaluate ``model`` (images to logits); rank 0 prints ``RESULT`` and one line of JSON. All ranks call it."""
    stats = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    mean_losses = torch.tensor(losses, dtype=torch.float64, device=stats[0].weight.device)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size > 1:
        dist.all_reduce(mean_losses)
        mean_losses /= world_size
    images, labels = train_data(STEPS * GLOBAL_BATCH, 1000).tensors
    with torch.no_grad():
        hits = model.eval()(images.to(mean_losses.device)).argmax(1).cpu() == labels
    result = {"world_size": world_size, "losses": mean_losses[:20].tolist(), "final_loss": mean_losses[-1].item()}
    result["accuracy"] = hits.double().mean().item()
    state = model.state_dict()  # with the statistics of the last step, which may still travel between the ranks
    for name in ("running_mean", "running_var"):
        result[name] = [value.double().sum().item() for key, value in state.items() if key.endswith(name)]
    if world_size == 1 or dist.get_rank() == 0:
        print("RESULT", json.dumps(result), flush=True)
