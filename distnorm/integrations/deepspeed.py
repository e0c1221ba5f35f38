"""DeepSpeed: ``deepspeed.initialize`` converts the model, and the engine it returns ends steps and saves statistics.

The script calls ``distnorm.integrations.deepspeed.enable()``, or is started with the run module, ``-m distnorm.run``.
Both can name the recipe; otherwise it is in the section ``"distnorm"`` of DeepSpeed's JSON.

The only user of undocumented attributes of DeepSpeed's engine (0.19.8; tests/integrations/test_deepspeed.py fails when
they change): ``global_steps``, ``data_parallel_group`` and ``_zero3_consolidated_16bit_state_dict``.
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

from distnorm import messages
from distnorm.attach import attach, end_step
from distnorm.diagnostics import Ledger
from distnorm.integrations import checkpoint
from distnorm.layers import untrained, weights
from distnorm.layers.module import DistNorm
from distnorm.methods.base import compute_dtype
from distnorm.settings import Settings, as_it_is

_PARTITIONED = 3
"""The stage of ZeRO that partitions parameters."""

SECTION = "distnorm"
"""The top-level key of DeepSpeed's JSON that holds the section for ``Settings.of``."""


def enable(recipe: str | None = None, *, where: Sequence[str] = (), **options: object) -> None:
    """Let ``deepspeed.initialize`` convert models from now on. Call it before. Issues no collective.

    Models that are converted already are not converted again, but their steps, loss scale and checkpoints are connected
    too. ``deepspeed.initialize`` binds models to DeepSpeed's data-parallel ranks, which is collective.

    Args:
        recipe: the name of a recipe. None reads the section ``"distnorm"`` of DeepSpeed's JSON; without that section
            nothing is converted.
        where: patterns of layer names; if empty, all layers.
        options: options of the recipe.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: an unknown recipe, option or value; ``where`` or options without a recipe.
    """
    if recipe is None and (where or options):
        given = [*options, *(["where"] if where else [])]
        raise ValueError(f"enable({', '.join(given)}): need a recipe too, such as enable('sync_bn', ...).")
    settings = None
    if recipe is not None:
        source = "distnorm.integrations.deepspeed.enable"
        settings = Settings(recipe=recipe, options=options, where=tuple(where), source=source, required=True)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ImportError("DeepSpeed is not installed: pip install 'distnorm[deepspeed]'.") from error
    wrap_initialize(deepspeed, settings)


def wrap_initialize(deepspeed: Any, settings: Settings | None, *, default: Settings | None = None) -> None:
    """Replace ``deepspeed.initialize`` by a wrapper with the same signature. Issues no collective.

    A second call changes only the settings that it is given.

    Args:
        deepspeed: the module.
        settings: have precedence over the section ``"distnorm"`` of each engine's configuration.
        default: used if there is no section. If they are None too, nothing is converted.
    """
    if not isinstance(deepspeed.initialize, _Initialize):
        deepspeed.initialize = _Initialize(deepspeed.initialize, deepspeed.PipelineModule)
    deepspeed.initialize.settings = settings or deepspeed.initialize.settings
    deepspeed.initialize.default = default or deepspeed.initialize.default


class _Initialize:
    """Wraps ``deepspeed.initialize``: converts the model before the engine is built, and attaches it afterwards."""

    def __init__(self, original: Callable[..., tuple[Any, ...]], pipeline: type) -> None:
        self.original = original
        self.pipeline = pipeline
        self.settings: Settings | None = None
        self.default: Settings | None = None
        self.signature = inspect.signature(original)
        update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Build the engine. Collective, as DeepSpeed's own function and ``distnorm.attach``.

        Raises:
            ValueError: before anything is built, if the section ``"distnorm"`` has a key or value that is not allowed;
                or if code asks for a conversion, by ``enable`` or ``convert``, and the model cannot be converted or
                is a pipeline.
            RuntimeError: ranks converted different models or recipes.

        Warns:
            UserWarning: on the first rank, if a model cannot be converted that no code asks to convert.
        """
        given = self.signature.bind(*args, **kwargs).arguments
        model = given.get("model")
        if not isinstance(model, nn.Module):
            return self.original(*args, **kwargs)  # raises its own error
        section = None if self.settings else _settings_of(_configuration(given))
        settings = self.settings or section or self.default
        if isinstance(model, self.pipeline):
            self._refuse_pipeline(model, settings)
        elif settings is not None:
            settings.convert(model)
            untrained.adopt(model, untrained.groups_of(given.get("optimizer"), given.get("model_parameters")))
        if not checkpoint.is_converted(model):
            return self.original(*args, **kwargs)
        statistics = _running_statistics(model)
        built = self.original(*args, **kwargs)
        _restore_float32(statistics)
        _connect(built[0])
        if section is not None and section.ledger:
            _print_at_exit(Ledger(model))
        return built

    def _refuse_pipeline(self, model: nn.Module, settings: Settings | None) -> None:
        if checkpoint.is_converted(model) or (settings is not None and settings.required):
            raise ValueError(
                "distnorm: a PipelineModule is to be converted, and DeepSpeed's pipeline engine is not supported. "
                "Train it without convert and enable, or use ZeRO without pipeline parallelism."
            )
        if settings is not None:
            messages.warn(as_it_is(model, "DeepSpeed's pipeline engine is not supported"))


def _configuration(given: Mapping[str, Any]) -> Any:
    """Return the configuration given to ``deepspeed.initialize``: a mapping, a path, or JSON in base64."""
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
    hjson = importlib.import_module("hjson")  # as DeepSpeed does, since its files may have comments
    try:
        if os.path.exists(configuration):
            return hjson.loads(Path(configuration).read_text())
        return hjson.loads(base64.urlsafe_b64decode(os.fspath(configuration)).decode())
    except ValueError:
        return None  # DeepSpeed reads it next, and raises its own error


def _print_at_exit(ledger: Ledger) -> None:
    ledger.__enter__()
    if dist.get_rank() == 0:
        atexit.register(lambda: print(f"distnorm: ledger\n{ledger}", file=sys.stderr, flush=True))


def _running_statistics(model: nn.Module) -> list[tuple[DistNorm, str, Tensor]]:
    """Return converted layers with the names and current values of their running statistics, before any cast."""
    layers = (each for each in model.modules() if isinstance(each, DistNorm))
    found = ((layer, name, getattr(layer, name)) for layer in layers for name in ("running_mean", "running_var"))
    return [(layer, name, buffer.detach()) for layer, name, buffer in found if buffer is not None]


def _restore_float32(before: list[tuple[DistNorm, str, Tensor]]) -> None:
    """Undo casts of running statistics by ``data_types.buffer_dtype`` and ``zero.Init``, which bypass ``_apply``."""
    for layer, name, values in before:
        buffer = getattr(layer, name)
        if buffer.dtype != compute_dtype(buffer.dtype):
            buffer.data = values.to(device=buffer.device, dtype=compute_dtype(buffer.dtype))


def _connect(engine: Any) -> None:
    """Bind to the engine's data-parallel ranks, and connect steps, loss scale and checkpoints."""
    scale = _LossScale()
    attach(engine.module, process_group=engine.data_parallel_group, loss_scale=scale.get, manual=True)
    for name in ("backward", "scale"):
        if hasattr(engine, name):  # old versions have no scale
            setattr(engine, name, scale.watch(getattr(engine, name)))
    engine.step = _ends_step(engine, engine.step)
    engine.save_checkpoint = _saves(engine, engine.save_checkpoint)
    engine.load_checkpoint = _loads(engine, engine.load_checkpoint)
    weights.mark_trained(engine.module)  # the optimizer may step flat copies of the weights
    if engine.zero_optimization_stage() == _PARTITIONED:
        collect = "_zero3_consolidated_16bit_state_dict"
        setattr(engine, collect, _centres(engine, getattr(engine, collect)))


class _LossScale:
    """The factor by which the engine multiplies a loss, measured as the gradient with respect to the loss.

    Each of its optimizers stores the scale elsewhere, and not all apply it: DeepSpeed 0.19.8 does not scale the loss of
    fp16 with ZeRO 0 (DeepSpeed pull request 8393). Gradient accumulation divides the loss too.
    """

    def __init__(self) -> None:
        self._now: Tensor | float = 1.0

    def get(self) -> Tensor | float:
        return self._now

    def watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``method`` of the engine, which takes a loss and scales it, to measure the scale."""

        @wraps(method)
        def watched(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(self._note)
            return method(loss, *args, **kwargs)

        return watched

    def _note(self, gradient: Tensor) -> None:
        self._now = gradient.detach().double()


def _ends_step(engine: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``step`` of the engine: it also ends the step of moving statistics, if gradients were complete.

    The engine also counts steps that it skips for an overflow. All ranks therefore end equally many steps, and all drop
    the entry with NaN or Inf.
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
    """Wrap ``save_checkpoint``: first write this rank's state, so that ``latest`` always names a complete folder."""
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
    """Wrap ``collect``, which gathers partitioned parameters without ``state_dict``: centre weights first."""

    @wraps(collect)
    def collecting(*args: Any, **kwargs: Any) -> Any:
        layers = weights.centralized(engine.module)
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([layer.weight for layer in layers], modifier_rank=0):
            weights.write_centred(engine.module)
        return collect(*args, **kwargs)

    return collecting


def _loads(engine: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``load_checkpoint``: also load this rank's state from that folder, unless ``load_module_only`` is set."""
    signature = inspect.signature(load)

    @wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        if result[0] is not None and not signature.bind(*args, **kwargs).arguments.get("load_module_only"):
            checkpoint.load([engine.module], Path(result[0]).parent)
        return result

    return loading
