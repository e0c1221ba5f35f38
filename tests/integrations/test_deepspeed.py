"""DeepSpeed's engine on real ranks: ZeRO 0 to 3, its steps, precisions, checkpoints and data-parallel group.

One job on 2 ranks runs all the engines that these tests look at; a second one, slow, runs the rest.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.scripts.deepspeed_models import STEPS, loss_of, model, piece

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "integrations" / "scripts"
# What DeepSpeed's CPU accelerator asks before it lets fp16 pass.
needs_fp16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU has no fp16")
HALVES = {name for name in ("fp16:0", "fp16:2", "fp16:3", "fp16:1") if torch.ops.mkldnn._is_mkldnn_fp16_supported()}

FAST = [
    "named", "misspelt", "exact:0", "exact:1", "exact:2", "exact:3", "bf16:0", "bf16:2", "moving_ddp", "moving:0",
    "moving:3", "stock:0", "stock:2", "stock:3", "fp32:0", *sorted(HALVES - {"fp16:1"}), "resumed:1", "resumed:3",
    "groups:1",
]  # fmt: skip
SLOW = [
    "moving_ddp", "fp32:0", "bf16:1", "bf16:3", "moving:1", "moving:2", "stock:1", *sorted(HALVES & {"fp16:1"}),
    "resumed:0", "resumed:2", "methods:1", "methods:2", "methods:3", "partitioned:3", "groups:0",
]  # fmt: skip
Ranks = list[dict[str, Any]]


def stages(case: str, *, fast: tuple[int, ...]) -> pytest.MarkDecorator:
    """Parametrize by the job that ran ``case`` and the ZeRO stage."""
    slow = tuple(stage for stage in range(4) if f"{case}:{stage}" in SLOW and stage not in fast)
    rows = [pytest.param("fast", stage) for stage in fast]
    rows += [pytest.param("slow", stage, marks=pytest.mark.slow) for stage in slow]
    return pytest.mark.parametrize(("ran", "stage"), rows, indirect=["ran"])


def torchrun(*command: str, ranks: int = 2, module: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("ACCELERATE_USE_CPU", None)  # accelerate 1.15 would leave DeepSpeed out
    launcher = ["-m", module, *(["--standalone", f"--nproc_per_node={ranks}"] if module.startswith("torch") else [])]
    done = subprocess.run(
        [sys.executable, *launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done


def outcome(folder: Path, cases: list[str], ranks: int = 2) -> Ranks:
    done = torchrun(str(SCRIPTS / "deepspeed_cases.py"), str(folder), *cases, ranks=ranks)
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    assert [each["ranks"] for each in found] == [ranks] * ranks
    found[0]["stderr"] = done.stderr
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return outcome(tmp_path_factory.mktemp("deepspeed"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return outcome(tmp_path_factory.mktemp("deepspeed"), SLOW)


@pytest.fixture
def ran(request: pytest.FixtureRequest) -> Ranks:
    ranks: Ranks = request.getfixturevalue(request.param)
    return ranks


def one_process(members: list[int], ranks: int) -> tuple[nn.Module, Tensor]:
    """Stock batch norm in float64 on the joined batches of ``members``; the losses, by step and member."""
    net = model().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        pieces = [piece(step, rank, ranks) for rank in members]
        logits = net(torch.cat([images for images, _ in pieces]).double())
        parts = zip(logits.chunk(len(members)), pieces, strict=True)
        each = torch.stack([loss_of(part.double(), labels) for part, (_, labels) in parts])
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        losses.append(each.detach())
    return net, torch.stack(losses)


def far(found: Any, expected: Any) -> float:
    """The largest difference between two lists or dicts of tensors."""
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = found.values(), expected.values()
    return max(float((one.double() - other.double()).abs().max()) for one, other in zip(found, expected, strict=True))


def agrees(ranks: Ranks, members: list[int], expected: tuple[nn.Module, Tensor], tolerance: float) -> None:
    net, losses = expected
    for column, rank in enumerate(members):
        found = ranks[rank]
        assert found["losses"] == pytest.approx(losses[:, column].tolist(), abs=tolerance)
        assert far(found["statistics"], dict(net.named_buffers())) < tolerance
        assert far(found["weights"], [each.detach() for each in net.parameters()]) < tolerance


@stages("exact", fast=(0, 1, 2, 3))
def test_sync_bn_trains_as_one_process_on_the_joined_batch(ran: Ranks, stage: int) -> None:
    agrees([each[f"exact:{stage}"] for each in ran], [0, 1], one_process([0, 1], 2), 1e-5)


@stages("bf16", fast=(0, 2))
def test_bf16_keeps_running_statistics_in_fp32(ran: Ranks, stage: int) -> None:
    """Although the configuration asks for bf16 buffers. Its step at 1 is 2^-8, and 20 steps of it were looked at."""
    for each in ran:
        dtypes = {name: value.dtype for name, value in each[f"bf16:{stage}"]["statistics"].items()}
        assert dtypes["1.running_mean"] == dtypes["4.running_var"] == torch.float32
    agrees([each[f"bf16:{stage}"] for each in ran], [0, 1], one_process([0, 1], 2), 0.05)


def acting(weights: list[Tensor]) -> list[Tensor]:
    """Filters as layers compute with them: ZeRO steps flat copies, whose filters are not centred by themselves."""
    return [each - each.mean((1, 2, 3), keepdim=True) if each.dim() == 4 else each for each in weights]


@stages("stock", fast=(0, 2, 3))
def test_what_is_saved_evaluates_in_the_stock_model(ran: Ranks, stage: int) -> None:
    """Centred weights, whichever copies of them the engine's optimizer steps."""
    found = ran[0][f"stock:{stage}"]
    net = model().to(found["y"].dtype)
    net.load_state_dict(torch.load(found["file"]), strict=True)
    y = net.eval()(piece(0, 0, 1)[0].to(found["y"].dtype))
    tolerance = 0.03 if stage else 1e-5
    torch.testing.assert_close(found["y"], y.detach(), rtol=tolerance, atol=tolerance)
    for place in (0, 3):
        weight = net[place].weight.detach().double()
        assert (weight.mean((1, 2, 3)).abs() < tolerance / 10 * weight.std((1, 2, 3))).all()


@stages("moving", fast=(0, 3))
def test_mabn_with_accumulation_is_what_it_is_in_torch(ran: Ranks, stage: int) -> None:
    for each in ran:
        found, expected = each[f"moving:{stage}"], each["moving_ddp"]
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert far(found["statistics"], expected["statistics"]) < 1e-5
        assert far(acting(found["weights"]), acting(expected["weights"])) < 1e-5


@stages("moving", fast=(0, 3))
def test_a_step_is_the_engines(ran: Ranks, stage: int) -> None:
    """Two micro-batches, two layers and two directions per warm-up step; one collective per step afterwards."""
    for each in ran:
        found = each[f"moving:{stage}"]
        assert found["step"] == STEPS
        assert found["collectives"] == dict.fromkeys(range(4), 8) | dict.fromkeys(range(4, STEPS), 1)


@needs_fp16
@stages("fp16", fast=(2, 3))
def test_fp16_overflows_leave_windows_clean(ran: Ranks, stage: int) -> None:
    found = [each[f"fp16:{stage}"] for each in ran]
    for each in found:
        assert 0 < each["skipped"] < STEPS - 5
        assert each["step"] == STEPS
        assert all(value.isfinite().all() for value in each["ring"])
    assert all(torch.equal(*rings) for rings in zip(*(each["ring"] for each in found), strict=True))
    assert any("NaN or Inf" in line for line in found[0]["log"])


@needs_fp16
@stages("fp16", fast=(0, 2, 3))
def test_fp16_windows_are_free_of_the_loss_scale(ran: Ranks, stage: int) -> None:
    """A scale that were left in, or taken out twice, would be off by more than 1000. ZeRO 0 does not apply it."""
    for each in ran:
        for found, expected in zip(each[f"fp16:{stage}"]["ring"], each["fp32:0"]["ring"], strict=True):
            assert (found - expected).norm() < 0.01 * expected.norm()


@stages("resumed", fast=(1, 3))
def test_a_checkpoint_resumes_bit_for_bit(ran: Ranks, stage: int) -> None:
    for each in ran:
        found = each[f"resumed:{stage}"]
        assert found["resumed"]["losses"] == found["straight"]["losses"]
        for kind in ("weights", "statistics"):
            assert far(found["resumed"][kind], found["straight"][kind]) == 0


@stages("resumed", fast=(1, 3))
def test_without_our_file_statistics_start_cold_and_say_so(ran: Ranks, stage: int) -> None:
    for each in ran:
        found = each[f"resumed:{stage}"]
        assert found["cold"]["losses"] != found["straight"]["losses"]
        assert "global_step6/distnorm_state_0.pt" in found["log"][-1] and "start cold" in found["log"][-1]


@stages("groups", fast=(1,))
def test_statistics_stay_in_the_data_parallel_group(ran: Ranks, stage: int) -> None:
    for rank, each in enumerate(ran):
        assert each[f"groups:{stage}"]["members"] == [rank]
        agrees([one[f"groups:{stage}"] for one in ran], [rank], one_process([rank], 2), 1e-5)


@pytest.mark.slow
def test_statistics_are_shared_in_each_data_parallel_group(tmp_path: Path) -> None:
    ran = outcome(tmp_path, ["groups:0"], ranks=4)
    for first in (0, 1):
        members = [first, first + 2]
        assert ran[first]["groups:0"]["members"] == members
        agrees([each["groups:0"] for each in ran], members, one_process(members, 4), 1e-5)


@stages("methods", fast=())
def test_methods_train_as_in_torch(ran: Ranks, stage: int) -> None:
    for each in ran:
        for recipe, (found, expected) in each[f"methods:{stage}"].items():
            assert found == pytest.approx(expected, abs=1e-6), recipe


@pytest.mark.slow
def test_parameters_that_zero_partitions_as_they_are_made(slow: Ranks) -> None:
    for each in slow:
        found = each["partitioned:3"]
        assert found["centralized"] == ["CentralizedConv2d", "CentralizedConv2d"]
        assert found["statistics"]["1.running_var"].dtype == torch.float32
        assert found["kinds"] == [type(layer).__name__ for layer in model()]
        assert (found["converted"] - found["reverted"]).abs().max() < 0.02


def test_a_misspelt_key_fails_on_every_rank(fast: Ranks) -> None:
    for each in fast:
        error, path = each["misspelt"]["error"], each["misspelt"]["path"]
        assert error.startswith(f"{path}, section \"distnorm\": unknown key 'recipes'")
        assert (
            "did you mean 'recipe'" in error
            and "allowed are recipe, options, where, fuse, ledger, save_state, transport" in error
        )


def test_what_we_use_of_deepspeed_is_there(fast: Ranks) -> None:
    """And what we replace keeps its signature."""
    for each in fast:
        found = each["named"]
        assert found["initialize"] == found["original"]
        assert found["data_parallel_ranks"] == [0, 1]
        assert found["global_steps"] == [0, 0, 1]
        assert found["arguments"] == {"scale": "loss", "save_checkpoint": "save_dir", "load_checkpoint": "load_dir"}
        assert {"tag"} <= found["save"] and {"tag", "load_module_only"} <= found["load"]


def test_the_section_can_ask_for_the_ledger(fast: Ranks) -> None:
    """Of the one step of ``named``: a collective per layer and direction, printed by rank 0 alone."""
    assert fast[0]["stderr"].count("distnorm: ledger") == 1
    (total,) = (line.split() for line in fast[0]["stderr"].splitlines() if line.startswith("total"))
    assert total[1] == "4"


@pytest.mark.slow
def test_the_example_trains_as_one_process_on_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    done = torchrun("examples/deepspeed_engine.py", "launch/deepspeed/zero2.json")
    (result,) = (json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT "))
    monkeypatch.syspath_prepend(ROOT / "examples")
    task = importlib.import_module("task")
    net = task.build_model()
    optimizer = torch.optim.SGD(net.parameters(), lr=task.LEARNING_RATE)
    losses = []
    for images, labels in task.train_loader():
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result["world_size"] == 2
    assert result["losses"] == pytest.approx(losses[:20], abs=1e-5)
    assert result["running_var"] == pytest.approx([net[at].running_var.sum().item() for at in (1, 5)], abs=1e-4)


@pytest.mark.slow
def test_accelerate_launch_honours_the_section(tmp_path: Path) -> None:
    config = json.loads((ROOT / "launch" / "deepspeed" / "zero1.json").read_text())
    config["distnorm"] = {"recipe": "mabn", "options": {"window": 4}}
    (tmp_path / "zero1.json").write_text(json.dumps(config))
    torchrun(
        "--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "zero1.json"), "--num_processes=2",
        "--main_process_port=0", "-m", "distnorm.run", str(SCRIPTS / "launch_deepspeed.py"), str(tmp_path),
        module="accelerate.commands.launch",
    )  # fmt: skip
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["processes"], first["kind"], first["layer"]) == (2, "DEEPSPEED", "DistBatchNorm2d")
    assert not any(first["running_mean"])  # mabn does not centre; sync_bn would have left means here
