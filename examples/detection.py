"""A detector's habits: one head over all levels of a pyramid, image sizes that differ, ranks without proposals.

torchrun --standalone --nproc_per_node 2 examples/detection.py [--engine fsdp2] [--recipe mabn]

Every rank runs every norm layer equally often, on empty batches too: a rank that skips one makes the others wait.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm


class Detector(nn.Module):
    """A stem, a dense head that all levels share, a box head over proposals, and a mask head for large images."""

    may_skip = True  # the mask head, which has no norm, on a rank with a small image: DDP bears it, FSDP2 does not

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.dense = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        self.box = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.mask = nn.Linear(8, 1)

    def forward(self, image: Tensor, proposals: Tensor) -> Tensor:
        """Sum of squared scores; ``proposals`` are positions in the flattened features, possibly none."""
        features, size = self.stem(image), image.shape[-1]
        scores = [self.dense(functional.avg_pool2d(features, 2**level)) for level in range(3)]
        rows = features.movedim(1, -1).flatten(0, 2)[proposals]
        scores += [self.box(rows)] + ([self.mask(rows) * (size > 16)] if size > 16 or not self.may_skip else [])
        return torch.stack([each.square().sum() for each in scores]).sum() / 1000


def sample(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Image sizes differ; every other step rank 1 has no proposals."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    size, proposals = 12 + 4 * ((step + rank) % 3), 0 if rank == 1 and step % 2 == 0 else 5 + rank
    image = torch.randn(1, 3, size, size, generator=generator) + rank
    return image, torch.randint(0, size * size, (proposals,), generator=generator)


def wrap(model: Detector, engine: str) -> nn.Module:
    """DistributedDataParallel, or FSDP2 of the heads and the whole."""
    if engine == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    model.may_skip = False
    for part in (model.dense, model.box, model):
        fully_shard(part)
    return model


def main(engine: str, recipe: str) -> None:
    """Train and report."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = wrap(distnorm.convert(Detector(), recipe), engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    distnorm.attach(model, optimizer=optimizer)  # an optimizer step is a step of moving statistics
    for step in range(12):
        loss = model(*sample(step, dist.get_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {dist.get_rank()}: loss {loss.item():.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--recipe", default="sync_bn")
    main(**vars(parser.parse_args()))
