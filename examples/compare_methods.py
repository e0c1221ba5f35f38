"""Train the digits network with every normalization method there is, and compare them in a table and a picture.

Start one process per rank; two CPU cores are enough:

    torchrun --standalone --nproc_per_node 2 examples/compare_methods.py --quick

``--quick`` trains every contender once, for one epoch: it shows that all of them run, not which is best.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, median

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from digits_report import Run, format_table
from train_digits import STOCK, staleness, train_all

CONTENDERS = (
    STOCK,
    "local_bn",
    "sync_bn",
    "sync_bn(weights='centralized')",
    "sync_bn(weights='standardized')",
    "sync_bn(weights='normalized')",
    "group_bn(size=2)",
    "hierarchical_bn",
    "periodic_bn",
    "mabn",
    "hierarchical_mabn",
    "lazy_bn",
    "gbn(deviation='mad')",
    "gbn(deviation='l1')",
    "gbn(deviation='range')",
    "gbn(deviation='worst_case')",
    "gbn(deviation='sqd')",
    "gbn(deviation='semideviation')",
    "gbn(deviation='sqd', policy='moving')",
    "iebn",
    "iebn(policy='moving')",
    "mixture_norm",
    "mixture_norm(policy='moving')",
    "layer_norm",
    "group_norm",
    "group_norm(weights='standardized')",
    "instance_norm",
)


def main() -> None:
    """Train all contenders; rank 0 reports."""
    options = parse_options()
    torch.set_num_threads(1)  # the ranks share the cores, and the images are tiny
    dist.init_process_group("gloo")
    try:
        seeds, epochs = ([0], 1) if options.quick else (options.seeds, options.epochs)
        runs = train_all(options.recipes, seeds, epochs, options.batch_size)
        if dist.get_rank() == 0:
            print(format_table(runs, {recipe: staleness(recipe) for recipe in options.recipes}))
            draw(runs, options.output)
            print(f"\nAccuracy against time per step: {options.output}")
        dist.barrier()  # rank 0 reports alone, and a rank that left could end while gloo still tidies up
    finally:
        dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare all normalization methods on handwritten digits.")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank and step")
    parser.add_argument("--output", type=Path, default=Path("compare_methods.png"))
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start me with torchrun, one process per rank.")
    return options


def draw(runs: list[Run], path: Path) -> None:
    """Write a picture of one point per contender: final accuracy, mean over seeds, against the median step."""
    mpl.use("Agg")  # needs no display
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for recipe in dict.fromkeys(run.recipe for run in runs):
        group = [run for run in runs if run.recipe == recipe]
        milliseconds = 1000 * median(second for run in group for second in run.step_seconds)
        accuracy = fmean(run.curve[-1] for run in group)
        axes.plot(milliseconds, accuracy, "o", color="tab:blue", markersize=4)
        axes.annotate(recipe, (milliseconds, accuracy), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.set(xlabel="step (ms)", ylabel="validation accuracy (%)", title="Every method on the digits of the demo")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
