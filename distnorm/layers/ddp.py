"""Keep DistributedDataParallel from broadcasting running statistics once their layers train.

DDP gives every rank rank 0's buffers when it wraps a model, which users rely on, and again before every forward
(pytorch#46636). Where ranks share statistics the second is waste, and where they do not it overwrites what the other
ranks saw. So buffers leave a DDP module's list during the first training forward of their layers inside of it: that
forward's broadcast has come before the layers ran, and there is none in the next.

The only user of DDP's private ``_active_ddp_module``, ``_join_config``, ``_run_ddp_forward``, ``parameters_to_ignore``
and ``_assign_modules_buffers`` (torch 2.13; see tests/test_private_apis.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distnorm.layers.running_statistics import BUFFERS

_OURS = "_distnorm_unlisted"
"""The attribute of a DDP module that holds the names that were added to those it ignores."""

_shortened: WeakSet[DistributedDataParallel] = WeakSet()


class Broadcasts:
    """Looks after what DDP modules broadcast of the layers that are bound to one set of ranks."""

    def __init__(self, layers: Callable[[], Iterable[tuple[str, _BatchNorm]]], ranks: Collection[int]) -> None:
        """``layers`` gives names and layers; ``ranks`` took over the running statistics of their first one.

        No ``ranks``, where the user named them: they may be fewer than those of a DDP module, which keeps its list.
        """
        self._layers = layers
        self._ranks = frozenset(ranks)
        self._settled: WeakKeyDictionary[DistributedDataParallel, set[str]] = WeakKeyDictionary()

    def forward_begins(self, layer: str, *, shares: bool) -> None:
        """A training forward of ``layer``; the first one inside a DDP module takes all layers that train off its list.

        All at once, as a layer that runs on some ranks only must not make their lists differ. A DDP module that serves
        other ranks, too, keeps its list.

        Raises:
            RuntimeError: as ``_refuse_join``, if it ``shares`` anything.
        """
        active = DistributedDataParallel._active_ddp_module
        if active is None:
            return
        if shares:
            _refuse_join(layer, active)
        if layer in self._settled.get(active, ()):
            return
        training = {name: each for name, each in self._layers() if each.training}
        for module in _enclosing():
            settled = self._settled.setdefault(module, set())
            fresh = [each for name, each in training.items() if name not in settled]
            if fresh and self._ranks.issuperset(dist.get_process_group_ranks(module.process_group)):
                _unlist(module, fresh)
            settled.update(training)


def relist(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let DDP modules broadcast running statistics of ``layers`` of ``model`` again, unless users have them ignored."""
    copies = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
    for module in {*_shortened, *copies}:
        ours: set[str] = vars(module).get(_OURS, set())
        if ours:
            names = ours & _names(module, layers)
            ours -= names
            module.parameters_to_ignore -= names
            module._assign_modules_buffers()


# docs/decisions.md#join-is-refused
def _refuse_join(layer: str, active: DistributedDataParallel) -> None:
    """Raise where DDP has promised to stand in for ranks without data: it does not know of sums inside of a forward.

    Raises:
        RuntimeError: this forward runs under ``Join(..., throw_on_early_termination=False)``.
    """
    config = active._join_config
    if config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            f"{layer}: Join(throw_on_early_termination=False) stands in for the gradients of a rank that ran out of "
            "data, but not for its statistics: the others would wait for them. Pass throw_on_early_termination=True, "
            "which ends all ranks together, or let ranks without data go on with empty batches."
        )


def _enclosing() -> Iterator[DistributedDataParallel]:
    """The DDP modules in whose forward this thread is, from the inside out; torch itself knows the innermost only."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is DistributedDataParallel._run_ddp_forward.__code__:
            yield frame.f_locals["self"]


# docs/decisions.md#running-statistics-leave-the-buffers-that-ddp-broadcasts
def _unlist(module: DistributedDataParallel, layers: Iterable[nn.Module]) -> None:
    names = _names(module, layers) - module.parameters_to_ignore
    module.parameters_to_ignore |= names
    module._assign_modules_buffers()
    vars(module).setdefault(_OURS, set()).update(names)
    _shortened.add(module)


def _names(module: DistributedDataParallel, layers: Iterable[nn.Module]) -> set[str]:
    """What ``module`` calls the running statistics of ``layers``."""
    ours = {id(layer) for layer in layers}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.module.named_modules()
        if id(layer) in ours
        for name in BUFFERS
    }
