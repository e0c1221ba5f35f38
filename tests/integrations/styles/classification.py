"""Classify a folder of pictures, as scripts around torchvision do: one process per device, an average of the weights.

torchrun --nproc_per_node 2 classification.py --data-path FOLDER --model resnet18 --model-ema
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms


class MovingAverage(torch.optim.swa_utils.AveragedModel):
    """Exponential average of parameters and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = torch.optim.swa_utils.get_ema_avg_fn(decay)
        super().__init__(model, avg_fn=average, use_buffers=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--double", action="store_true", help="train in float64")
    return parser.parse_args()


def train_one_epoch(model, average, optimizer, loader, losses) -> None:
    model.train()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if average:
            average.update_parameters(model.module)
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(total.item())


@torch.no_grad()
def evaluate(model, loader) -> float:
    model.eval()
    found = [nn.functional.cross_entropy(model(images), labels, reduction="sum") for images, labels in loader]
    return sum(found).item() / len(loader.dataset)


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    torch.manual_seed(0)
    steps = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.get_default_dtype())]
    to_tensor = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.25] * 3)])
    data = torchvision.datasets.ImageFolder(args.data_path, to_tensor)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=len(data.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    bare, model = model, nn.parallel.DistributedDataParallel(model)
    average = MovingAverage(bare, 0.5) if args.model_ema else None
    losses: list[float] = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        train_one_epoch(model, average, optimizer, loader, losses)
        schedule.step()
    ends = [evaluate(each, DataLoader(data, 16)) for each in (model, average) if each]
    if dist.get_rank() == 0:
        print("RESULT", json.dumps({"world_size": dist.get_world_size(), "losses": losses + ends}), flush=True)
        state = {"model": bare.state_dict(), "optimizer": optimizer.state_dict(), "epoch": args.epochs}
        torch.save(state, os.path.join(args.data_path, os.pardir, "checkpoint.pth"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse())
