"""How far moving statistics, and gradients through them, are from exact ones while a network trains.

    torchrun --standalone --nproc_per_node 2 benchmarks/staleness.py --data photos.npz --contender mabn

The network and its training are those of ``quality_images.py``. At every so many steps an exact twin takes the same
weights and the same batch: the same method and weights axis, statistics of all ranks by a collective per layer. Per
layer, averaged over these steps after the warm-up:

* statistics: how far those in use are from those of the joined batch, as ``distnorm.stats`` says it;
* cosine and size: between the gradient of the convolution before the norm and the twin's, and the ratio of their norms;
* radial: the cosine between a filter's gradient and the filter, its root mean square. It is 0 where a norm takes the
  filter's scale out;
* log norm: of the filters at the end of training, and what it has grown by since the warm-up.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from measure import markdown
from pictures import Pictures, load_pictures
from quality import MOMENTUM
from quality_images import LAYERS, WEIGHT_DECAY, build_network
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import Recipe
from distnorm.integrations import mpi
from distnorm.methods import RMS
from distnorm.policies import AllReduce

COLUMNS = ("statistics", "cosine", "size", "radial", "log norm", "grown by")

Figures = dict[tuple[str, int], list[float]]


def main() -> None:
    """Train, look, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="as for quality_images.py")
    parser.add_argument("--contender", default="mabn", help="a recipe with moving statistics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps from one look to the next")
    parser.add_argument("--batch", type=int, default=2, help="images per rank and step")
    parser.add_argument("--rate", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group("gloo", timeout=timedelta(hours=1))
    try:
        watch(options, load_pictures(options.data, size=32, held_out=0.2))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def watch(options: argparse.Namespace, pictures: Pictures) -> None:
    """Train with the contender, and let rank 0 print a table."""
    recipe = distnorm.recipes.parse(options.contender)
    shape = pictures.train.images.shape[1], int(pictures.train.labels.max()) + 1
    network = distnorm.convert(build_network(options.seed, *shape), recipe)
    twin = distnorm.convert(build_network(options.seed, *shape), exact(recipe))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), options.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    found: Figures = defaultdict(list)
    for step, part in enumerate(drawn(options, len(pictures.train.labels))):
        images, labels = pictures.train.images[part], pictures.train.labels[part]
        due = step % options.every == options.every - 1 and step >= warmup_of(recipe)
        if due:
            twin.load_state_dict(network.state_dict())
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        if due:
            twin.zero_grad()
            functional.cross_entropy(twin(images), labels).backward()
            compare(network, twin, found)
        optimizer.step()
        schedule.step()
    if dist.get_rank() == 0:
        print("\n".join(table(found)))


def exact(recipe: Recipe) -> Recipe:
    """The same method and weights with statistics of all ranks; without a clip, which follows older ones."""
    method = RMS() if isinstance(recipe.method, RMS) else recipe.method
    return replace(recipe, method=method, policy=AllReduce(), name=None)


def warmup_of(recipe: Recipe) -> int:
    """Steps that the recipe shares exactly."""
    return int(getattr(recipe.policy, "steps", 0))


def drawn(options: argparse.Namespace, count: int) -> Iterator[Tensor]:
    """Indices of this rank's images, step by step; the same images for every contender."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        joined = torch.randint(count, (dist.get_world_size(), options.batch), generator=generator)
        yield joined[dist.get_rank()]


def compare(network: nn.Module, twin: nn.Module, found: Figures) -> None:
    """Add this step's figures of every layer. Collective: the twin's gradients are averaged over the ranks."""
    far = [value for name, value in distnorm.stats(network, exact=True).items() if name.endswith("/used_to_global")]
    for layer, (ours, theirs) in enumerate(zip(convolutions(network), convolutions(twin), strict=True)):
        gradient, reference = gradient_of(ours), gradient_of(theirs)
        dist.all_reduce(reference)
        reference /= dist.get_world_size()
        filters = ours.weight.detach().flatten(1)
        found["statistics", layer].append(far[layer])
        found["cosine", layer].append(float(functional.cosine_similarity(gradient, reference, dim=0)))
        found["size", layer].append(float(gradient.norm() / reference.norm()))
        along = functional.cosine_similarity(gradient.view_as(filters), filters, dim=1)
        found["radial", layer].append(float(along.square().mean().sqrt()))
        found["log norm", layer].append(float(filters.norm(dim=1).log().mean()))


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Those before norms, in the order of the norms."""
    return [each for each in network.modules() if isinstance(each, nn.Conv2d)]


def gradient_of(convolution: nn.Conv2d) -> Tensor:
    """A flat copy of its weight's gradient."""
    assert convolution.weight.grad is not None
    return convolution.weight.grad.flatten().clone()


def table(found: Mapping[tuple[str, int], Sequence[float]]) -> list[str]:
    """One row per layer: means over the steps that were looked at, the last log norm, and the last less the first."""
    rows = []
    for layer in range(len(LAYERS)):
        norms = found["log norm", layer]
        means = [fmean(found[name, layer]) for name in COLUMNS[:4]]
        rows.append([str(layer + 1), *(f"{value:.2f}" for value in (*means, norms[-1], norms[-1] - norms[0]))])
    return markdown(["layer", *COLUMNS], rows)


if __name__ == "__main__":
    main()
