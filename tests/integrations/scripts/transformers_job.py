"""What tests/integrations/test_transformers.py looks at, on 2 ranks: ``transformers_job.py train|resume FOLDER``."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from distnorm.attach import conversions_of
from distnorm.integrations.transformers import DistNormCallback


class Model(nn.Module):
    """Without an HF config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 16, 4)
        self.losses: list[float] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.head(self.body(x)), labels)
        self.losses.append(loss.item())
        return {"loss": loss}


class Seen(TrainerCallback):
    """What callbacks are given, after ours has had its turn."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.facts["init"] = [type(objects["model"]).__name__, type(objects["model"].body[1]).__name__]

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer = objects["optimizer"]
        self.facts["begin"] = [type(objects["model"]).__name__, type(objects["model"].body[1]).__name__]
        self.facts["optimizer"] = [type(optimizer).__name__, type(optimizer.optimizer).__name__]
        self.facts["global_step"] = state.global_step


def data(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [
        (torch.randn(3, 6, 6, generator=generator), torch.randint(4, (), generator=generator)) for _ in range(count)
    ]
    return [{"x": x * 2 + 1, "labels": label} for x, label in draw]


def trainer_for(folder: Path, steps: int, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        save_steps=8,
        learning_rate=0.05,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(args=arguments, train_dataset=data(16 * steps), callbacks=callbacks, **options)


def mabn() -> DistNormCallback:
    return DistNormCallback("mabn", warmup=2, window=4)


def train(folder: Path, resume: str | None) -> dict[str, Any]:
    seen, model = Seen(), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = trainer_for(folder / "run", 16, [mabn(), seen], model=model, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    values = {name: value.double().flatten().tolist() for name, value in model.state_dict().items()}
    steps = [conversion.bound().step for conversion in conversions_of(model)]
    processes = trainer.accelerator.num_processes
    return {"losses": model.losses, "values": values, "steps": steps, "processes": processes, **seen.facts}


def late(folder: Path) -> dict[str, Any]:
    """Models that on_init_end does not see: ``model_init`` builds a new one, and ``add_callback`` comes after it."""
    result = {}
    for case in ("model_init", "add_callback"):
        given = {"model_init": Model} if case == "model_init" else {"model": Model()}
        trainer = trainer_for(folder / case, 3, [mabn()] if case == "model_init" else [], **given)
        if case == "add_callback":
            trainer.add_callback(mabn())
        trainer.train()
        result[case] = [conversion.bound().step for conversion in conversions_of(trainer.model)]
        result[f"{case} saved"] = distance_of_stock(trainer, folder / case / "saved")
    return result


def distance_of_stock(trainer: Trainer, folder: Path) -> float:
    """How far the stock model with the weights of ``save_model`` is from the trained one, in evaluation."""
    trainer.save_model(str(folder))
    dist.barrier()
    stock = Model()
    stock.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    x = torch.stack([each["x"] for each in data(8)])
    trained, stock = trainer.model.eval(), stock.eval()
    return float((trained.head(trained.body(x)) - stock.head(stock.body(x))).abs().max())


def main(phase: str, folder: Path) -> None:
    if phase == "train":
        result = train(folder, None) | {"late": late(folder)}
    else:
        result = train(folder, str(folder / "run" / "checkpoint-8"))
    (folder / f"{phase}_{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
