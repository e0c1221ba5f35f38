"""The record of one converted layer: its name, its original class, and what it keeps between forwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.recompute import Records
from distnorm.compat.dispatch_state import modes_disabled
from distnorm.kernels.running import update_from_sums, update_running
from distnorm.layers.conversion import Conversion
from distnorm.layers.layout import Measured
from distnorm.layers.running_statistics import running_of, seen, updated_running
from distnorm.layers.small import Small
from distnorm.methods import ChannelAffine, Declared
from distnorm.transport import LostGroup, lost
from distnorm.types import GlobalStatistics, Running

# Graphs contain numbers, not objects: here an operator finds the site of a number.
_sites: WeakValueDictionary[int, Site] = WeakValueDictionary()
_keys = itertools.count()


class Site:
    """What operators, ``revert`` and error messages need to know of one layer, and its forwards to repeat."""

    process_group: dist.ProcessGroup | LostGroup | None = None
    """The process group that the layer had before."""
    measured: Measured | None = None
    """What a method that is not affine per channel shares and declares."""

    def __init__(
        self,
        conversion: Conversion,
        index: int,
        name: str,
        original: type[_BatchNorm],
        momentum: float | None,
        process_group: dist.ProcessGroup | None = None,
        measured: Measured | None = None,
    ) -> None:
        """Register layer number ``index`` of ``conversion``; ``revert`` restores ``original``, momentum and group."""
        self.conversion = conversion
        self.index = index
        self.name = name
        self.original = original
        self.momentum = momentum
        self.process_group = process_group
        self.measured = measured
        self._open()

    def _open(self) -> None:
        method = self.conversion.recipe.method
        self.channel_affine = method if isinstance(method, ChannelAffine) else None
        """The recipe's method, if kernels accept it."""
        self.core = self.channel_affine if self.measured is None else self.measured.core
        self.inputs = method.inputs
        declared = Declared() if self.measured is None else self.measured.declared
        self.parameters, self.buffers = tuple(declared.parameters), tuple(declared.buffers)
        """The names of what the method has declared."""
        self.key = next(_keys)
        _sites[self.key] = self
        with modes_disabled():
            self.number = self.scalar()
            """By which operators find this site; an input of compiled graphs, so equal layers have equal graphs."""
        self.records = {name: Records() for name in (("",) if self.measured is None else self.measured.parts)}
        """By the name of the share."""
        self.small: Small | None = None
        """What the next forward may rest on, if the last one was by torch's batch norm."""
        self.forwards = Records()
        """What identifies recent inputs, with the buffers that their forwards found."""
        self._too_few: dict[int, Tensor] = {}
        """By the number of sharing ranks, whether a GPU has seen 1 value per channel."""
        self._ahead: tuple[list[GlobalStatistics], list[object], Running] | None = None
        """The running statistics with what is in flight, and what they were computed from."""

    @staticmethod
    def of(number: Tensor) -> Site:
        """Return the site with this ``number``.

        Raises:
            RuntimeError: it no longer exists.
        """
        found = _sites.get(int(number))
        if found is None:
            raise RuntimeError(
                "distnorm: this graph was traced in training mode and shares statistics for layer number "
                f"{int(number)} of the process that traced it, but the model is gone, or this is another process. Keep "
                "the model while its graph trains; to save a graph, export the model in eval(), or convert and compile "
                "it where it trains."
            )
        return found

    def scalar(self) -> Tensor:
        """Return ``number`` as a new tensor, which belongs to the active mode, if any."""
        return torch.full((), self.key, dtype=torch.int64, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        """Keep the configuration and drop what is in use."""
        kept = {
            name: getattr(self, name) for name in ("conversion", "index", "name", "original", "momentum", "measured")
        }
        return {**kept, "process_group": lost(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and open the site of the copy."""
        self.__dict__.update(state)
        self._open()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Register the layer's copy with the copied conversion, whichever ``__deepcopy__`` the layer's class has.

        Keep the process group, which stays valid within the process.
        """
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = {**self.__getstate__(), "process_group": self.process_group}
        copied.__setstate__({**state, "conversion": deepcopy(self.conversion, memo)})
        layer = self.conversion.layer(self.index)
        if layer is not None and id(layer) in memo:
            copied.conversion.add(self.index, self.name, memo[id(layer)])
        return copied

    # docs/decisions.md#one-value-per-channel
    def check_count(self, count: Tensor, size: int) -> None:
        """Raise if the ``count`` that ``size`` ranks share is 1; on a GPU, remember it.

        Raises:
            ValueError: it is 1.
        """
        if count.device.type == "cpu":
            if count.item() == 1:
                raise self.too_few(size)
            return
        if count.device.type == "meta":
            return
        # Reading the count from a GPU would stall the host in every layer. Keep it there, and read it when the layer
        # next switches between training and evaluation, or is saved.
        too_few = count == 1
        self._too_few[size] = self._too_few[size] | too_few if size in self._too_few else too_few

    def running(self, layer: _BatchNorm) -> Running | None:
        """Return the running statistics of ``layer`` with what is in flight; None if it tracks none."""
        if layer.running_mean is None or layer.running_var is None:
            return None
        live, statistics = running_of(layer, guarded=True), self.conversion.ahead(self.name)
        if statistics is None:
            return live
        if not self._ahead or self._ahead[0] is not statistics or self._ahead[1] != _versions(live):
            self._ahead = statistics, _versions(live), updated_running(layer, statistics, self.conversion.recipe.method)
        return self._ahead[2]

    def ahead(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return the running statistics with what is in flight, for a compiled graph, which has the buffers only."""
        layer = self.conversion.layer(self.index)
        found = None if layer is None else self.running(layer)
        return list(buffers) if found is None else [each for each in found.buffers.values() if each is not None]

    def raise_if_too_few(self) -> None:
        """Report a batch of 1 value per channel that a GPU has seen since the last call.

        Raises:
            ValueError: there was one. The running statistics were not updated with it.
        """
        too_few, self._too_few = self._too_few, {}
        for size, found in too_few.items():
            if bool(found):
                raise self.too_few(size)

    def too_few(self, size: int) -> ValueError:
        """Return the error for 1 value per channel over ``size`` ranks."""
        return ValueError(
            f"{self.name}: 1 value per channel across {size} rank{'s' if size > 1 else ''}; training needs at least 2. "
            "Raise the batch size, share over more ranks, or put the layer in eval()."
        )


def conversions() -> list[Conversion]:
    """Return the conversions that any layer of this process belongs to."""
    return list({id(site.conversion): site.conversion for site in list(_sites.values())}.values())


def update_layer(
    layer: _BatchNorm, running: Running, site: Site, shared: Sequence[Tensor], completed: Tensor | bool = True
) -> None:
    """Update ``running``, as of ``layer``, with what each share got, in order; unless ``completed`` is 0."""
    method = site.conversion.recipe.method
    if isinstance(method, ChannelAffine):
        (only,) = shared
        update_from_sums(method, only, running, layer.num_features, completed)
    elif shared and completed is not False:
        assert site.measured is not None, "its method is not affine per channel"
        found = site.measured.read(dict(zip(site.measured.parts, shared, strict=True)))
        targets = site.measured.targets(method, found, seen(layer, running))
        # Not by no_grad, of which torch.export of training would make a node that it refuses (torch 2.13).
        detached = {name: target.detach() for name, target in targets.items()}
        update_running(running, detached, shared[0][-1], completed)


def _versions(running: Running) -> list[object]:
    """Return values that change when the buffers do."""
    buffers = *running[:3], *running.declared.values()
    return [(id(each), each._version) for each in buffers if each is not None]
