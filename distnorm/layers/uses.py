"""Trace where the outputs of convolutions and linear layers go in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distnorm.layers.centralized import TARGETS
from distnorm.layers.class_swap import underlying
from distnorm.layers.conversion import Conversion
from distnorm.layers.reweighted import Reweighted
from distnorm.layers.tracing import ADDS

_COPIES = frozenset("reshape flatten contiguous clone to type float half double bfloat16".split())
"""Functions that only copy values to another layout or dtype: their results are traced like their arguments."""


# docs/decisions.md#what-the-first-forward-pass-cannot-show
class Uses(TorchFunctionMode):
    """Traces the outputs of a model's convolutions and linear layers during one forward pass."""

    def __init__(self, model: nn.Module, conversion: Conversion) -> None:
        """Trace ``model``, as far as it concerns the norms of ``conversion``, from ``__enter__`` to ``__exit__``."""
        super().__init__()
        self.model = model
        self.conversion = conversion
        self.norms_after: dict[str, list[str]] = {}
        """By layer, the norms that received its output."""
        self.elsewhere: set[str] = set()
        """Layers whose output went to something else."""
        self._seen: dict[int, tuple[str, Tensor]] = {}
        """Outputs, by ``_key``: the layer, and the tensor, which is kept alive so that its key is not reused."""
        self._ran: set[str] = set()
        self._inside = 0
        """How many norms are running: what they do with their inputs does not count."""
        wanted = {id(norm) for _, norm in conversion.layers() if normalizes_input(norm)}
        self._handles = []
        for name, module in model.named_modules():
            if id(module) in wanted:
                self._handles.append(module.register_forward_pre_hook(self._enters(name), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaves))
            elif is_supported(module):
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
            ours = isinstance(layer, Reweighted) and layer._conversion is self.conversion
            guess = sorted(names[id(norm)] for norm in layer._norms) if ours else []
            found = [] if name in self.elsewhere else sorted(set(self.norms_after.get(name, ())))
            if found and found != guess:
                feeds[name] = found
            elif guess and not found and name in self._ran and (name in self.elsewhere or self._ran & {*guess}):
                left.append(name)
        return {"left": left, "feeds": feeds}


def normalizes_input(norm: nn.Module) -> bool:
    """Return whether ``norm`` is known to normalize what it is given; the class of a user may change it before."""
    return not getattr(norm, ADDS, False)


def is_supported(module: nn.Module) -> bool:
    """Return whether recipes can compute the weight of ``module``, or do so already."""
    return isinstance(module, Reweighted) or underlying(module) in TARGETS


def _is_whole(tensor: Tensor, given: list[Tensor]) -> bool:
    """Return whether ``tensor`` is one of ``given`` or a view of all of it, as engines create in their hooks."""
    return any(_key(tensor) == _key(each) and tensor.numel() == each.numel() for each in given)


def _changes_in_place(function: str, results: list[Tensor]) -> bool:
    if function.startswith("__"):  # y += x, y[i] = x or x[i] = y, and also y.shape
        return function == "__setitem__" or (function.startswith("__i") and bool(results))
    return function.endswith("_")


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
