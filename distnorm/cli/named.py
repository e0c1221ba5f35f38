"""Load the user's functions that a command line names as ``module:function``: the model and its input."""

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
    """Return the function ``name``, written as ``module:function``. Modules of the working directory are found too.

    Raises:
        ValueError: ``name`` does not have this form, or there is no such module or function. The message names
            ``option``.
    """
    path, colon, attribute = name.partition(":")
    if not (colon and path and attribute):
        raise ValueError(f"{option} {name!r}: need module:function, such as torchvision.models:resnet50.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does; for an installed command, sys.path has its directory instead
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ValueError(f"{option} {name!r}: there is no module {error.name!r} in {here} or installed.") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = suggest(attribute, functions)
        raise ValueError(f"{option} {name!r}: module {path!r} has no function {attribute!r}{near}.")
    return found  # type: ignore[no-any-return]


def build_model(name: str, *, meta: bool = False) -> nn.Module:
    """Return the model of the function ``name``; with ``meta``, on the meta device if possible, without memory.

    Raises:
        ValueError: as ``load``; or it does not return a module, or one without batch norm.
    """
    build = load(name, "--model")
    model = _on_meta(build) if meta else build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name!r}: it returned {type(model).__name__}; need a torch.nn.Module.")
    if not any(isinstance(each, _BatchNorm) for each in model.modules()):
        kinds = sorted({type(each).__name__ for each in model.modules() if "Norm" in type(each).__name__})
        raise ValueError(
            f"--model {name!r}: {type(model).__name__} has no batch norm layer, so there is nothing to synchronize; "
            f"its norm layers: {', '.join(kinds) if kinds else 'none'}."
        )
    return model


def _on_meta(build: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError) as error:
        warnings.warn(
            f"the model cannot be built on torch's meta device, so its parameters need memory ({error}).", stacklevel=2
        )
        return build()
