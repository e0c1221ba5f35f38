"""Keep DistributedDataParallel from broadcasting running statistics once their layers train.

DDP broadcasts rank 0's buffers when it wraps a model, which users rely on, and again before every forward pass
(pytorch#46636). If ranks share statistics, the second broadcast is unnecessary; if they do not, it overwrites the
statistics of the other ranks. So the buffers are removed from a DDP module's list in the first training forward pass of
their layers inside it. The broadcast before that forward pass is the last one.

The only user of DDP's private ``_active_ddp_module``, ``_join_config``, ``_run_ddp_forward``, ``_module_parameters``,
``parameters_to_ignore`` and ``_assign_modules_buffers`` (torch 2.13; see tests/test_private_apis.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distnorm.layers.running_statistics import buffers_of

_OURS = "_distnorm_unlisted"
"""The attribute of a DDP module that holds the names that distnorm added to ``parameters_to_ignore``."""

_changed: WeakSet[DistributedDataParallel] = WeakSet()


class Broadcasts:
    """Removes the buffers of the layers bound to one set of ranks from the buffers that DDP modules broadcast."""

    def __init__(self, layers: Callable[[], Iterable[tuple[str, _BatchNorm]]], ranks: Collection[int]) -> None:
        """``layers`` returns names and layers. ``ranks`` have the running statistics of the first of them.

        ``ranks`` is empty if the user named the ranks: they may be fewer than those of a DDP module, whose list then
        does not change.
        """
        self._layers = layers
        self._ranks = frozenset(ranks)
        self._settled: WeakKeyDictionary[DistributedDataParallel, set[str]] = WeakKeyDictionary()

    def forward_begins(self, layer: str, *, shares: bool) -> None:
        """In the first training forward pass of ``layer`` inside a DDP module, stop that module's broadcasts.

        This holds for all layers in training mode at once, so that a layer that runs on some ranks only does not make
        their lists differ. The list of a DDP module that has other ranks too does not change.

        Raises:
            RuntimeError: as ``_refuse_join``, if the layer ``shares`` anything.
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


def refuse_unknown(added: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Raise if the DDP module that runs was made before a parameter was added, and so does not reduce its gradient.

    Args:
        added: pairs of a parameter that was there before, and one that was added beside it.

    Raises:
        RuntimeError: naming the first such parameter.
    """
    active = DistributedDataParallel._active_ddp_module
    if active is None:
        return
    known = {id(parameter) for parameter in active._module_parameters}
    for before, new in added:
        if id(before) in known and id(new) not in known and new.requires_grad:
            name = next(name for name, parameter in active.module.named_parameters() if parameter is new)
            raise RuntimeError(
                f"{name}: this parameter was added after DistributedDataParallel wrapped the model, which therefore "
                "does not reduce its gradient. Convert the model first, then wrap it and create its optimizer."
            )


def relist(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let DDP modules broadcast running statistics of ``layers`` of ``model`` again, unless the user excluded them."""
    copies = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
    for module in {*_changed, *copies}:
        ours: set[str] = vars(module).get(_OURS, set())
        if ours:
            names = ours & _names(module, layers)
            ours -= names
            module.parameters_to_ignore -= names
            module._assign_modules_buffers()


# docs/decisions.md#join-is-refused
def _refuse_join(layer: str, active: DistributedDataParallel) -> None:
    """Raise if DDP repeats collectives for ranks without data, since it cannot repeat those inside a forward pass.

    Raises:
        RuntimeError: this forward pass runs under ``Join(..., throw_on_early_termination=False)``.
    """
    config = active._join_config
    if config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            f"{layer}: Join(throw_on_early_termination=False) repeats the gradient collectives of a rank that ran out "
            "of data, but not those of its statistics, so the other ranks would wait forever. Pass "
            "throw_on_early_termination=True, which ends all ranks together, or let ranks without data continue with "
            "empty batches."
        )


def _enclosing() -> Iterator[DistributedDataParallel]:
    """Yield the DDP modules whose forward pass this thread runs, innermost first; torch records only the innermost."""
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
    _changed.add(module)


def _names(module: DistributedDataParallel, layers: Iterable[nn.Module]) -> set[str]:
    """Return the names of the running statistics of ``layers`` in ``module``."""
    ours = {id(layer) for layer in layers}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.module.named_modules()
        if id(layer) in ours
        for name in buffers_of(layer)
    }
