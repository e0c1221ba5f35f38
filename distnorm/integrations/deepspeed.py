"""DeepSpeed: ``deepspeed.initialize`` converts the model, and the engine it returns ends steps and saves statistics.

Either one line in the script, ``distnorm.integrations.deepspeed.enable()``, or the run module, ``-m distnorm.run``. The
recipe stands there, or in the section ``"distnorm"`` of DeepSpeed's JSON.

The only user of what DeepSpeed's engine does not document (0.19.8; tests/integrations/test_deepspeed.py fails when it
changes): ``global_steps``, ``data_parallel_group`` and ``_zero3_consolidated_16bit_state_dict``.
"""

from __future__ import annotations

import atexit
import base64
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper, wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distnorm.attach import attach, end_step
from distnorm.diagnostics import Ledger
from distnorm.integrations import checkpoint
from distnorm.layers import weights
from distnorm.layers.module import DistNorm
from distnorm.methods.base import compute_dtype
from distnorm.settings import Settings

_PARTITIONED = 3
"""The stage of ZeRO that partitions parameters."""

SECTION = "distnorm"
"""The top-level key of DeepSpeed's JSON that holds what ``Settings.of`` reads."""


def enable(recipe: str | None = None, *, where: Sequence[str] = (), **options: object) -> None:
    """Let ``deepspeed.initialize`` convert models from now on; call it before. No collective.

    Models that are converted already stay as they are, and their steps, loss scale and checkpoints are wired all the
    same. Binding to DeepSpeed's data-parallel ranks, which is collective, happens in ``deepspeed.initialize``.

    Args:
        recipe: the name of a recipe; None leaves it to the section ``"distnorm"`` of DeepSpeed's JSON, without which
            nothing is converted.
        where: patterns of layer names; none means all layers.
        options: options of the recipe.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: unknown recipe, option or value; ``where`` or options without a recipe.
    """
    if recipe is None and (where or options):
        given = [*options, *(["where"] if where else [])]
        raise ValueError(f"enable({', '.join(given)}) needs a recipe too, such as enable('sync_bn', ...).")
    settings = None
    if recipe is not None:
        source = "distnorm.integrations.deepspeed.enable"
        settings = Settings(recipe=recipe, options=options, where=tuple(where), source=source)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ImportError("DeepSpeed is not installed: pip install 'distnorm[deepspeed]'.") from error
    wrap_initialize(deepspeed, settings)


def wrap_initialize(deepspeed: Any, settings: Settings | None, *, default: Settings | None = None) -> None:
    """Put a function of the same signature in the place of ``deepspeed.initialize``. No collective.

    Wrapped again, it keeps its settings unless new ones are given.

    Args:
        deepspeed: the module.
        settings: come first, before the section ``"distnorm"`` of each engine's configuration.
        default: come last, where there is no section; without them nothing is converted there.
    """
    if not isinstance(deepspeed.initialize, _Initialize):
        deepspeed.initialize = _Initialize(deepspeed.initialize, deepspeed.PipelineModule)
    deepspeed.initialize.settings = settings or deepspeed.initialize.settings
    deepspeed.initialize.default = default or deepspeed.initialize.default


class _Initialize:
    """``deepspeed.initialize``, with the model converted before the engine is built and attached after."""

    def __init__(self, original: Callable[..., tuple[Any, ...]], pipeline: type) -> None:
        self.original = original
        self.pipeline = pipeline
        self.settings: Settings | None = None
        self.default: Settings | None = None
        self.signature = inspect.signature(original)
        update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Build the engine. Collective as DeepSpeed's own, then as ``distnorm.attach``.

        Raises:
            ValueError: the section ``"distnorm"`` holds a key or value that is not allowed, or the model is a pipeline;
                before anything is built.
            RuntimeError: ranks converted different models or recipes.
        """
        given = self.signature.bind(*args, **kwargs).arguments
        model = given.get("model")
        if not isinstance(model, nn.Module):
            return self.original(*args, **kwargs)  # which says what it needs
        section = None if self.settings else _settings_of(_configuration(given))
        settings = self.settings or section or self.default
        if settings is not None:
            settings.convert(model)
        if not checkpoint.is_converted(model):
            return self.original(*args, **kwargs)
        if isinstance(model, self.pipeline):
            raise ValueError(
                "distnorm: DeepSpeed's pipeline engine is not supported; given is a converted PipelineModule. Train it "
                f'without the section "{SECTION}", enable and convert, or use ZeRO without pipeline parallelism.'
            )
        statistics = _running_statistics(model)
        built = self.original(*args, **kwargs)
        _widen(statistics)
        _wire(built[0])
        if section is not None and section.ledger:
            _print_at_exit(Ledger(model))
        return built


def _configuration(given: Mapping[str, Any]) -> Any:
    """What ``deepspeed.initialize`` takes for its configuration: a mapping, a path, or JSON in base64."""
    args = given.get("args")
    named = (getattr(args, name, None) for name in ("deepscale_config", "deepspeed_config"))
    candidates = (given.get("config"), given.get("config_params"), *named)
    return next((each for each in candidates if each is not None), None)


def _settings_of(configuration: Any) -> Settings | None:
    source = f'DeepSpeed configuration, section "{SECTION}"'
    if isinstance(configuration, str | os.PathLike):
        if os.path.exists(configuration):
            source = f'{os.fspath(configuration)}, section "{SECTION}"'
        configuration = _read(configuration)
    if not isinstance(configuration, Mapping) or SECTION not in configuration:
        return None
    return Settings.of(configuration[SECTION], source)


def _read(configuration: str | os.PathLike[str]) -> Any:
    hjson = importlib.import_module("hjson")  # what DeepSpeed reads with: its files may hold comments
    try:
        if os.path.exists(configuration):
            return hjson.loads(Path(configuration).read_text())
        return hjson.loads(base64.urlsafe_b64decode(os.fspath(configuration)).decode())
    except ValueError:
        return None  # DeepSpeed reads it next, and says what is wrong


def _print_at_exit(ledger: Ledger) -> None:
    ledger.__enter__()
    if dist.get_rank() == 0:
        atexit.register(lambda: print(f"distnorm: ledger\n{ledger}", file=sys.stderr, flush=True))


def _running_statistics(model: nn.Module) -> list[tuple[DistNorm, str, Tensor]]:
    """Converted layers, the names of their running statistics, and those as they are now, whatever is cast later."""
    layers = (each for each in model.modules() if isinstance(each, DistNorm))
    found = ((layer, name, getattr(layer, name)) for layer in layers for name in ("running_mean", "running_var"))
    return [(layer, name, buffer.detach()) for layer, name, buffer in found if buffer is not None]


def _widen(before: list[tuple[DistNorm, str, Tensor]]) -> None:
    """Undo what ``data_types.buffer_dtype`` and ``zero.Init`` do to running statistics past ``Module._apply``."""
    for layer, name, values in before:
        buffer = getattr(layer, name)
        if buffer.dtype != compute_dtype(buffer.dtype):
            buffer.data = values.to(device=buffer.device, dtype=compute_dtype(buffer.dtype))


def _wire(engine: Any) -> None:
    """Bind to the engine's data-parallel ranks; wire steps, loss scale and checkpoints."""
    scale = _LossScale()
    attach(engine.module, process_group=engine.data_parallel_group, loss_scale=scale.get, manual=True)
    for name in ("backward", "scale"):
        if hasattr(engine, name):  # old versions have no scale
            setattr(engine, name, scale.watch(getattr(engine, name)))
    engine.step = _ends_step(engine, engine.step)
    engine.save_checkpoint = _saves(engine, engine.save_checkpoint)
    engine.load_checkpoint = _loads(engine, engine.load_checkpoint)
    weights.goes_on(engine.module)  # the optimizer may step flat copies of them
    if engine.zero_optimization_stage() == _PARTITIONED:
        collect = "_zero3_consolidated_16bit_state_dict"
        setattr(engine, collect, _centres(engine, getattr(engine, collect)))


class _LossScale:
    """What the engine multiplies a loss by, measured: the gradient that comes back to the loss.

    Each kind of its optimizers keeps the scale elsewhere, and not all apply it: DeepSpeed 0.19.8 leaves the loss of
    fp16 with ZeRO 0 as it is (DeepSpeed pull request 8393). Gradient accumulation divides it, too.
    """

    def __init__(self) -> None:
        self._now: Tensor | float = 1.0

    def get(self) -> Tensor | float:
        return self._now

    def watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` of the engine, which takes a loss and scales it."""

        @wraps(method)
        def watched(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(self._note)
            return method(loss, *args, **kwargs)

        return watched

    def _note(self, gradient: Tensor) -> None:
        self._now = gradient.detach().double()


def _ends_step(engine: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, after which the step of moving statistics ends if gradients were complete.

    The engine counts a step that it skipped for an overflow too: all ranks end equally many steps, and the entry with
    NaN or Inf is dropped on all of them.
    """

    @wraps(method)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        before = engine.global_steps
        result = method(*args, **kwargs)
        if engine.global_steps != before:
            end_step(engine.module)
        return result

    return stepping


def _saves(engine: Any, save: Callable[..., Any]) -> Callable[..., Any]:
    """``save_checkpoint``, with this rank's state in the same folder; first, so that ``latest`` names whole folders."""
    signature = inspect.signature(save)

    @wraps(save)
    def saving(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        tag = given.get("tag")
        checkpoint.save(
            [engine.module], Path(given["save_dir"], f"global_step{engine.global_steps}" if tag is None else str(tag))
        )
        return save(*args, **kwargs)

    return saving


def _centres(engine: Any, collect: Callable[..., Any]) -> Callable[..., Any]:
    """``collect``, which gathers partitioned parameters past their layers' state_dict, with weights centred first."""

    @wraps(collect)
    def collecting(*args: Any, **kwargs: Any) -> Any:
        layers = weights.centralized(engine.module)
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([layer.weight for layer in layers], modifier_rank=0):
            weights.bake(engine.module)
        return collect(*args, **kwargs)

    return collecting


def _loads(engine: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """``load_checkpoint``, and this rank's state from the folder that it loaded, unless only the module was wanted."""
    signature = inspect.signature(load)

    @wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        if result[0] is not None and not signature.bind(*args, **kwargs).arguments.get("load_module_only"):
            checkpoint.load([engine.module], Path(result[0]).parent)
        return result

    return loading
