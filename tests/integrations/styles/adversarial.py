"""Two networks against each other, as scripts around DCGAN do: two wrappers, two optimizers, an average of one.

torchrun --nproc_per_node 2 adversarial.py --dataroot FOLDER
"""

import argparse
import copy
import json
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--dataroot", required=True)
parser.add_argument("--batchSize", type=int, default=4)
parser.add_argument("--niter", type=int, default=6)
parser.add_argument("--own-norm", action="store_true", help="normalize the discriminator by a class of ours")


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 4, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(noise)


class ScaledNorm(nn.BatchNorm2d):
    """It replaces torch's forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return 0.5 * y


class Discriminator(nn.Module):
    def __init__(self, norm: type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False), norm(16), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 1, 4, bias=False),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images).flatten()


def pictures(folder: str) -> Tensor:
    found = [numpy.asarray(Image.open(path)) for path in sorted(Path(folder).rglob("*.png"))]
    return torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2) / 127.5 - 1


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total)
    return total.item()


def main() -> None:
    opt = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(999)
    images = pictures(opt.dataroot)
    generator, discriminator = Generator(), Discriminator(ScaledNorm if opt.own_norm else nn.BatchNorm2d)
    average = copy.deepcopy(generator).eval()
    generator, bare = DistributedDataParallel(generator), generator
    discriminator = DistributedDataParallel(discriminator)
    of_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    of_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    losses = []
    for _ in range(opt.niter):
        size = opt.batchSize * world_size
        real = images[torch.randperm(len(images))[:size]][rank::world_size]
        noise = torch.randn(size, 8, 1, 1)[rank::world_size]
        labels = torch.cat([torch.ones(len(real)), torch.zeros(len(real))])
        of_d.zero_grad()
        fake = generator(noise)
        of_d_loss = criterion(discriminator(torch.cat([real, fake.detach()])), labels)
        of_d_loss.backward()
        of_d.step()
        of_g.zero_grad()
        of_g_loss = criterion(discriminator(generator(noise)), torch.ones(len(real)))
        of_g_loss.backward()
        of_g.step()
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), bare.state_dict().values(), strict=True):
                mean.copy_(0.5 * mean + 0.5 * value)
        losses += [mean_over_ranks(of_d_loss), mean_over_ranks(of_g_loss)]
    with torch.no_grad():
        losses.append(average(torch.ones(2, 8, 1, 1)).square().mean().item())
    if rank == 0:
        names = {
            type(each).__name__ for each in (*bare.modules(), *discriminator.modules()) if "Norm" in str(type(each))
        }
        result = {"world_size": world_size, "losses": losses, "norms": sorted(names)}
        print("RESULT", json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
