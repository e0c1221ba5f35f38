"""The handle that ``precondition`` returns: hooks on layers and optimizer, and the one collective between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distnorm.autograd.engine import backward_may_follow, repeating
from distnorm.compat.dispatch_state import modes_disabled
from distnorm.compat.uninterrupted import put
from distnorm.preconditioning.statistics import Statistics
from distnorm.preconditioning.targets import Target, stepped_by
from distnorm.transport import Group
from distnorm.transport.topology import current_world
from distnorm.types import EVERY_LAYER, Future, Observer, Slot

VERSION = 1
_RUNNING = "mean", "var", "count"


class Preconditioner:
    """Handle of one ``precondition`` call.

    Attributes:
        layers: the names of the layers that are preconditioned; layers that share their parameters have one name.
        left_out: by name, why other linear layers and convolutions are not.
        observers: receive the events of the collectives; ``distnorm.Ledger`` adds itself.
    """

    def __init__(
        self,
        targets: list[Target],
        left_out: Mapping[str, str],
        optimizer: torch.optim.Optimizer,
        group: Group,
        statistics: Statistics,
        condition: Callable[[int, Target], None],
    ) -> None:
        """Register the hooks; ``condition`` replaces the gradients of a target."""
        self.layers = [target.name for target in targets]
        self.left_out = dict(left_out)
        self.observers: list[Observer] = []
        self.statistics = statistics
        self._targets, self._group, self._condition = targets, group, condition
        world = current_world()
        self._world = None if world is None else ref(world)
        self._step = 0
        self._passes = 0
        """The backward passes of this step so far that followed a forward pass."""
        self._longest = 0
        """The most backward passes of any step; sums leave when the last of them begins."""
        self._fresh = False
        """Whether a forward pass came after the last backward pass."""
        self._in_flight: Future | None = None
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._before_step)]
        for at, target in enumerate(targets):
            self._handles += [each.register_forward_hook(_Seen(self, at), with_kwargs=True) for each in target.modules]

    def remove(self) -> None:
        """Remove all hooks: gradients reach the optimizer as they are. Issues no collective."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _saw(self, number: int, x: Tensor, output: Tensor) -> None:
        """Count the input of a layer, unless this is a recomputation or no backward pass can follow."""
        if output.requires_grad:
            output.register_hook(self._backward_begins)
        weight, _ = self._targets[number].parameters
        if weight.requires_grad and backward_may_follow() and not repeating():
            if not self._fresh and all(target.parameters[0].grad is None for target in self._targets):
                self._passes = 0  # gradients were cleared without a step: a loss scaler skipped it
            self._fresh = True
            with modes_disabled(), torch.no_grad():  # hidden from modes: not part of the forward
                self.statistics.add(number, x.detach(), weight.dim() - 2)

    # docs/decisions.md#when-sums-of-layer-inputs-leave
    def _backward_begins(self, _: Tensor) -> None:
        if self._fresh:
            self._fresh = False
            self._passes += 1
            if self._passes == self._longest and self._in_flight is None:
                with modes_disabled(), torch.no_grad():
                    self._start()

    def _start(self) -> None:
        """Start the one collective of this step."""
        if current_world() is not (None if self._world is None else self._world()):
            raise RuntimeError(
                "distnorm.precondition was called in another job: the process group was made or destroyed since. Call "
                "remove() on the handle, and distnorm.precondition again after init_process_group."
            )
        slot = Slot(EVERY_LAYER, "forward", self._step, observers=tuple(self.observers))
        sums = self.statistics.sums

        def then(future: Future) -> list[Callable[[], object]]:
            return [put(self, "_in_flight", future), sums.zero_]

        try:
            self._group.sum_async(sums.clone(), slot, then)
        except RuntimeError as error:
            raise self._missed(error) from error

    def _wait(self) -> Tensor | None:
        try:
            return None if self._in_flight is None else self._in_flight.wait()
        except RuntimeError as error:
            raise self._missed(error) from error

    def _missed(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"distnorm.precondition: the sums of layer inputs of step {self._step} among ranks "
            f"{list(self._group.ranks)} did not arrive. Some rank has stopped, or its optimizer makes fewer steps: end "
            f"all ranks after equally many. Cause: {error}"
        )

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Precondition the gradients before the step, or after the closure that computes them within it."""
        self._check_steps(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._precondition()
            return None

        def preconditioned() -> Any:
            loss = closure()
            self._precondition()
            return loss

        if len(args) > 1:
            return (args[0], preconditioned, *args[2:]), kwargs
        return args, {**kwargs, "closure": preconditioned}

    def _check_steps(self, optimizer: torch.optim.Optimizer) -> None:
        stepped = stepped_by(optimizer)
        lost = [target.name for target in self._targets if not {*map(id, target.parameters)} <= stepped]
        if lost:
            raise RuntimeError(
                f"distnorm.precondition: {type(optimizer).__name__} does not step the parameters of {lost} any more. "
                "Engines that step flat or sharded copies of them (DeepSpeed, FSDP) cannot be combined with it; if "
                "parameters were replaced or taken from the optimizer, call remove() and precondition again."
            )

    @torch.no_grad()
    def _precondition(self) -> None:
        if self._in_flight is None:
            self._start()
        total = self._wait()
        assert total is not None, "it was started"
        self.statistics.update(total)
        self._in_flight = None
        self._longest, self._passes = max(self._longest, self._passes), 0
        self._step += 1
        for at, target in enumerate(self._targets):
            self._condition(at, target)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state. Save it per rank, beside the states of model and optimizer.

        A run that loads it continues bit for bit. Waits for the collective in flight, if any.
        """
        in_flight = self._wait()
        return {
            "version": VERSION,
            "layers": list(map(str, self._targets)),
            "place": self._place(),
            "step": self._step,
            "passes": self._passes,
            "longest": self._longest,
            "in_flight": None if in_flight is None else in_flight.clone(),
            "sums": self.statistics.sums.clone(),
            **{name: getattr(self.statistics, name).clone() for name in _RUNNING},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``. Issues no collective. Other layers' or a newer version's state is refused.

        What a rank had not sent yet is taken over by the same rank among as many ranks only.

        Raises:
            ValueError: it is not such a state; the message names the difference. Nothing has changed.
        """
        self._check(state)
        own = state["place"] == self._place()
        device = self.statistics.sums.device
        for name in _RUNNING:
            setattr(self.statistics, name, state[name].to(device, copy=True))
        self.statistics.sums.copy_(state["sums"] if own else torch.zeros_like(self.statistics.sums))
        in_flight = state["in_flight"]
        self._in_flight = None if in_flight is None else Future.completed(in_flight.to(device, copy=True))
        self._step, self._longest = state["step"], state["longest"]
        self._passes = state["passes"] if own else 0
        self._fresh = False

    def _check(self, state: object) -> None:
        if not isinstance(state, Mapping) or "version" not in state:
            raise ValueError(
                f"Preconditioner.load_state_dict: need what its state_dict returned; got {type(state).__name__}."
            )
        if state["version"] != VERSION:
            raise ValueError(
                f"Preconditioner.load_state_dict: the state has version {state['version']}, but this distnorm reads "
                f"version {VERSION}. Load it with the distnorm that saved it."
            )
        layers = list(map(str, self._targets))
        differing = sorted({*state["layers"]} ^ {*layers})
        if state["layers"] != layers:
            raise ValueError(
                f"Preconditioner.load_state_dict: the state is of other layers, or in another order; only one of the "
                f"two has {differing}. Call distnorm.precondition with the model and options of the run that saved it."
            )

    def _place(self) -> list[int]:
        return [self._group.ranks.index(dist.get_rank()) if self._group.size > 1 else 0, self._group.size]


class _Seen:
    """Forward hook of a layer. A copy or a pickle of the layer has one that does nothing."""

    def __init__(self, preconditioner: Preconditioner | None = None, number: int = 0) -> None:
        self.preconditioner = preconditioner
        self.number = number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.preconditioner is not None:
            self.preconditioner._saw(self.number, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type[_Seen], tuple[()]]:
        return _Seen, ()


def preconditioners_of(model: nn.Module) -> list[Preconditioner]:
    """Return the handles whose hooks are on layers of ``model``."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    found = [hook.preconditioner for hook in hooks if isinstance(hook, _Seen) and hook.preconditioner is not None]
    return list(dict.fromkeys(found))
