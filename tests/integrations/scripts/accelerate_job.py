"""What tests/integrations/test_accelerate.py looks at, run on 2 ranks: ``accelerate_job.py train|resume FOLDER``."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations.accelerate import DistNormPlugin, keep_state

STEPS = 8


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def batches(count: int) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 8, 3, 6, 6, generator=generator) * 2 + 1
    return DataLoader(TensorDataset(x, torch.randint(4, (count * 8,), generator=generator)), batch_size=4)


def accelerator_with(recipe: str | None = "mabn", **options: Any) -> Accelerator:
    AcceleratorState._reset_state()
    accelerator = Accelerator(**options)
    assert accelerator.num_processes == 2
    if recipe is not None:
        DistNormPlugin(recipe, **({"warmup": 0, "window": 1} if recipe == "mabn" else {})).register(accelerator)
    return accelerator


def steps_of(model: nn.Module) -> list[int]:
    return [conversion.bound().step for conversion in conversions_of(model)]


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any) -> Iterator[float]:
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


def counted(optimizer: torch.optim.Optimizer) -> list[int]:
    taken: list[int] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    return taken


def accumulates(folder: Path) -> dict[str, Any]:
    """In separate calls, the optimizer first."""
    accelerator = accelerator_with(gradient_accumulation_steps=2)
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    taken = counted(optimizer)
    prepared = accelerator.prepare(optimizer)
    wrapped, loader = accelerator.prepare(model, batches(2 * STEPS))
    with distnorm.Ledger(model) as ledger:
        forwards = len(list(train(accelerator, wrapped, prepared, loader)))
    seen = {"forwards": forwards, "steps": steps_of(model), "taken": len(taken), "collectives": ledger.collectives}
    return {**seen, "distance": distance_of_stock(accelerator, wrapped, model, folder)}


def distance_of_stock(accelerator: Accelerator, wrapped: nn.Module, model: nn.Module, folder: Path) -> float:
    """How far the stock model with the weights of ``save_model`` is from the trained one, in evaluation."""
    accelerator.save_model(wrapped, str(folder / "model"))
    accelerator.wait_for_everyone()
    stock = small_model()
    stock.load_state_dict(load_file(folder / "model" / "model.safetensors"), strict=True)
    x = next(iter(batches(1)))[0]
    return float((model.eval()(x) - stock.eval()(x)).abs().max())


def successor() -> dict[str, Any]:
    """A new optimizer for the same model, as after an out-of-memory retry."""
    accelerator = accelerator_with()
    model = small_model()
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, batches(3))
        for _ in train(accelerator, wrapped, optimizer, loader):
            pass
        accelerator.free_memory()
    return {"steps": steps_of(model)}


def casts() -> dict[str, Any]:
    accelerator = accelerator_with(mixed_precision="bf16")
    model = small_model()
    seen: list[str] = []
    model[0].register_forward_hook(lambda _module, _given, y: seen.append(str(y.dtype)))
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), batches(STEPS)
    )
    losses = list(train(accelerator, wrapped, optimizer, loader))
    return {"dtypes": sorted(set(seen)), "running": str(model[1].running_var.dtype), "losses": losses}


def scales(scaled: bool) -> dict[str, Any]:
    """fp16's scaler: Accelerate makes none on CPU, so it is given one."""
    accelerator = accelerator_with()
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model = small_model()
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(12))
    losses = list(train(accelerator, wrapped, optimizer, loader))
    return {"losses": losses, "scale": accelerator.scaler.get_scale() if scaled else 1.0}


def adversaries() -> dict[str, Any]:
    """The generator learns every other iteration."""
    accelerator = accelerator_with()
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    make, judge = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (maker, critic))
    made, judged = counted(make), counted(judge)
    making, judging, make, judge = accelerator.prepare(maker, critic, make, judge)
    torch.manual_seed(accelerator.process_index)
    for iteration in range(6):
        fake = making(torch.randn(5, 4))
        accelerator.backward(judging(fake.detach()).mean())
        accelerator.backward(-judging(torch.randn(5, 6)).mean())
        judge.step()
        judge.zero_grad()
        if iteration % 2:
            accelerator.backward(-judging(fake).mean())
            make.step()
            make.zero_grad()
            judge.zero_grad()
    result = {"maker": steps_of(maker), "critic": steps_of(critic), "made": len(made), "judged": len(judged)}
    result["running"] = [maker[1].running_var.tolist(), critic[1].running_var.tolist()]
    return result


def resumable() -> tuple[Accelerator, nn.Module, Any, Any]:
    """By keep_state alone, as distnorm.run does it, for a model that is converted by hand."""
    accelerator = accelerator_with(recipe=None)
    keep_state(accelerator)
    model = distnorm.convert(small_model(), "mabn", warmup=2, window=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    distnorm.attach(model, optimizer=optimizer)
    return (accelerator, *accelerator.prepare(model, optimizer, batches(2 * STEPS)))


def goes_on(accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    losses = list(train(accelerator, model, optimizer, skip_first_batches(loader, STEPS)))
    values = {name: value.double().flatten().tolist() for name, value in model.state_dict().items()}
    return {"losses": losses, "values": values, "steps": steps_of(model)}


def saves(folder: Path) -> dict[str, Any]:
    accelerator, model, optimizer, loader = resumable()
    steps = train(accelerator, model, optimizer, loader)
    for _, _ in zip(range(STEPS), steps, strict=False):
        pass
    accelerator.save_state(str(folder / "saved"))
    return goes_on(accelerator, model, optimizer, loader)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resumes(folder: Path) -> dict[str, Any]:
    """From the whole checkpoint; from one of a larger job; from one without our files."""
    accelerator, model, optimizer, loader = resumable()
    accelerator.load_state(str(folder / "saved"))
    result: dict[str, Any] = {"whole": goes_on(accelerator, model, optimizer, loader)}
    handler = Lines()
    logging.getLogger("distnorm").addHandler(handler)
    for kind in ("larger", "lost"):
        if accelerator.is_main_process:
            shutil.copytree(folder / "saved", folder / kind)
            for path in (folder / kind).glob("distnorm_state_*.pt"):
                if kind == "larger":
                    state = torch.load(path, weights_only=True)
                    state["world_size"] = state["models"][0][0]["world_size"] = 4
                    torch.save(state, path)
                else:
                    path.unlink()
        accelerator.wait_for_everyone()
        accelerator, model, optimizer, loader = resumable()
        handler.lines.clear()
        accelerator.load_state(str(folder / kind))
        result[kind] = {"lines": list(handler.lines), "steps": steps_of(model)}
        result[kind]["losses"] = goes_on(accelerator, model, optimizer, loader)["losses"]
    return result


def main(phase: str, folder: Path) -> None:
    if phase == "train":
        result: dict[str, Any] = {"accumulates": accumulates(folder), "successor": successor(), "casts": casts()}
        result |= {"scaled": scales(True), "unscaled": scales(False)}
        result |= {"adversaries": adversaries(), "saves": saves(folder)}
    else:
        result = resumes(folder)
    accelerator = Accelerator()
    (folder / f"{phase}_{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
