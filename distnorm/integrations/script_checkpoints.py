"""Moving statistics beside the checkpoints that a script writes by itself with ``torch.save``.

Saving: after the script has written values of a converted model to ``PATH``, the model's state goes to
``PATH.distnorm_state.pt``. Loading: after the script has read ``PATH``, the state waits for a model that has the
checkpoint's values when its training begins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
import torch.serialization
from torch import Tensor

from distnorm import messages
from distnorm.integrations import state_file
from distnorm.integrations.checkpoint import first_line
from distnorm.integrations.optimizers import in_use
from distnorm.integrations.patching import after_call
from distnorm.integrations.saved_values import has_all, is_named_in, place_of, plain_values, tensors_in, values_of
from distnorm.integrations.state_file import Entry, beside
from distnorm.layers.binding import Binding
from distnorm.layers.conversion import Conversion
from distnorm.layers.site import conversions

logger = logging.getLogger("distnorm")

_OWN = "distnorm"
"""A checkpoint with this key holds the state itself, as Lightning's does."""


@dataclass(eq=False)
class _Found:
    """An entry that was found for the checkpoint at ``path``, and what became of it."""

    path: Path
    entry: Entry
    taken: bool = False
    missed: bool = False
    """Whether an optimizer has stepped since."""
    told: bool = False


# docs/decisions.md#state-beside-a-scripts-checkpoint
class ScriptCheckpoints:
    """What the run module adds to ``torch.save`` and ``torch.load`` of a script.

    Issues no collective, since one rank alone may save or load. Nothing that fails ends the script.
    """

    def __init__(self) -> None:
        """Start with nothing loaded."""
        self._found: dict[Path, list[_Found]] = {}
        self._took: WeakSet[Conversion] = WeakSet()
        self._unsettled = False
        self._warned: set[str] = set()

    def watch(self) -> None:
        """Follow ``torch.save``, ``torch.load`` and the binding of conversions from now on."""
        for name, callback in (("save", self._saved), ("load", self._loaded)):
            after_call((torch, torch.serialization), name, callback)
        Conversion.find_state = self._find

    # --- saving ----------------------------------------------------------------------------------

    def _saved(self, _: None, obj: object, f: object, *args: object, **options: object) -> None:
        with self._going_on("no state of moving statistics is kept beside a checkpoint"):
            path = state_file.path_of(f)
            if path is None or state_file.SUFFIX not in path.name:
                self._keep(obj, path)

    def _keep(self, obj: object, path: Path | None) -> None:
        """Write the states of the models in ``obj``, which was saved to ``path``; remove what an earlier save left."""
        if path is not None:
            beside(path).unlink(missing_ok=True)
        training = list(_training())
        if not training or (isinstance(obj, Mapping) and _OWN in obj):
            return
        tensors = tensors_in(obj)
        named = [(each, binding) for each, binding in training if is_named_in(each, tensors)]
        if any(binding.thread != get_ident() for _, binding in named):
            self._warn("a checkpoint was saved in another thread than the one that trains, so no state is kept with it")
        places: dict[str, tuple[Conversion, dict[str, Tensor]]] = {}
        for each, binding in named:
            values = values_of(each) if binding.thread == get_ident() else {}
            place = place_of(values, tensors)
            if place is not None:
                places[place] = each, {name: tensors[place + name] for name in values}
        if places and path is None:
            self._warn("a checkpoint was not saved to a file with a name, so no state is kept beside it")
        elif places and path is not None:
            entries = [Entry(plain_values(values), each.state_dict()) for each, values in places.values()]
            state_file.write(path, entries)

    # --- loading ---------------------------------------------------------------------------------

    def _loaded(self, result: object, f: object, *args: object, **options: object) -> None:
        with self._going_on("no state of moving statistics is looked for", quietly=True):
            path = state_file.path_of(f)
            if path is not None and state_file.SUFFIX not in path.name:
                self._look_beside(path, result)

    def _look_beside(self, path: Path, result: object) -> None:
        tensors = tensors_in(result)
        for file in state_file.candidates(path, tensors):
            with self._going_on(f"{file} cannot be used", quietly=True):
                entries = state_file.fitting(file, tensors)
                if entries:
                    self._found[path] = [_Found(path, each) for each in entries]
                    self._unsettled = True
                    return
        if beside(path).is_file():
            self._warn(f"{path} is not what {beside(path)} was written with: windows start cold", quietly=True)

    def _find(self, conversion: Conversion) -> dict[str, Any] | None:
        """Return the state of the checkpoint whose values ``conversion`` has, which is about to train."""
        self._unsettled = True
        if not (self._found and conversion.facts.keeps_cotangents):
            return None
        with self._going_on("moving statistics start cold", quietly=True):
            live = values_of(conversion)
            for each in self._each_found():
                if has_all(each.entry.values, live):
                    each.taken = True
                    conversion.check_state(each.entry.state)
                    self._took.add(conversion)
                    return each.entry.state
        return None

    def _each_found(self) -> Iterator[_Found]:
        for found in reversed(self._found.values()):
            yield from found

    # --- what became of it -----------------------------------------------------------------------

    def before_step(self) -> None:
        """Before an optimizer steps: forget what was taken, and tell of what a model that trains has missed."""
        if not self._unsettled:
            return
        self._unsettled = False
        left = {path: [each for each in found if not each.taken] for path, found in self._found.items()}
        self._found = {path: found for path, found in left.items() if found}
        for each in self._each_found():
            each.missed = True
        with self._going_on("windows keep what they have", quietly=True):
            for conversion, binding in _training():
                self._tell_if_late(conversion, binding)

    def _tell_if_late(self, conversion: Conversion, binding: Binding) -> None:
        """Tell if ``conversion``, which trains, was given the parameters of a checkpoint, but no state of its step."""
        for each in self._each_found() if conversion not in self._took else ():
            parameters = {name: one for name, one in each.entry.values.items() if name.endswith(("weight", "bias"))}
            if not has_all(parameters, values_of(conversion)):
                continue
            each.told = True
            if binding.step != each.entry.state["step"]:  # else a framework or the script has loaded it
                self._warn(
                    f"{each.path} was loaded into a model that is training already: windows of moving statistics keep "
                    "what they have, since other ranks may not have loaded it",
                    quietly=True,
                )

    def report(self) -> None:
        """At the end of a job: tell of what no model took, although training went on."""
        for each in self._each_found():
            if each.missed and not (each.taken or each.told):
                misfits = [_misfit(conversion, each.entry) for conversion, _ in _training()]
                fits = "" in misfits
                why = "no model had its values when its training began" if fits else next(iter(misfits), "none trained")
                self._warn(
                    f"{beside(each.path)} was found, but moving statistics have started cold: {why}", quietly=True
                )

    @contextmanager
    def _going_on(self, failed: str, *, quietly: bool = False) -> Iterator[None]:
        """Warn of any exception in place of raising it: the script would have gone on without distnorm."""
        try:
            yield
        except Exception as error:
            self._warn(f"{failed}: {first_line(error)}", quietly=quietly)

    def _warn(self, text: str, *, quietly: bool = False) -> None:
        """Log ``text`` once; ``quietly``: on the first rank only, since the others have the same to say."""
        if text not in self._warned and (not quietly or messages.is_first_rank()):
            self._warned.add(text)
            logger.warning("distnorm.run: %s", text)


def _training() -> Iterator[tuple[Conversion, Binding]]:
    """Yield the conversions of this process that train with moving statistics, and their bindings."""
    for each in conversions():
        if each.binding is not None and each.facts.keeps_cotangents and in_use(each):
            yield each, each.binding


def _misfit(conversion: Conversion, entry: Entry) -> str:
    """Return why the state of ``entry`` is not of ``conversion``; empty if it is."""
    try:
        conversion.check_state(entry.state)
    except ValueError as error:
        return first_line(error)
    return ""
