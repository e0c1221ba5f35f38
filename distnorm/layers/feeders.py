"""Find the feeders of converted norms: the convolutions and linear layers whose outputs go to these norms.

The weight of a layer may be centred only if its output goes to converted norms and nowhere else. ``convert`` has no
input with which to check that. So it guesses from the order of registration, and ``Watch`` observes the first training
forward pass (docs/decisions.md#which-weights-are-centralized).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from distnorm.compat.dispatch_state import in_transform, is_fake
from distnorm.layers import weights
from distnorm.layers.centralized import TARGETS, Centralized, is_computed
from distnorm.layers.class_swap import underlying
from distnorm.layers.conversion import Conversion
from distnorm.layers.weights import outputs_of, weights_per_filter
from distnorm.types import Feeders

logger = logging.getLogger("distnorm")

_COPIES = frozenset("reshape flatten contiguous clone to type float half double bfloat16".split())
"""Functions that only copy values to another layout or dtype: their results are traced like their arguments."""


def centralize(model: nn.Module, layers: list[_BatchNorm], conversion: Conversion) -> None:
    """Centralize the guessed feeders of ``layers``; the first training forward pass of ``model`` corrects the guess.

    Warns:
        UserWarning: naming feeders with a single weight per filter, which centring would set to 0; it skips them.
    """
    shared = _shared_parameters(model)
    skipped = []
    for name, module, layer in list(_guess(model, layers)):
        if weights_per_filter(module) == 1:
            skipped.append(name)
        elif _can_be_centred(module, shared):
            weights.centralize(module, [layer], conversion, name, as_given=_is_trained(layer))
    if skipped:
        warnings.warn(
            f"distnorm: the weights of {skipped} are not centred: they have one weight per filter, which centring "
            "would set to 0.",
            stacklevel=4,
        )
    if layers:
        Watch(model, conversion)


def release(model: nn.Module) -> None:
    """Undo ``centralize``; parameters do not change."""
    for layer in weights.centralized(model):
        weights.release(layer)
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            watch = getattr(hook, "__self__", None)
            if isinstance(watch, Watch):
                watch.remove()


class Watch:
    """Hooks on a model that observe in its first training forward pass where outputs go, then remove themselves."""

    def __init__(self, model: nn.Module, conversion: Conversion) -> None:
        """Watch ``model``, whose norms belong to ``conversion``."""
        self.conversion = conversion
        self._uses: _Uses | None = None
        self._before = model.register_forward_pre_hook(self._begins)
        # Also called after a forward pass that raised.
        self._after = model.register_forward_hook(self._ends, always_call=True)

    def remove(self) -> None:
        """Remove the hooks."""
        self._before.remove()
        self._after.remove()

    def _begins(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not model.training or self._uses is not None:
            return
        if self.conversion.feeders.known:
            _apply(model, self.conversion)
            self.remove()
        elif not (in_transform() or any(_is_compiled(module) for module in model.modules())):
            self._uses = _Uses(model, [layer for _, layer in self.conversion.layers()])
            self._uses.__enter__()

    def _ends(self, model: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._uses is None:
            return
        uses, self._uses = self._uses, None
        uses.__exit__(None, None, None)
        if output is None or self.conversion.binding is None:
            return  # the forward pass raised, or no norm was in training mode: observe the next one
        _join(self.conversion.feeders, self.conversion.binding.gather_text(json.dumps(uses.corrections(output))))
        _apply(model, self.conversion)
        self.remove()


# docs/decisions.md#what-the-first-forward-pass-cannot-show
class _Uses(TorchFunctionMode):
    """Traces the outputs of a model's convolutions and linear layers during one forward pass."""

    def __init__(self, model: nn.Module, norms: list[_BatchNorm]) -> None:
        super().__init__()
        self.model = model
        self.norms_after: dict[str, list[str]] = {}
        """By layer, the norms that received its output."""
        self.elsewhere: set[str] = set()
        """Layers whose output went to something else."""
        self._seen: dict[int, tuple[str, Tensor]] = {}
        """Outputs, by ``_key``: the layer, and the tensor, which is kept alive so that its key is not reused."""
        self._ran: set[str] = set()
        self._inside = 0
        """How many norms are running: what they do with their inputs does not count."""
        wanted = {id(norm) for norm in norms}
        self._handles = []
        for name, module in model.named_modules():
            if id(module) in wanted:
                self._handles.append(module.register_forward_pre_hook(self._enters(name), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaves))
            elif _is_supported(module):
                self._handles.append(module.register_forward_hook(self._produced(name)))

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._seen or self._inside or torch.compiler.is_compiling():
            return result
        given = [each for each in _tensors((args, kwargs)) if _key(each) in self._seen]
        if given:
            self._note(getattr(func, "__name__", ""), given, list(_tensors(result)))
        return result

    def _note(self, function: str, given: list[Tensor], results: list[Tensor]) -> None:
        names = [self._seen[_key(each)][0] for each in given]
        if function in _COPIES:
            for each in results:
                self._seen[_key(each)] = names[0], each
        elif _changes_in_place(function, results) or not all(_is_whole(each, given) for each in results):
            self.elsewhere.update(names)

    def _produced(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            results = [each for each in _tensors(output) if each.numel()]  # an empty tensor has no memory as its key
            if results:
                self._ran.add(name)
            for each in results:
                self._seen[_key(each)] = name, each

        return note

    def _enters(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._ran.add(name)
            self._inside += 1
            for each in _tensors((args, kwargs)):
                if _key(each) in self._seen:
                    self.norms_after.setdefault(self._seen[_key(each)][0], []).append(name)

        return note

    def _leaves(self, *_: Any) -> None:
        self._inside -= 1

    def corrections(self, output: Any) -> dict[str, Any]:
        """Return where the guess was wrong on this rank, in a forward pass that returned ``output``."""
        self.elsewhere.update(self._seen[_key(each)][0] for each in _tensors(output) if _key(each) in self._seen)
        names = {id(module): name for name, module in self.model.named_modules()}
        left, feeds = [], {}
        for name, layer in self.model.named_modules():
            guess = sorted(names[id(norm)] for norm in layer._norms) if isinstance(layer, Centralized) else []
            found = [] if name in self.elsewhere else sorted(set(self.norms_after.get(name, ())))
            if found and found != guess:
                feeds[name] = found
            elif guess and not found and name in self._ran and (name in self.elsewhere or self._ran & {*guess}):
                left.append(name)
        return {"left": left, "feeds": feeds}


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
    shared = _shared_parameters(model)
    for name, norm_names in conversion.feeders.feeds.items():
        module, norms = model.get_submodule(name), tuple(model.get_submodule(norm) for norm in norm_names)
        if isinstance(module, Centralized):
            module._norms = norms
        elif _can_be_centred(module, shared) and weights_per_filter(module) > 1:
            weights.centralize(module, norms, conversion, name, as_given=True)
    weights.exclude(model)
    if conversion.feeders.left:
        logger.warning(
            "distnorm: the weights of %s are not centred, since the outputs of these layers do not go to converted "
            "norms only",
            ", ".join(sorted(conversion.feeders.left)),
        )


def _guess(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[tuple[str, nn.Module, _BatchNorm]]:
    """Yield the guessed feeder of each of ``layers``: the nearest layer registered before it with as many outputs.

    Most models register layers in the order of their calls. Blocks that register all convolutions before all norms are
    paired differently, but the set of feeders is the same.
    """
    wanted = {id(layer) for layer in layers}
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


def _is_whole(tensor: Tensor, given: list[Tensor]) -> bool:
    """Return whether ``tensor`` is one of ``given`` or a view of all of it, as engines create in their hooks."""
    return any(_key(tensor) == _key(each) and tensor.numel() == each.numel() for each in given)


def _changes_in_place(function: str, results: list[Tensor]) -> bool:
    if function.startswith("__"):  # y += x, y[i] = x or x[i] = y, and also y.shape
        return function == "__setitem__" or (function.startswith("__i") and bool(results))
    return function.endswith("_")


def _is_supported(module: nn.Module) -> bool:
    return isinstance(module, Centralized) or underlying(module) in TARGETS


def _can_be_centred(module: nn.Module, shared: set[int]) -> bool:
    """Return whether the weight of ``module`` is a parameter, and no other layer has it."""
    return _is_supported(module) and not is_computed(module) and id(module._parameters.get("weight")) not in shared


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


def _key(tensor: Tensor) -> int:
    """Return the address of its memory, since engines pass outputs through Functions that return other objects."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and tensor.untyped_storage().data_ptr()) or id(tensor)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
