"""What would be saved if a residual block's last norm and its shortcut's norm shared one collective.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/joint.py``, or with a delay between ranks by
``benchmarks/hosts.py``. The statistics of the two are ready together. Joint, they are one norm of twice the channels
over the concatenated outputs of the two convolutions. The same pair under ``local_bn`` tells what the concatenation
costs by itself; a layer that shared without it would save what the exposed times differ by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from measure import difference, finish, markdown, milliseconds, parser_of, ratio, rounds
from models import IMAGE, MODELS, Residual
from torch import Tensor, nn
from torch.nn import functional
from training import stepper

import distnorm
from distnorm.diagnostics.bench_statistics import interval


class Joint(nn.Module):
    """A downsampling block whose branch and shortcut end in one norm."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        assert isinstance(block.shortcut, nn.Sequential)
        convolution, norm = block.shortcut
        assert isinstance(norm, nn.BatchNorm2d)
        self.norm = nn.BatchNorm2d(2 * norm.num_features)
        setattr(block, block.last, nn.Identity())
        block.shortcut = convolution
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        both = self.norm(torch.cat((self.block.branch(x), self.block.shortcut(x)), 1))
        branch, shortcut = both.chunk(2, 1)
        return functional.relu(branch + shortcut)


def joined(model: nn.Sequential) -> nn.Sequential:
    """Give every downsampling block of ``model``, whose norms are fresh, a single norm at its end."""
    for index, child in enumerate(model):
        if isinstance(child, Residual) and isinstance(child.shortcut, nn.Sequential):
            model[index] = Joint(child)
    return model


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per model and network."""
    rows = []
    for result in results:
        ms, counts = result["ms"], result["collectives"]
        delay = f"{result.get('delay_ms') or 0:g}"
        where = [result["model"], str(result["width"]), str(result["batch"]), str(result["ranks"]), delay]
        exposed = {each: difference(ms[f"sync_bn, {each}"], ms[f"local_bn, {each}"]) for each in ("separate", "joint")}
        saved = interval(difference(exposed["separate"], exposed["joint"]))
        cat = interval(difference(ms["local_bn, joint"], ms["local_bn, separate"]))
        cells = [milliseconds(ms["sync_bn, separate"]), *(milliseconds(each) for each in exposed.values())]
        cells += [*map(one_digit, (saved, cat)), str(ratio(ms["sync_bn, joint"], ms["sync_bn, separate"]))]
        rows.append([*where, f"{counts['separate']} → {counts['joint']}", *cells])
    titles = ["model", "width", "batch", "ranks", "delay, ms", "collectives", "step, ms", "exposed, ms", "joint, ms"]
    return markdown([*titles, "saved, ms", "concatenation, ms", "step, joint over separate"], rows)


def one_digit(value: Any) -> str:
    """An interval of milliseconds."""
    return f"{value.median:.1f} [{value.low:.1f}, {value.high:.1f}]"


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time blocks with joint norms beside blocks with separate ones.", runs=20)
    parser.add_argument("--model", choices=list(MODELS), default="resnet18")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps: dict[str, Callable[[], float]] = {}
    collectives = {}
    for recipe in ("local_bn", "sync_bn"):
        for form in ("separate", "joint"):
            model = MODELS[options.model](options.width)
            model = distnorm.convert(joined(model) if form == "joint" else model, recipe)
            step = stepper(model, (options.batch, 3, IMAGE, IMAGE))
            with distnorm.Ledger(model) as ledger:
                step()
            steps[f"{recipe}, {form}"] = step
            collectives[form] = ledger.collectives
    names = ("model", "width", "batch")
    result = {"ranks": dist.get_world_size(), **{name: getattr(options, name) for name in names}}
    result |= {"collectives": collectives, "ms": rounds(steps, options)}
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
