"""Which optimizer's steps end the steps of moving statistics, seen from outside of the training loop.

Until a model has an optimizer, backward passes end its steps. From then on nothing ends a step until an optimizer
steps that owns parameters of the model; that one is attached. Of several, those that own affine parameters of converted
layers come first. If another one steps twice while the attached one rests, it takes over: scripts that thaw a backbone
go on with a new optimizer. All of it follows from what the script does, so it is alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from weakref import ReferenceType, WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distnorm.attach import Attachment, attach
from distnorm.autograd.engine import NO_BACKWARD, graph_task
from distnorm.integrations.patching import after_init
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm


# docs/decisions.md#scripts-are-watched-not-parsed
class Optimizers:
    """The optimizers of this process, and the models whose steps they end."""

    def __init__(self) -> None:
        """None of either."""
        self._alive: WeakSet[Optimizer] = WeakSet()
        self._clocks: list[_Clock] = []

    def watch(self) -> None:
        """Take note of every optimizer that is made or steps from now on."""
        after_init(Optimizer, self._made)
        register_optimizer_step_pre_hook(lambda optimizer, *_: self._steps(optimizer))

    def follow(self, model: nn.Module, conversions: Sequence[Conversion]) -> None:
        """Let optimizers end the steps of ``model``, which has ``conversions``. No collective, now or later."""
        clock = _Clock(model, conversions)
        self._clocks.append(clock)
        for optimizer in self._alive:
            clock.expect(optimizer)

    def _made(self, optimizer: Optimizer) -> None:
        self._alive.add(optimizer)
        for clock in self._living():
            clock.expect(optimizer)

    def _steps(self, optimizer: Optimizer) -> None:
        for clock in self._living():
            clock.before_step(optimizer, self._alive)

    def _living(self) -> list[_Clock]:
        self._clocks = [clock for clock in self._clocks if clock.model() is not None]
        return self._clocks


class _Clock:
    """One model and the optimizer whose steps count."""

    def __init__(self, model: nn.Module, conversions: Sequence[Conversion]) -> None:
        self._model = ref(model)
        self._conversions = [ref(each) for each in conversions]
        self._optimizer: ReferenceType[Optimizer] | None = None
        self._attachment: Attachment | None = None
        self._rivals: WeakSet[Optimizer] = WeakSet()

    def model(self) -> nn.Module | None:
        """The model, unless it is gone or its conversions have been undone."""
        return self._model() if self._standing() else None

    def _standing(self) -> list[Conversion]:
        found = (reference() for reference in self._conversions)
        return [each for each in found if each is not None and in_use(each)]

    def expect(self, optimizer: Optimizer) -> None:
        """An optimizer that owns parameters will step: backward passes end no steps until it does."""
        model = self.model()
        if model is not None and _owns(optimizer, model):
            for conversion in self._standing():
                conversion.ends_with_backward = False

    def before_step(self, optimizer: Optimizer, alive: WeakSet[Optimizer]) -> None:
        """Attach ``optimizer`` if it is the one; what it ends then is this very step."""
        current = self._optimizer() if self._optimizer is not None else None
        if optimizer is current:
            self._rivals.clear()
            return
        model, conversions = self.model(), self._standing()
        if model is None or not _owns(optimizer, model):
            return
        if graph_task() != NO_BACKWARD:  # it steps inside of backward passes, each parameter for itself
            for conversion in conversions:
                conversion.ends_with_backward = True
        elif optimizer in self._rivals or (current is None and _is_first_choice(optimizer, conversions, alive)):
            self._attach(model, optimizer, conversions[0].loss_scale)
        else:
            self._rivals.add(optimizer)

    def _attach(self, model: nn.Module, optimizer: Optimizer, scale: Callable[[], Tensor | float] | None) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = attach(model, optimizer=optimizer, loss_scale=scale)
        self._optimizer = ref(optimizer)
        self._rivals.clear()


def _is_first_choice(optimizer: Optimizer, conversions: Iterable[Conversion], alive: WeakSet[Optimizer]) -> bool:
    affine = nn.ModuleList(layer for conversion in conversions for _, layer in conversion.layers())
    return _owns(optimizer, affine) or not any(_owns(other, affine) for other in alive)


def in_use(conversion: Conversion) -> bool:
    """Whether layers that are alive are ``conversion``'s still."""
    return any(isinstance(each, DistNorm) and each._site.conversion is conversion for _, each in conversion.layers())


def _owns(optimizer: Optimizer, module: nn.Module) -> bool:
    theirs: set[int] = {id(each) for group in optimizer.param_groups for each in group["params"]}
    return any(id(each) in theirs for each in module.parameters())
