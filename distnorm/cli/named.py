"""What a command line names by ``module:function``: the user's model and input."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.validation import suggest


def load(name: str, option: str) -> Callable[[], Any]:
    """The function that ``name`` writes as ``module:function``; modules of the working directory are found too.

    Raises:
        ValueError: not of this form, no such module, or no such function in it; ``option`` stands in the message.
    """
    path, colon, attribute = name.partition(":")
    if not (colon and path and attribute):
        raise ValueError(f"{option} {name!r}: write module:function, such as torchvision.models:resnet50.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does; an installed script has its own directory there
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ValueError(f"{option} {name!r}: there is no module {error.name!r} in {here} or installed.") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = suggest(attribute, functions)
        raise ValueError(f"{option} {name!r}: module {path!r} has no function {attribute!r}{near}.")
    return found  # type: ignore[no-any-return]


def build_model(name: str, *, meta: bool = False) -> nn.Module:
    """The model that the function ``name`` returns; with ``meta``, without memory for its parameters where that works.

    Raises:
        ValueError: as ``load``; it returns no module, or one without batch norm.
    """
    build = load(name, "--model")
    model = _on_meta(build) if meta else build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name!r}: it returned {type(model).__name__}; need a torch.nn.Module.")
    if not any(isinstance(each, _BatchNorm) for each in model.modules()):
        kinds = sorted({type(each).__name__ for each in model.modules() if "Norm" in type(each).__name__})
        raise ValueError(
            f"--model {name!r}: {type(model).__name__} has no batch norm layer, so there is nothing to synchronize; "
            f"its norm layers are {', '.join(kinds) if kinds else 'none at all'}."
        )
    return model


def _on_meta(build: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError) as error:
        warnings.warn(f"the model cannot be built on torch's meta device, so memory is used ({error}).", stacklevel=2)
        return build()
