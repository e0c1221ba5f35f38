"""How many norms of other people's models ``convert(..., fuse=True)`` fuses, by family.

    python benchmarks/zoo_fusing.py [family ...] [--misses 20]

It needs the packages of the families; a family whose package is missing is left out. Weights are random. What follows
a norm is read from the data flow of one training forward of the stock model: a norm counts if every output of it is
used once, by a pointwise activation that norms can compute or by an addition. It is fused if the converted model calls
it with an epilogue in every forward.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo_models import FAMILIES, PACKAGES

import distnorm
from distnorm.layers.module import DistNorm

_NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")
_ACTIVATIONS = frozenset("relu relu6 leaky_relu elu sigmoid silu mish gelu hardsigmoid hardswish hardtanh".split())
_NOTHING = frozenset(("detach", "alias", "lift_fresh"))


class Uses(TorchDispatchMode):
    """Notes by which operations the outputs of norms are used; ``current`` is the norm that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.outputs: list[tuple[str, list[str]]] = []
        """By call of a norm, its name and the operations on its output."""
        self._holds: dict[int, list[str]] = {}
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if plain not in _NOTHING:
            for each in given:
                if id(each) in self._holds:
                    self._holds[id(each)].append(_described(name, args))
        if name != plain and given:
            self._holds.pop(id(given[0]), None)
        first = tree_leaves(result)[0] if tree_leaves(result) else None
        if name in _NORMS and self.current:
            self.outputs.append((self.current, uses := []))
            self._holds[id(first)] = uses
            self._kept.append(first)
            self.current = ""
        elif (plain in _NOTHING or (plain == "native_dropout" and args[1] == 0)) and id(given[0]) in self._holds:
            self._holds[id(first)] = self._holds[id(given[0])]
            self._kept.append(first)
        return result


def _described(name: str, args: Any) -> str:
    plain = name.removesuffix("_")
    if plain == "hardtanh" and list(args[1:3]) != [0.0, 6.0]:
        return "other hardtanh"
    if plain == "add" and not all(isinstance(each, Tensor) for each in args[:2]):
        return "add of a number"
    return name


def followers(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, str]:
    """Return by norm what alone follows it; "" if something else or more does."""
    uses = Uses()
    for name, each in model.named_modules():
        if isinstance(each, _BatchNorm):
            each.register_forward_pre_hook(lambda *_, name=name: setattr(uses, "current", name))
    with uses:
        run(model)
    found: dict[str, set[str]] = defaultdict(set)
    for name, operations in uses.outputs:
        if len(operations) == 2 and operations[0] == "clone" and operations[1].endswith("_"):
            del operations[0]  # autograd keeps what an activation in place overwrites
        kind = operations[0].removesuffix("_") if len(operations) == 1 else ""
        found[name].add(kind if kind in _ACTIVATIONS or kind == "add" else "")
    return {name: kinds.pop() if len(kinds) == 1 else "" for name, kinds in found.items()}


def fused(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[str]:
    """Return the norms that every call asks for an epilogue."""
    distnorm.convert(model, "local_bn", fuse=True)
    names = {each: name for name, each in model.named_modules()}
    asked: dict[str, list[bool]] = defaultdict(list)
    forward = DistNorm.forward

    def ask(self: DistNorm, *args: Any, **options: Any) -> Any:
        asked[names[self]].append(bool({"residual", "relu", "activation"} & options.keys()))
        return forward(self, *args, **options)

    DistNorm.forward = ask  # type: ignore[method-assign]
    try:
        run(model)
    finally:
        DistNorm.forward = forward  # type: ignore[method-assign]
    return {name for name, each in asked.items() if all(each)}


class Row(NamedTuple):
    """The counts of one model or family."""

    norms: int = 0
    followed: int = 0
    fused: int = 0

    def plus(self, other: Row) -> Row:
        """Return the sum."""
        return Row(*(a + b for a, b in zip(self, other, strict=True)))

    def text(self, name: str) -> str:
        """Return a line of the table."""
        share = f"{100 * self.fused / self.followed:.0f} %" if self.followed else "-"
        return f"| {name} | {self.norms} | {self.followed} | {self.fused} | {share} |"


def count(make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Any]]], misses: Counter[str]) -> Row:
    """Return the counts of one model, and add what is missed to ``misses``."""
    torch.manual_seed(0)
    model, run = make()
    model.train()
    stock = copy.deepcopy(model)
    follow = followers(stock, run)
    took = fused(model, run)
    wanted = {name for name, kind in follow.items() if kind}
    parts = dict(stock.named_modules())
    for name in wanted - took:
        owners = [name.rsplit(".", depth)[0] for depth in (1, 2, 3) if name.count(".") >= depth]
        kinds = " < ".join(type(parts[each]).__name__ for each in owners)
        misses[f"{follow[name]} after {name.rsplit('.', 1)[-1]} of {kinds}"] += 1
    return Row(len(follow), len(wanted), len(wanted & took))


def _present() -> Iterator[str]:
    for family, package in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            yield family


def main() -> None:
    """Print the table, and the kinds of misses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--misses", type=int, default=0, help="how many kinds of misses to print for each family")
    parser.add_argument("--models", action="store_true", help="print a row for each model, too")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| family | norms | followed by an activation or addition alone | fused | share |\n|---|---:|---:|---:|---:|")
    total = Row()
    for family in given.families or _present():
        row, misses = Row(), Counter[str]()
        for name, make in FAMILIES[family]():
            if given.only in name:
                try:
                    one = count(make, misses)
                except Exception as error:
                    print(f"{family} {name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
                    continue
                row = row.plus(one)
                if given.models:
                    print(one.text(f"{family} {name}"), flush=True)
        print(row.text(family), flush=True)
        for kind, times in misses.most_common(given.misses):
            print(f"    {times} {kind}")
        total = total.plus(row)
    print(total.text("all"))


if __name__ == "__main__":
    main()
