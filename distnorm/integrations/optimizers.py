"""Find the optimizer whose steps end the steps of moving statistics, in an unmodified script.

Until a model has an optimizer, backward passes end its steps. After that, the first optimizer that owns parameters of
the model and steps is attached. Optimizers that own affine parameters of converted layers have precedence. If another
optimizer steps twice while the attached one does not step, it replaces it: scripts that unfreeze a backbone continue
with a new optimizer. The choice depends only on what the script does, so it is the same on all ranks.
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
        """Start with no optimizers and no models."""
        self._alive: WeakSet[Optimizer] = WeakSet()
        self._followed: list[_Followed] = []

    def watch(self) -> None:
        """Record every optimizer that is created or steps from now on."""
        after_init(Optimizer, self._add)
        register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))

    def follow(self, model: nn.Module, conversions: Sequence[Conversion]) -> None:
        """Let optimizers end the steps of ``model``, which has ``conversions``. Issues no collective."""
        followed = _Followed(model, conversions)
        self._followed.append(followed)
        for optimizer in self._alive:
            followed.expect(optimizer)

    def _add(self, optimizer: Optimizer) -> None:
        self._alive.add(optimizer)
        for followed in self._models():
            followed.expect(optimizer)

    def _before_step(self, optimizer: Optimizer) -> None:
        for followed in self._models():
            followed.before_step(optimizer, self._alive)

    def _models(self) -> list[_Followed]:
        self._followed = [each for each in self._followed if each.model() is not None]
        return self._followed


class _Followed:
    """A model, and the optimizer whose steps end the model's steps."""

    def __init__(self, model: nn.Module, conversions: Sequence[Conversion]) -> None:
        self._model = ref(model)
        self._conversions = [ref(each) for each in conversions]
        self._optimizer: ReferenceType[Optimizer] | None = None
        self._attachment: Attachment | None = None
        self._rivals: WeakSet[Optimizer] = WeakSet()

    def model(self) -> nn.Module | None:
        """Return the model, or None if it is gone or its conversions have been undone."""
        return self._model() if self._in_use() else None

    def _in_use(self) -> list[Conversion]:
        alive = (reference() for reference in self._conversions)
        return [each for each in alive if each is not None and in_use(each)]

    def expect(self, optimizer: Optimizer) -> None:
        """Let backward passes end no more steps if ``optimizer`` owns parameters of the model, since it will step."""
        model = self.model()
        if model is not None and _owns(optimizer, model):
            for conversion in self._in_use():
                conversion.ends_with_backward = False

    def before_step(self, optimizer: Optimizer, alive: WeakSet[Optimizer]) -> None:
        """Attach ``optimizer`` if it is to end the model's steps, beginning with this one."""
        current = self._optimizer() if self._optimizer is not None else None
        if optimizer is current:
            self._rivals.clear()
            return
        model, conversions = self.model(), self._in_use()
        if model is None or not _owns(optimizer, model):
            return
        if graph_task() != NO_BACKWARD:  # an optimizer per parameter, which steps inside the backward pass
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
    """Return whether any layer still belongs to ``conversion``."""
    return any(isinstance(each, DistNorm) and each._site.conversion is conversion for _, each in conversion.layers())


def _owns(optimizer: Optimizer, module: nn.Module) -> bool:
    owned: set[int] = {id(each) for group in optimizer.param_groups for each in group["params"]}
    return any(id(each) in owned for each in module.parameters())
