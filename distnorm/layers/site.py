"""One converted layer's place: what it is called, what it was, and its line to the policy."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.engine import NO_BACKWARD, graph_task, repeating
from distnorm.autograd.operators import NOW, open_channel
from distnorm.autograd.recompute import Record, Records
from distnorm.layers import running_statistics
from distnorm.layers.binding import Binding
from distnorm.layers.conversion import Conversion
from distnorm.layers.running_statistics import running_of, with_landed
from distnorm.transport import LostGroup, lost
from distnorm.types import Direction, Future, Landed, Running, Slot


class Site:
    """The channel (see ``share.Channel``) of one layer, and what ``revert`` and error messages need to know of it."""

    process_group: dist.ProcessGroup | LostGroup | None = None
    """The one that the layer had of its own."""

    def __init__(
        self,
        conversion: Conversion,
        index: int,
        name: str,
        original: type[_BatchNorm],
        momentum: float | None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Layer number ``index`` of ``conversion``; ``revert`` gives ``original`` class, momentum and group back."""
        self.conversion = conversion
        self.index = index
        self.name = name
        self.original = original
        self.momentum = momentum
        self.process_group = process_group
        self._open()

    def _open(self) -> None:
        self.key, self.number = open_channel(self)
        self.records = Records()
        self._starved: dict[int, Tensor] = {}
        """Whether a GPU has seen 1 value per channel, by the number of ranks that shared it."""
        self._ahead: tuple[Landed, list[object], Running] | None = None
        """What running statistics will be, and what that was made of."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies keep what was configured and drop what is in use."""
        kept = {name: getattr(self, name) for name in ("conversion", "index", "name", "original", "momentum")}
        return {**kept, "process_group": lost(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open a line of its own for the copy."""
        self.__dict__.update(state)
        self._open()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Register the layer's copy with the copied conversion, whichever ``__deepcopy__`` the layer's class has.

        Within a process a group stays valid.
        """
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = {**self.__getstate__(), "process_group": self.process_group}
        copied.__setstate__({**state, "conversion": deepcopy(self.conversion, memo)})
        layer = self.conversion.layer(self.index)
        if layer is not None and id(layer) in memo:
            copied.conversion.add(self.index, self.name, memo[id(layer)])
        return copied

    def alone(self, x_NCL: Tensor) -> bool:
        """Whether nothing is shared, so that ``x_NCL`` can be normalized without this channel.

        Raises:
            ValueError: 1 value per channel.
        """
        binding = self.conversion.bound()
        if not binding.reducer.facts.alone or x_NCL.device.type not in ("cpu", "cuda"):
            return False
        self.refuse_one_value(x_NCL)
        self._begin(binding)
        return True

    def refuse_one_value(self, x_NCL: Tensor) -> None:
        """Raise where nothing is shared and ``x_NCL`` has 1 value per channel.

        Raises:
            ValueError: so it is.
        """
        if not torch.jit.is_tracing() and x_NCL.numel() == x_NCL.shape[1]:
            raise self._too_few(1)

    def begin(self) -> int:
        """The training step of the forward that begins now."""
        binding = self.conversion.bound()
        self._begin(binding)
        return binding.step

    def _begin(self, binding: Binding) -> None:
        if graph_task() == NO_BACKWARD:
            binding.forward_begins(self.name)

    def statistics(self, wire: Tensor, step: int, *, learning: bool, held: bool, enough: bool = False) -> Record:
        """Shared counterpart of the local sums ``wire``, whose last element is the count.

        One use of the policy, or none in a recomputation. ``held`` says that a graph will hold the record, ``enough``
        that the local count is known to be above 1.

        Raises:
            ValueError: 1 value per channel over all sharing ranks.
        """
        binding = self.conversion.bound()
        record = self.records.recall(wire, self.conversion.recipe.method.kinds) if repeating() else None
        if record is not None:
            record.repeated = True
            # A reentrant checkpoint: cotangents will come in a nested pass, whose end is not the step's.
            if not record.held:
                binding.expect_boundary()
            return record
        self._begin(binding)
        slot = self._slot(binding, "forward", step, learning=learning)
        if learning:
            binding.note_use(self.name)
        else:
            binding.forget_in_flight()
        try:
            shared = binding.reducer.reduce(wire, slot)
        except RuntimeError as error:
            raise self._failed(binding, slot, error) from error
        if not enough and binding.reducer.completeness(slot).is_counted:
            # A policy that shares nothing in this step gives the wire back.
            self._check_count(shared[-1], 1 if shared is wire else binding.reducer.size)
        record = Record(wire, shared, slot.step, held=held)
        self.records.note(record)
        return record

    def cotangents(self, wire: Tensor, count: Tensor, step: int, *, learning: bool) -> Tensor:
        """Shared counterpart of local cotangents. One use of the policy; raises as ``start_cotangents``."""
        return self.start_cotangents(wire, count, step, learning=learning).wait()

    def start_cotangents(self, wire: Tensor, count: Tensor, step: int, *, learning: bool) -> Future:
        """``cotangents``, whose result is asked for later.

        Raises:
            RuntimeError: second derivatives of a policy whose cotangents outlive their step.
        """
        binding = self.conversion.bound()
        if not learning and self.conversion.facts.keeps_cotangents:
            raise RuntimeError(
                f"{self.name}: {self.conversion.recipe.policy} averages cotangents over steps, so there is no second "
                "derivative (create_graph=True). Use an exact recipe such as sync_bn for this layer."
            )
        if learning and graph_task() != NO_BACKWARD:
            binding.expect_boundary()
        slot = self._slot(binding, "backward", step, learning=learning)
        if self.conversion.facts.keeps_cotangents:
            slot = slot._replace(loss_scale=binding.loss_scale_of_pass())
        try:
            answer = binding.reducer.start(wire, slot._replace(forward_count=count))
        except RuntimeError as error:
            raise self._failed(binding, slot, error) from error

        def wait() -> Tensor:
            try:
                return answer.wait()
            except RuntimeError as error:
                raise self._failed(binding, slot, error) from error

        return Future(wait)

    def absorb(self, shared: Tensor, *, learning: bool) -> None:
        """Let the layer's running statistics absorb ``shared`` sums and count of the current step, if fit for them."""
        layer = self.conversion.layer(self.index)
        if layer is not None and self.lands(NOW, learning=learning):
            method, guarded = self.conversion.recipe.method, self.conversion.guards
            running_statistics.absorb_shared(layer, method, shared, True, guarded=guarded)

    def lands(self, step: int, *, learning: bool) -> bool:
        """Whether the statistics of ``step`` are fit for the running statistics."""
        binding = self.conversion.bound()
        return binding.reducer.completeness(self._slot(binding, "forward", step, learning=learning)).is_global

    def _slot(self, binding: Binding, direction: Direction, step: int, *, learning: bool) -> Slot:
        step = binding.step if step == NOW else step
        observers = tuple(self.conversion.observers)
        return Slot(self.name, direction, step, learning=learning, observers=observers, model=binding.topology.model)

    def _failed(self, binding: Binding, slot: Slot, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: sharing {slot.direction} statistics ({self.conversion.recipe.policy}) among ranks "
            f"{list(binding.topology.ranks)} failed. Another rank has probably stopped, ran out of data, or runs "
            f"other layers; its own message says more. Cause: {error}"
        )

    # docs/decisions.md#one-value-per-channel
    def _check_count(self, count: Tensor, size: int) -> None:
        if count.device.type == "cpu":
            if count.item() == 1:
                raise self._too_few(size)
            return
        if count.device.type == "meta":
            return
        # Asking a GPU for the count would stall the host in every layer: remember it there, ask at the next switch
        # between training and evaluation, or save.
        starved = count == 1
        self._starved[size] = self._starved[size] | starved if size in self._starved else starved

    def running(self, layer: _BatchNorm) -> Running | None:
        """The running statistics of ``layer`` with what is in flight; None if it tracks none."""
        if layer.running_mean is None or layer.running_var is None:
            return None
        live, landed = running_of(layer, guarded=True), self.conversion.ahead(self.name)
        if landed is None:
            return live
        if not self._ahead or self._ahead[0] is not landed or self._ahead[1] != _versions(live):
            self._ahead = (
                landed,
                _versions(live),
                with_landed(live, landed, self.conversion.recipe.method, layer.num_features),
            )
        return self._ahead[2]

    def ahead(self, mean_C: Tensor, var_C: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance with what is in flight, for a compiled graph, which holds the buffers only."""
        layer = self.conversion.layer(self.index)
        found = None if layer is None else self.running(layer)
        if found is None or found.mean_C is None or found.var_C is None:
            return mean_C, var_C
        return found.mean_C, found.var_C

    def raise_if_starved(self) -> None:
        """Report a batch of 1 value per channel that a GPU has seen since the last call.

        Raises:
            ValueError: there was one. Its statistics were not absorbed.
        """
        starved, self._starved = self._starved, {}
        for size, found in starved.items():
            if bool(found):
                raise self._too_few(size)

    def _too_few(self, size: int) -> ValueError:
        return ValueError(
            f"{self.name}: 1 value per channel across {size} rank{'s' if size > 1 else ''}; training needs at least 2. "
            "Raise the batch size, share over more ranks, or put the layer in eval()."
        )


def _versions(running: Running) -> list[object]:
    """What changes when the buffers do."""
    return [(id(each), each._version) for each in running[:3] if each is not None]
