"""The life of a handle in one process: what is counted when, what is left alone, resuming, removing, bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import distnorm
from tests.preconditioning import reference
from tests.preconditioning.reference import RATE, Net, batch, loss_of

Handle = distnorm.Preconditioner
Optimizer = torch.optim.Optimizer


def start(net: nn.Module | None = None, **options: object) -> tuple[nn.Module, Optimizer, Handle]:
    net = net or Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    return net, optimizer, distnorm.precondition(net, optimizer, **{**reference.OPTIONS, **options})


def step(net: nn.Module, optimizer: Optimizer, at: int, run: Callable[[Tensor], Tensor] | None = None) -> None:
    optimizer.zero_grad()
    x, y = batch(at)
    (((net if run is None else run)(x) - y).square().sum() / len(x)).backward()
    optimizer.step()


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in net.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forward_passes_count_once(reentrant: bool) -> None:
    net, optimizer, _ = start()

    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

    for at in range(4):
        step(net, optimizer, at, run)
    torch.testing.assert_close(parameters(net), reference.train(range(4)))


def test_selective_checkpoints_do_not_see_the_sums() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def save(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    net, optimizer, _ = start()

    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save))

    for at in range(3):
        step(net, optimizer, at, run)
    torch.testing.assert_close(parameters(net), reference.train(range(3)))


def accumulate(net: nn.Module, optimizer: Optimizer, at: int, parts: int) -> None:
    optimizer.zero_grad()
    x, y = batch(at)
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (loss_of(net, part_x, part_y) / len(x)).backward()
    optimizer.step()


def test_gradient_accumulation_counts_all_micro_batches() -> None:
    net, optimizer, _ = start()
    for at, parts in enumerate([3, 3, 2, 3, 1]):
        accumulate(net, optimizer, at, parts)
    torch.testing.assert_close(parameters(net), reference.train(range(5)))


def test_micro_batches_beyond_those_of_any_step_before_count_one_step_later() -> None:
    net, optimizer, handle = start(momentum=1.0)
    for at, parts in enumerate([1, 2]):
        accumulate(net, optimizer, at, parts)
    assert handle.statistics.count.tolist() == [3 * 36, 3 * 9, 3]  # of 6 samples
    accumulate(net, optimizer, 2, 2)
    assert handle.statistics.count.tolist() == [9 * 36, 9 * 9, 9]


def test_forward_passes_that_no_backward_pass_follows_do_not_count() -> None:
    net, optimizer, _ = start()
    for at in range(3):
        with torch.no_grad():
            net(batch(50)[0])
        with torch.inference_mode():
            net(batch(51)[0])
        step(net, optimizer, at)
    torch.testing.assert_close(parameters(net), reference.train(range(3)))


def test_a_layer_used_twice_and_tied_layers_count_both_inputs() -> None:
    torch.manual_seed(0)
    once, twin = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    twin.weight, twin.bias = once.weight, once.bias
    tied = nn.Sequential(once, nn.Tanh(), twin)
    x = torch.randn(5, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.0)
    handle = distnorm.precondition(tied, optimizer, momentum=1.0)
    assert handle.layers == ["0"]
    hidden = torch.tanh(once(x))
    F.linear(hidden, once.weight, once.bias).sum().backward()  # functions are not seen
    optimizer.step()
    torch.testing.assert_close(handle.statistics.mean, x.mean(0))
    tied(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(handle.statistics.mean, torch.cat([x, hidden]).mean(0))
    once(torch.tanh(once(x))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(handle.statistics.mean, torch.cat([x, hidden]).mean(0))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.frozen = (nn.Linear(3, 3) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, through: bool = False) -> Tensor:
        return self.frozen(self.unused(self.used(x)) if through else self.used(x))


def test_layers_that_are_frozen_or_not_used_are_left_alone() -> None:
    net, optimizer, handle = start(Branches())
    before = parameters(net)
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    changed = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"used.weight", "used.bias"}
    assert handle.statistics.count.tolist() == [4, 0, 0]
    optimizer.zero_grad()
    net(torch.randn(4, 3), through=True).sum().backward()
    optimizer.step()
    assert handle.statistics.count.tolist() == [4, 4, 0]


def test_a_layer_whose_inputs_were_never_seen_keeps_its_gradient() -> None:
    """The output projection of an attention layer is used by a function."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    _, optimizer, handle = start(attention)
    assert handle.layers == ["out_proj"]
    x = torch.randn(2, 3, 4)
    attention(x, x, x)[0].square().sum().backward()
    before = attention.out_proj.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(attention.out_proj.weight.grad, before, rtol=0, atol=0)


def test_nan_does_not_enter_running_statistics() -> None:
    net, optimizer, handle = start()
    step(net, optimizer, 0)
    before = handle.statistics.of(0)
    x, y = batch(1)
    x[0, 1, 0, 0] = float("inf")
    loss_of(net, x, y).backward()
    optimizer.step()
    torch.testing.assert_close(handle.statistics.of(0), before, rtol=0, atol=0)
    assert all(each.isfinite().all() for each in (handle.statistics.mean, handle.statistics.var))


def test_a_closure_is_preconditioned_after_it_has_run() -> None:
    net, optimizer, _ = start()
    for at in range(3):

        def closure(at: int = at) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(at)
            loss = loss_of(net, x, y) / len(x)
            loss.backward()
            return loss

        optimizer.step(closure) if at % 2 else optimizer.step(closure=closure)
    torch.testing.assert_close(parameters(net), reference.train(range(3)))


def test_a_step_that_a_loss_scaler_skips() -> None:
    """Its statistics count in the next step; the collective of a later step leaves in its backward pass again."""
    net, optimizer, handle = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    seen = []
    for at in range(5):
        optimizer.zero_grad()
        x, y = batch(at)
        loss = loss_of(net, x, y) / len(x)
        scaler.scale(loss * float("inf") if at == 2 else loss).backward()
        seen.append((handle._step, handle._in_flight is not None))
        before = parameters(net)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before["head.bias"], net.head.bias) == (at == 2)
    assert seen == [(0, False), (1, True), (2, True), (2, True), (3, True)]
    assert all(each.isfinite().all() for each in net.parameters())


def test_scaled_gradients_give_scaled_results() -> None:
    results = []
    for scale in (1.0, 1024.0):
        net, optimizer, _ = start()
        x, y = batch(0)
        (scale * loss_of(net, x, y)).backward()
        optimizer.step()
        results.append({name: each.grad / scale for name, each in net.named_parameters()})
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("skipped", [False, True])
def test_resuming_is_exact_to_the_bit(skipped: bool) -> None:
    def run(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for at in steps:
            step(net, optimizer, at)

    def end_in_flight(net: nn.Module, optimizer: Optimizer) -> None:
        if skipped:  # statistics were sent, but there was no step
            loss_of(net, *batch(40)).backward()
            optimizer.zero_grad()

    net, optimizer, handle = start()
    run(net, optimizer, range(3))
    end_in_flight(net, optimizer)
    file = io.BytesIO()
    torch.save((net.state_dict(), handle.state_dict()), file)
    run(net, optimizer, range(3, 6))

    again, other, resumed = start()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(again, other, range(3, 6))
    torch.testing.assert_close(parameters(again), parameters(net), rtol=0, atol=0)
    first, second = handle.state_dict(), resumed.state_dict()
    assert first.pop("layers") == second.pop("layers")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_remove_leaves_a_plain_optimizer_and_no_hooks() -> None:
    net, optimizer, handle = start()
    handle.remove()
    handle.remove()
    plain = Net()
    other = torch.optim.SGD(plain.parameters(), lr=RATE)
    for at in range(2):
        step(net, optimizer, at)
        step(plain, other, at)
    torch.testing.assert_close(parameters(net), parameters(plain), rtol=0, atol=0)
    assert not any(module._forward_hooks for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks
    distnorm.precondition(net, optimizer)


def test_copies_and_pickles_are_not_preconditioned() -> None:
    net, optimizer, handle = start()
    step(net, optimizer, 0)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    count = handle.statistics.sums.clone()
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        loss_of(other, *batch(1)).backward()
        assert torch.equal(handle.statistics.sums, count)
        distnorm.precondition(other, torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models(whole: bool) -> None:
    net, optimizer, _ = start()
    if whole:
        run = torch.compile(net, backend="aot_eager")
    else:
        net.second.compile(backend="aot_eager")
        run = net
    for at in range(3):
        step(net, optimizer, at, run)
    torch.testing.assert_close(parameters(net), reference.train(range(3)))


def test_where_selects_layers_and_the_handle_says_what_was_left_out() -> None:
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "bare": nn.Linear(3, 4, bias=False),
            "up": nn.ConvTranspose2d(3, 4, 3),
            "foreign": nn.Linear(3, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "a": nn.Linear(3, 3),
            "b": nn.Linear(3, 3),
        }
    )
    net["b"].weight = net["a"].weight
    ours = [each for name, each in net.named_parameters() if not name.startswith("foreign")]
    handle = distnorm.precondition(net, torch.optim.SGD(ours, lr=0.1))
    assert handle.layers == ["conv"]
    assert handle.left_out == {
        "bare": "no parameter 'bias'",
        "up": "transposed convolutions are not covered",
        "foreign": "the optimizer does not step its weight and its bias",
        "normed": "its weight is computed from other parameters",
        "a": "it shares its weight or its bias, but not both, with another layer",
        "b": "it shares its weight or its bias, but not both, with another layer",
    }
    _, _, chosen = start(where=["first", "h*"])
    assert chosen.layers == ["first", "head"]
    _, _, chosen = start(where=lambda name, layer: isinstance(layer, nn.Linear))
    assert chosen.layers == ["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0}, r"precondition\(momentum=0\): need the newest value's weight, in \(0, 1\]"),
        ({"momentum": float("nan")}, r"precondition\(momentum=nan\)"),
        ({"damping": -0.1}, r"precondition\(damping=-0.1\): need a number, at least 0"),
        ({"eps": 0}, r"precondition\(eps=0\): need a number above 0"),
        ({"eps": float("inf")}, r"precondition\(eps=inf\)"),
        ({"scaling": 1}, r"precondition\(scaling=1\): need true or false"),
        ({"where": ["nothing"]}, r"precondition\(where=\['nothing'\]\) selects none of \['first', 'second', 'head'\]"),
        ({"process_group": "dp"}, r"precondition\(process_group='dp'\): not a process group"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_bad_models_and_optimizers() -> None:
    net, optimizer, _ = start()
    with pytest.raises(ValueError, match=r"first: preconditioned already. Call remove\(\)"):
        distnorm.precondition(net, optimizer)
    with pytest.raises(ValueError, match=r"0: LazyLinear is not initialized"):
        lazy = nn.Sequential(nn.LazyLinear(3))
        distnorm.precondition(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"0: the optimizer does not step its weight"):
        distnorm.precondition(nn.Sequential(nn.Linear(2, 2)), optimizer)
    with pytest.raises(ValueError, match=r"ReLU has no linear layer or convolution .* \(it has none\)"):
        distnorm.precondition(nn.ReLU(), optimizer)
    with pytest.raises(ValueError, match=r"LBFGS.*line search"):
        distnorm.precondition(Net(), torch.optim.LBFGS(Net().parameters()))
    with pytest.raises(ValueError, match=r"precondition\(model=.*need a Module"):
        distnorm.precondition(None, optimizer)
    with pytest.raises(ValueError, match=r"precondition\(optimizer=0.1\): need a Optimizer"):
        distnorm.precondition(net, 0.1)


def test_an_engine_that_steps_flat_copies_is_refused() -> None:
    net, optimizer, _ = start()
    flat = nn.Parameter(torch.cat([each.detach().reshape(-1) for each in net.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    loss_of(net, *batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"SGD does not step the parameters of \['first', 'second', 'head'\]"):
        optimizer.step()


def test_a_wrapper_of_accelerate_is_looked_through() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=RATE))
    distnorm.precondition(net, optimizer, **reference.OPTIONS)
    for at in range(3):
        x, y = batch(at)
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            with accelerator.accumulate(net):
                accelerator.backward(2 * loss_of(net, part_x, part_y) / len(x))
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(parameters(net), reference.train(range(3)))


def test_bad_states() -> None:
    _, _, handle = start()
    state = handle.state_dict()
    with pytest.raises(ValueError, match="got list"):
        handle.load_state_dict([state])
    with pytest.raises(ValueError, match="the state has version 2, but this distnorm reads version 1"):
        handle.load_state_dict({**state, "version": 2})
    _, _, other = start(where=["head"])
    with pytest.raises(ValueError, match=r"only one of the two has \['first: Conv2d \[4, 3, 3, 3\], groups=1', "):
        other.load_state_dict(state)
