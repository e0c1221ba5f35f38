"""The methods beyond batch norm against transcriptions of their equations, on one rank: tests/support/reference.py.

Ranks that share are in tests/laws, what else a layer must do in tests/test_every_method.py.
"""

from __future__ import annotations

import itertools
from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.methods import (
    IEBN,
    L1,
    MAD,
    SQD,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Method,
    MixtureNorm,
    Range,
    Semideviation,
    WorstCase,
)
from distnorm.policies import AllReduce
from tests.support import reference
from tests.support.reference import MixtureState, Pair

EXACT_PAIRS: dict[str, tuple[Method, Pair]] = {
    "sd": (BatchNorm(), reference.sd),
    "l1": (L1(), reference.l1),
    "semideviation": (Semideviation(), reference.semideviation),
    "range": (Range(), reference.value_range),
    "worst_case": (WorstCase(), reference.worst_case),
    "mad": (MAD(exact=True), reference.mad),
    "sqd(0.7)": (SQD(exact=True), reference.superquantile(0.7)),
    "sqd(0.35)": (SQD(alpha=0.35, exact=True), reference.superquantile(0.35)),
    "first step of mad": (MAD(), reference.normal_pair(0.5)),
    "first step of sqd(0.8)": (SQD(alpha=0.8), reference.normal_pair(0.8)),
}
SHAPES = [(7, 3), (4, 3, 5), (2, 3, 3, 2)]


def layer_of(method: Method, dtype: torch.dtype = torch.float64, *, features: int = 3, eps: float = 1e-5) -> nn.Module:
    layer = nn.SyncBatchNorm(features, eps=eps, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    layer.weight.data.copy_(torch.rand(features, generator=generator) + 0.5)
    layer.bias.data.copy_(torch.randn(features, generator=generator))
    return distnorm.convert(layer, Recipe(method=method, policy=AllReduce()))


def skewed(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).exp() * 2 + 1).to(dtype).requires_grad_()


def over_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def assert_gradients_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor], given: list[Tensor]) -> None:
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, given, dy))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "pair"), EXACT_PAIRS.values(), ids=EXACT_PAIRS.keys())
class TestPairs:
    def test_output_gradients_and_running_statistics(self, method: Method, pair: Pair, shape: tuple[int, ...]) -> None:
        layer, x = layer_of(method), skewed(shape)
        found = reference.generalized([x], layer.weight, layer.bias, pair=pair)
        y = layer(x)
        torch.testing.assert_close(y, found.outputs[0])
        leaves = [x, layer.weight, layer.bias]
        assert_gradients_equal(y, found.outputs[0], leaves, leaves)
        count = x[:, 0].numel() if isinstance(method, BatchNorm) else torch.inf  # batch norm's is unbiased
        var = found.running_var if count == torch.inf else 0.9 + (found.running_var - 0.9) * count / (count - 1)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (found.running_mean, var))
        wide = (1, 3, *(1,) * (x.dim() - 2))
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        expected = (x - layer.running_mean.view(wide)) * scale.view(wide) + layer.bias.view(wide)
        torch.testing.assert_close(layer.eval()(x), expected)

    def test_what_every_pair_keeps(self, method: Method, pair: Pair, shape: tuple[int, ...]) -> None:
        """S moves and scales with x, D scales with it: sum dx = 0, and sum x dx = 0 as eps goes to 0."""
        layer, x = layer_of(method, eps=1e-12), skewed(shape)
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        for invariant in (over_channel(dx), over_channel(x * dx)):
            torch.testing.assert_close(invariant, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)

    def test_gradcheck(self, method: Method, pair: Pair, shape: tuple[int, ...]) -> None:
        """Where no two values are equal, which is where the gradient exists. Without momentum, buffers stay."""
        layer, x = layer_of(method), skewed(shape)
        layer.momentum = 0.0
        assert torch.autograd.gradcheck(layer, (x,), eps=1e-7, atol=1e-4, nondet_tol=0)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("method", "pair"), EXACT_PAIRS.values(), ids=EXACT_PAIRS.keys())
def test_float32(method: Method, pair: Pair, mean: float) -> None:
    """Errors are those of values of this size in float32, whatever the mean."""
    x = (skewed((16, 3, 8), dtype=torch.float32) + mean).detach()
    layer = layer_of(method, torch.float32)
    expected = reference.generalized([x], layer.weight, layer.bias, pair=pair).outputs[0]
    assert (layer(x) - expected).abs().max() < 16 * torch.finfo(torch.float32).eps * (x.abs().max() + 10)


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0, 1.0, 5.0], [1.0, 2.0, 5.0, 5.0, 5.0]], ids=str)
@pytest.mark.parametrize("name", ["range", "worst_case", "mad", "sqd(0.7)", "l1", "semideviation"])
def test_tied_values(name: str, values: list[float]) -> None:
    """They share what is due to the maximum; constant channels become the bias, with finite gradients."""
    method, pair = EXACT_PAIRS[name]
    x = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 3).repeat(2, 1).requires_grad_()
    layer = layer_of(method)
    y, expected = layer(x), reference.generalized([x], layer.weight, layer.bias, pair=pair).outputs[0]
    torch.testing.assert_close(y, expected)
    dy = torch.arange(y.numel(), dtype=torch.float64).view_as(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(over_channel(dx), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    if name in ("range", "worst_case"):
        torch.testing.assert_close(dx, *torch.autograd.grad(expected, x, dy))


# --- IEBN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iebn(shape: tuple[int, ...]) -> None:
    layer, x = layer_of(IEBN()), skewed(shape)
    assert layer.gate_weight.tolist() == [0.0] * 3 and layer.gate_bias.tolist() == [-1.0] * 3
    layer.gate_weight.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    layer.momentum = 0.1
    parameters = [layer.weight, layer.bias, layer.gate_weight, layer.gate_bias]
    found = reference.instance_enhancement(
        [x], layer.weight, layer.bias, gate_weight=layer.gate_weight, gate_bias=layer.gate_bias
    )
    y = layer(x)
    torch.testing.assert_close(y, found.outputs[0])
    assert_gradients_equal(y, found.outputs[0], [x, *parameters], [x, *parameters])
    torch.testing.assert_close((layer.running_mean, layer.running_var), found[1:])
    layer.momentum = 0.0
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-7, atol=1e-4)


def test_iebn_evaluates_with_its_gate() -> None:
    layer, x = layer_of(IEBN()), skewed((4, 3, 5))
    layer(x)
    layer.eval().gate_weight.data.fill_(1.0)
    gate = (x.mean(2, keepdim=True) - 1).sigmoid()
    normalized = (x - layer.running_mean[:, None]) / (layer.running_var[:, None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), normalized * gate * layer.weight[:, None] + layer.bias[:, None])


# --- mixtures -------------------------------------------------------------------------------------


class Followed(NamedTuple):
    """A reference of ``MixtureNorm`` over steps: the averages that are its running state."""

    weight: Tensor
    mean: Tensor
    var: Tensor

    @property
    def state(self) -> MixtureState:
        return MixtureState(
            self.weight / self.weight.sum(), self.mean / self.weight[:, None], self.var / self.weight[:, None]
        )

    def moved(self, to: MixtureState) -> Followed:
        return Followed(
            0.9 * self.weight + 0.1 * to.weights.detach(),
            0.9 * self.mean + 0.1 * (to.weights[:, None] * to.means).detach(),
            0.9 * self.var + 0.1 * (to.weights[:, None] * to.variances).detach(),
        )


def samples(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def spread(x_PC: Tensor, components: int) -> MixtureState:
    places = [NormalDist().inv_cdf((each + 0.5) / components) for each in range(components)]
    place = torch.tensor(places, dtype=torch.float64)[:, None]
    mean, var = x_PC.mean(0), x_PC.var(0, correction=0)
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    return MixtureState(weights, mean + place * var.sqrt(), (var * (1 - place.square().mean())).expand(components, -1))


def fitted(x_PC: Tensor, before: Followed | None, components: int, rounds: int) -> tuple[Tensor, MixtureState]:
    if before is None:
        belongs = torch.full((len(x_PC), components), 1 / components, dtype=torch.float64)
        state = reference.mixture_of(x_PC, belongs)
    else:
        belongs, state = reference.mixture_step(x_PC, before.state, 1e-5)
    for number in range(1, rounds):
        start = spread(x_PC, components) if before is None and number == 1 else state
        belongs, state = reference.mixture_step(x_PC, start, 1e-5)
    return belongs, state


def two_modes(shape: tuple[int, ...], step: int, *, apart: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mode = (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5) * apart
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mode).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(30, 3), (6, 3, 7), (5, 3, 4, 2)], ids=str)
@pytest.mark.parametrize(("components", "rounds"), [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_mixture(components: int, rounds: int, shape: tuple[int, ...]) -> None:
    """Four steps: the first is batch norm or starts from spread components, the others from the running mixture."""
    layer, before = layer_of(MixtureNorm(components=components, rounds=rounds)), None
    for step in range(4):
        x = two_modes(shape, step)
        belongs, state = fitted(samples(x), before, components, rounds)
        out = reference.mixture_output(samples(x), belongs, state, layer.eps) * layer.weight + layer.bias
        y = layer(x)
        torch.testing.assert_close(samples(y), out)
        assert_gradients_equal(samples(y), out, [x, layer.weight, layer.bias], [x, layer.weight, layer.bias])
        start = spread(samples(x), components) if before is None and rounds == 1 else state
        zero = torch.zeros_like(start.means)
        before = (before or Followed(torch.zeros(components, dtype=torch.float64), zero, zero)).moved(start)
        torch.testing.assert_close(layer.component_weight, before.weight)
        torch.testing.assert_close((layer.component_mean, layer.component_var), tuple(before[1:]))
    x = two_modes(shape, 9)
    belongs, _ = reference.mixture_step(samples(x), before.state, layer.eps)
    out = reference.mixture_output(samples(x), belongs, before.state, layer.eps) * layer.weight + layer.bias
    torch.testing.assert_close(samples(layer.eval()(x)), out)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_gradient_of_a_mixture_is_exact(rounds: int) -> None:
    """Through all rounds, with the running mixture held constant."""
    layer = layer_of(MixtureNorm(rounds=rounds))
    for step in range(3):
        layer(two_modes((8, 3, 4), step))
    layer.momentum = 0.0
    assert torch.autograd.gradcheck(layer, (two_modes((4, 3, 3), 7),), eps=1e-7, atol=1e-4)


def test_one_component_is_batch_norm() -> None:
    x = two_modes((8, 3, 4), 0)
    y = layer_of(MixtureNorm(components=1))(x)
    torch.testing.assert_close(y, layer_of(BatchNorm())(x))


def test_components_keep_their_places_and_the_output_its_variance() -> None:
    """Two modes far apart, over 60 steps: each has its component, and the variance is 1, where the paper's is 2."""
    layer = layer_of(MixtureNorm(components=2, rounds=1))
    layer.weight.data.fill_(1.0)
    layer.bias.data.zero_()
    places = []
    for step in range(60):
        y = layer(two_modes((16, 3, 8), step, apart=20.0))
        places.append(layer.component_mean / layer.component_weight[:, None])
    assert all((place[1] > place[0]).all() for place in places)
    torch.testing.assert_close(places[-1][:, 0], torch.tensor([0.0, 20.0], dtype=torch.float64), rtol=0, atol=0.2)
    torch.testing.assert_close(y.var((0, 2), correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_component_without_samples_keeps_its_place() -> None:
    layer = layer_of(MixtureNorm(components=2, rounds=1))
    for step in range(20):
        layer(two_modes((16, 3, 8), step, apart=20.0))
    place = (layer.component_mean / layer.component_weight[:, None])[1].clone()
    for step in range(400):
        y = layer(two_modes((4, 3, 8), step, apart=0.0))
    assert y.isfinite().all() and float(layer.component_weight[1]) < 1e-5
    torch.testing.assert_close(layer.component_mean[1] / layer.component_weight[1], place)
    for step in range(3):
        layer(two_modes((16, 3, 8), step, apart=20.0))
    assert float(layer.component_weight[1]) > 0.1


def test_a_mixture_in_float32() -> None:
    wide, narrow = layer_of(MixtureNorm(), features=32), layer_of(MixtureNorm(), torch.float32, features=32)
    for step in range(8):
        x = two_modes((8, 32, 5), step, apart=3.0) + 100
        ours, theirs = narrow(x.float()), wide(x)
    assert (ours - theirs).abs().max() < 0.01 * theirs.std()


# --- samples by themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 5), (2, 6, 3, 2), (1, 6, 2), (0, 6, 2)], ids=str)
@pytest.mark.parametrize(
    ("method", "groups"),
    [(LayerNorm(), 1), (GroupNorm(groups=2), 2), (GroupNorm(), 6), (InstanceNorm(), None)],
    ids=str,
)
def test_each_sample_by_itself(method: Method, groups: int | None, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(method, features=6), skewed(shape)
    found = reference.group_norm([x], layer.weight, layer.bias, groups=groups)
    with distnorm.Ledger(layer) as ledger:
        y = layer(x)
    torch.testing.assert_close(y, found.outputs[0])
    assert_gradients_equal(y, found.outputs[0], [x, layer.weight, layer.bias], [x, layer.weight, layer.bias])
    torch.testing.assert_close(layer.eval()(x), y)
    assert ledger.collectives == 0 and not layer.running_mean.any() and (layer.running_var == 1).all()


def test_layer_norm_of_vectors_is_torchs() -> None:
    x, layer, stock = skewed((4, 6)), layer_of(LayerNorm(), features=6), nn.LayerNorm(6, dtype=torch.float64)
    stock.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    torch.testing.assert_close(layer(x), stock(x))


@pytest.mark.parametrize(("features", "groups"), [(64, 32), (48, 24), (3, 3), (37, 1), (512, 32), (33, 11)])
def test_groups_adapt_to_channels(features: int, groups: int) -> None:
    assert GroupNorm().groups_of(features) == groups
    GroupNorm().check(features)


# --- thresholds that follow -----------------------------------------------------------------------


def test_later_steps_of_a_threshold() -> None:
    """Against the equations with the buffers of each step as numbers: output, gradients, and where buffers move."""
    alpha = 0.8
    layer = layer_of(SQD(alpha=alpha))
    normal = NormalDist()
    gain = (1 - alpha) / normal.pdf(normal.inv_cdf(alpha)) ** 2
    followed = 0
    for step in range(12):
        x = skewed((4, 3, 12), step)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        place = before["threshold"] / before["threshold_weight"]
        parts = [(x[:, channel] > place[channel]).double().mean() for channel in range(3)]
        near = [step > 0 and (1 - alpha) / 4 < part < 1 - alpha / 4 for part in parts]
        pairs = [
            reference.above_threshold(alpha, float(place[c]), float(before["position"][c]))
            if near[c]
            else reference.normal_pair(alpha)
            for c in range(3)
        ]
        followed += sum(near)
        found = reference.generalized([x], layer.weight, layer.bias, pair=pairs)
        y = layer(x)
        torch.testing.assert_close(y, found.outputs[0])
        leaves = [x, layer.weight, layer.bias]
        assert_gradients_equal(y, found.outputs[0], leaves, leaves)
        for c, pair in enumerate(pairs):
            statistic, deviation = pair(x[:, c].flatten())
            torch.testing.assert_close(layer.threshold[c], before["threshold"][c] * 0.9 + 0.1 * statistic.detach())
            seen = (place[c] - x[:, c].mean()) / deviation + gain * (parts[c] - (1 - alpha))
            target = seen.clamp(-(1 - alpha) / alpha, 1) if near[c] else before["position"][c]
            torch.testing.assert_close(layer.position[c], (before["position"][c] * 0.9 + 0.1 * target).detach())
    assert followed > 20


DISTRIBUTIONS = {"normal": lambda x: x, "skewed": torch.exp, "heavy": lambda x: x * (1 + x.abs())}


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_threshold_follows_the_quantile(alpha: float, distribution: str) -> None:
    """Of values whose mean and scale drift. In units of D: S within the noise of a batch's quantile, D within 1 %."""
    layer = layer_of(SQD(alpha=alpha), features=8)
    layer.weight.data.fill_(1.0)
    layer.bias.data.zero_()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for step in range(100):
        x = DISTRIBUTIONS[distribution](torch.randn(8, 8, 64, generator=generator, dtype=torch.float64))
        x = x * (1 + step / 500) + 10 + step / 100
        y = layer(x)
        y = y.detach()
        exact_S, exact_D = zip(*map(reference.superquantile(alpha), x.transpose(0, 1).flatten(1)), strict=True)
        slope = (x.std((0, 2)) / y.std((0, 2)), x.mean((0, 2)) - y.mean((0, 2)) * x.std((0, 2)) / y.std((0, 2)))
        D, S = slope
        errors.append([((S - torch.stack(exact_S)) / D).abs().mean(), (D / torch.stack(exact_D) - 1).abs().mean()])
    statistic, deviation = torch.tensor(errors)[50:].mean(0)
    assert statistic < 0.06 and deviation < 0.01


def test_a_stale_threshold_costs_the_square_of_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 20000, generator=generator, dtype=torch.float64)
    exact_S, exact_D = reference.superquantile(0.8)(x.flatten())
    layer = layer_of(SQD(alpha=0.8), features=1, eps=1e-12)
    layer.momentum = 0.0
    layer.threshold_weight.fill_(1.0)
    errors = {}
    for off in (0.2, 0.1, 0.05):
        layer.threshold.fill_(float(exact_S) + off)
        y = ((layer(x) - layer.bias) / layer.weight).detach()
        scale = x.std() / y.std()
        errors[off] = abs(float(scale / exact_D) - 1), abs(float(x.mean() - y.mean() * scale - exact_S))
    for more, less in itertools.pairwise(errors.values()):
        assert all(small < 0.35 * large + 2e-3 for small, large in zip(less, more, strict=True))
    assert errors[0.1][0] < 0.01


def test_a_jump_of_the_values_does_no_harm() -> None:
    """A threshold that has all values above it or below it: the normal pair takes over until it is back."""
    layer = layer_of(SQD(), features=1)
    layer.weight.data.fill_(1.0)
    layer.bias.data.zero_()
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        x = torch.randn(8, 1, 16, generator=generator, dtype=torch.float64) + (1000.0 if step > 10 else 0.0)
        y = layer(x)
        assert 0.5 < float(y.std()) < 1.5 and abs(float(y.mean())) < 2
