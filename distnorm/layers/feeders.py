"""Find the feeders of converted norms: the convolutions and linear layers whose outputs go to these norms.

The weight of a layer may be centred only if its output goes to converted norms and nowhere else. ``convert`` has no
input with which to check that. So it guesses from the order of registration, and ``Watch`` observes the first training
forward pass (docs/decisions.md#which-weights-are-centralized). For standardized and normalized weights the guess
stands, and what the forward pass shows is only logged (docs/decisions.md#which-weights-are-standardized-or-normalized).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from distnorm.compat.dispatch_state import in_transform, is_fake
from distnorm.layers import ddp, weights
from distnorm.layers.centralized import TARGETS
from distnorm.layers.class_swap import underlying
from distnorm.layers.conversion import Conversion
from distnorm.layers.normalized import Normalized
from distnorm.layers.reweighted import Reweighted, is_computed
from distnorm.layers.uses import Uses, is_supported, normalizes_input
from distnorm.layers.weights import outputs_of, weights_per_filter
from distnorm.recipe import Recipe
from distnorm.types import Feeders

logger = logging.getLogger("distnorm")

_DONE = {"centralized": "centred", "standardized": "standardized", "normalized": "normalized"}
_COMPUTED = "are computed from other parameters"
_SINGLE = "have one weight per filter, which would become a constant"


def check(model: nn.Module, layers: list[_BatchNorm], recipe: Recipe) -> None:
    """Raise if ``recipe`` adds parameters for the weights before ``layers`` when it is too late for that.

    Raises:
        ValueError: the model is inside DistributedDataParallel, or an engine has sharded a weight; neither would know
            the new parameters. The message names the layer.
    """
    if recipe.weights != "normalized":
        return
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    for name, module, _ in _guess(model, layers):
        weight = module._parameters.get("weight")
        if weight is None or is_fake(weight):
            continue
        if wrapped or type(weight) is not nn.Parameter or weight.dim() < 2:
            state = "is inside DistributedDataParallel" if wrapped else "is sharded or a tensor subclass"
            raise ValueError(
                f"{name}: weights='normalized' adds a parameter 'gain' beside the weight, which {state} already. "
                "Convert the model first, then wrap or shard it and create its optimizer."
            )


def reweight(model: nn.Module, layers: list[_BatchNorm], conversion: Conversion) -> None:
    """Compute the weights of the guessed feeders of ``layers`` as the recipe says.

    The first training forward pass of ``model`` shows where the guess was wrong. Feeders whose weight is computed from
    other parameters or belongs to several layers are left alone, with a line in the log.

    Warns:
        UserWarning: naming feeders with a single weight per filter, which would become a constant; it skips them.
    """
    kind, shared = conversion.recipe.weights, _shared_parameters(model)
    skipped: dict[str, list[str]] = {}
    trained = []
    for name, module, layer in list(_guess(model, layers)):
        reason = _reason_to_skip(module, shared)
        if reason is None:
            weights.reweight(module, [layer], conversion, name, trained=_is_trained(layer))
            if isinstance(module, Normalized) and module.has_zero_filters():
                weights.release(module)
                reason = "have filters of zeros, which have no direction"
            elif _is_trained(layer):
                trained.append(name)
        if reason is not None:
            skipped.setdefault(reason, []).append(name)
    if _SINGLE in skipped:
        names = skipped.pop(_SINGLE)
        warnings.warn(
            f"distnorm: the weights of {names} are not {_DONE[kind]}: they {_SINGLE}.",
            stacklevel=4,
        )
    for reason, names in skipped.items():
        logger.warning("distnorm: the weights of %s are not %s: they %s", ", ".join(names), _DONE[kind], reason)
    if trained and kind == "standardized":
        logger.warning(
            "distnorm: the running statistics after %s were computed with weights that were not standardized; train "
            "before you evaluate",
            ", ".join(trained),
        )
    if layers:
        Watch(model, conversion)


def release(model: nn.Module) -> None:
    """Undo ``reweight``; the weights of layers do not change."""
    for layer in weights.reweighted(model):
        weights.release(layer)
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            watch = getattr(hook, "__self__", None)
            if isinstance(watch, Watch):
                watch.remove()


class Watch:
    """Hooks on a model that observe in its first training forward pass where outputs go, then remove themselves."""

    _told: dict[str, Any] | None = None
    """What a loaded state has said, in place of what a forward pass shows."""
    _open = False
    """Whether a forward pass is under way at whose end ranks exchange what they know."""

    def __init__(self, model: nn.Module, conversion: Conversion) -> None:
        """Watch ``model``, whose norms belong to ``conversion``."""
        self.conversion = conversion
        self._uses: Uses | None = None
        self._before = model.register_forward_pre_hook(self._begins)
        # Also called after a forward pass that raised.
        self._after = model.register_forward_hook(self._ends, always_call=True)

    def remove(self) -> None:
        """Remove the hooks."""
        self._before.remove()
        self._after.remove()

    def _begins(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not model.training or self._open:
            return
        ddp.refuse_unknown(weights.added_parameters(model))
        self.conversion.look_for_state()
        self._open = not (in_transform() or any(_is_compiled(module) for module in model.modules()))
        if self.conversion.feeders.known:
            if self._told is None:
                self._told = _known(self.conversion.feeders)
                _apply(model, self.conversion)
            if not self._open:
                self.remove()
        elif self._open:
            self._uses = Uses(model, self.conversion)
            self._uses.__enter__()

    def _ends(self, model: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._open:
            return
        uses, self._uses, self._open = self._uses, None, False
        if uses is not None:
            uses.__exit__(None, None, None)
        if output is None or self.conversion.binding is None:
            return  # the forward pass raised, or no norm was in training mode: observe the next one
        # A rank that was told by a state takes part, since others may have none.
        mine = self._told if uses is None else uses.corrections(output)
        _join(self.conversion.feeders, self.conversion.binding.gather_text(json.dumps(mine)))
        if self._told != _known(self.conversion.feeders):
            _apply(model, self.conversion)
        self.remove()


def _known(feeders: Feeders) -> dict[str, Any]:
    return {"left": sorted(feeders.left), "feeds": feeders.feeds}


def _join(feeders: Feeders, texts: list[str]) -> None:
    """Merge the corrections of all ranks; a layer that any rank excludes is excluded."""
    corrections = [json.loads(text) for text in texts]
    left = frozenset(name for each in corrections for name in each["left"])
    feeds: dict[str, list[str]] = {}
    for each in corrections:
        for name, norms in each["feeds"].items():
            feeds[name] = sorted({*feeds.get(name, ()), *norms})
    feeders.known, feeders.left = True, left
    feeders.feeds = {name: feeds[name] for name in sorted(feeds) if name not in left}


def _apply(model: nn.Module, conversion: Conversion) -> None:
    kind, left, shared = conversion.recipe.weights, conversion.feeders.left, _shared_parameters(model)
    missed = []
    for name, norm_names in conversion.feeders.feeds.items():
        module, norms = model.get_submodule(name), tuple(model.get_submodule(norm) for norm in norm_names)
        if isinstance(module, Reweighted):
            if module._conversion is conversion:
                module._norms = norms
        elif _reason_to_skip(module, shared) is None:
            missed.append(name)
            if kind == "centralized":
                weights.reweight(module, norms, conversion, name, trained=True)
    if kind == "centralized":
        weights.exclude(model)
        tooled = [name for name, each in model.named_modules() if isinstance(each, Reweighted) and is_computed(each)]
        if tooled:
            logger.warning("distnorm: the weights of %s are not centred: they %s", ", ".join(tooled), _COMPUTED)
    _log(kind, sorted(left), missed)


def _log(kind: str, left: list[str], missed: list[str]) -> None:
    if left:
        logger.warning(
            "distnorm: the weights of %s are %s the outputs of these layers do not go to converted norms only",
            ", ".join(left),
            "not centred, since" if kind == "centralized" else f"{_DONE[kind]}, though",
        )
    if missed and kind != "centralized":
        logger.warning(
            "distnorm: the weights of %s are not %s, though the outputs of these layers go to converted norms: the "
            "order in which the model registers its layers did not show it",
            ", ".join(missed),
            _DONE[kind],
        )


def _guess(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[tuple[str, nn.Module, _BatchNorm]]:
    """Yield the guessed feeder of each of ``layers``: the nearest layer registered before it with as many outputs.

    Most models register layers in the order of their calls. Blocks that register all convolutions before all norms are
    paired differently, but the set of feeders is the same.
    """
    wanted = {id(layer) for layer in layers if normalizes_input(layer)}
    unpaired: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            unpaired.append((name, module))
        elif isinstance(module, _BatchNorm):
            fits = [each for each in unpaired if outputs_of(each[1]) == module.num_features]
            if fits:
                unpaired.remove(fits[-1])
            if fits and id(module) in wanted and underlying(fits[-1][1]) in TARGETS:
                yield *fits[-1], module


def _reason_to_skip(module: nn.Module, shared: set[int]) -> str | None:
    """Return why the weight of ``module`` stays as it is; None if recipes can compute it."""
    if not is_supported(module):
        return "belong to a subclass of torch's layers"
    if is_computed(module):
        return _COMPUTED
    if weights_per_filter(module) == 1:
        return _SINGLE
    return "belong to several layers" if id(module._parameters.get("weight")) in shared else None


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several layers hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _is_trained(layer: _BatchNorm) -> bool:
    """Return whether ``layer`` has running statistics from training, judged by a mean other than 0."""
    mean = layer.running_mean
    return mean is not None and not mean.is_meta and not is_fake(mean) and bool(mean.any())


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
