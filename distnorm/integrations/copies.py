"""Find models beside a converted one that are built like it: averages of its weights (EMA) and teachers.

If they were made before the model was wrapped, they keep stock layers, and take over weights of other layers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Set

from torch import nn

from distnorm.layers.class_swap import underlying
from distnorm.layers.module import DistNorm
from distnorm.layers.reverting import outcome
from distnorm.methods import BatchNorm
from distnorm.selection import norms


# docs/decisions.md#averages-that-were-made-before-the-wrapper
def stock_twins(models: Iterable[nn.Module], known: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, int]]:
    """Yield those of the converted ``models`` beside which the process has stock models built like them, and how many.

    These have its class and parameters of its names and shapes, and none of their batch norms is converted. Those in
    ``known``, which the script has wrapped, and parts of them do not count.
    """
    inside = {id(part) for model in (*models, *known) for part in model.modules()}
    for model in models:
        if not _count_twins(model, inside):
            continue
        gc.collect()  # models that the script has dropped do not count
        count = _count_twins(model, inside)
        if count:
            yield model, count


def difference(model: nn.Module) -> str:
    """Return why a stock model with all values of the converted ``model`` evaluates otherwise; empty if it does not."""
    layers = [each for each in model.modules() if isinstance(each, DistNorm)]
    weights = {layer.recipe.weights for layer in layers} & {"standardized", "normalized"}
    added = {name for layer in layers for name in (*layer._site.parameters, *layer._site.buffers)}
    if weights:
        return f"the wrapped one computes with {', '.join(weights)} weights"
    if added:
        return f"layers of the wrapped one also have {', '.join(sorted(added))}"
    if not all(outcome(layer) is None for layer in layers):
        return "the wrapped one does not normalize by running statistics"
    return ""


def computes_as_stock(model: nn.Module) -> bool:
    """Return whether a stock model in training mode computes the running statistics of the converted ``model``."""
    return all(isinstance(each.recipe.method, BatchNorm) for each in model.modules() if isinstance(each, DistNorm))


def _count_twins(model: nn.Module, inside: Set[int]) -> int:
    cls = underlying(_unwrapped(model))
    alive = (each for each in gc.get_objects() if type(each) is cls and id(each) not in inside)
    return sum(_is_twin(each, model) for each in alive)


def _is_twin(other: nn.Module, model: nn.Module) -> bool:
    is_stock = any(norms(other)) and not any(isinstance(each, DistNorm) for each in other.modules())
    return is_stock and _shapes(other).items() <= _shapes(_unwrapped(model)).items()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of what ``torch.compile`` has returned."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
