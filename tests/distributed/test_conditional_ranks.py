"""Conditional batch norm and SPADE on real processes: the parts of a batch are normalized as the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import Ledger
from distnorm.nn import SPADE, AdaIN, ConditionalBatchNorm, ConditionalInstanceNorm
from tests import conditional as expected
from tests.conditional import draw, one_hot_map
from tests.support.pool import Pool

C, K = 3, 4
SIZES = [3, 2]


def build(name: str) -> nn.Module:
    """With parameters that are not the initial ones."""
    layers = {
        "batch": lambda: ConditionalBatchNorm(C, K, dtype=torch.float64),
        "SPADE": lambda: SPADE(C, K, hidden=5, dtype=torch.float64),
    }
    layer = layers[name]()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number + 10))
    return layer


def one_step(
    rank: int, name: str, inputs: list[Tensor], others: list[Tensor], cotangents: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """Output, gradient of the input, gradients of the parameters as DDP averages them, and collectives."""
    layer, x = build(name), inputs[rank].requires_grad_()
    model = DistributedDataParallel(layer)
    with Ledger(layer) as ledger:
        y = model(x, others[rank])
        y.backward(cotangents[rank])
    return y.detach(), x.grad, [parameter.grad for parameter in layer.parameters()], ledger.collectives


@pytest.mark.parametrize("name", ["batch", "SPADE"])
def test_parts_of_a_batch_equal_the_joined_batch(pool: Pool, name: str) -> None:
    scale = torch.cat([torch.full((size, 1, 1, 1), float(rank + 1)) for rank, size in enumerate(SIZES)])
    x, dy = (draw(sum(SIZES), C, 4, 3) * scale + scale).requires_grad_(), draw(sum(SIZES), C, 4, 3, seed=1)
    ids, map = torch.tensor([3, 0, 3, 1, 3]), one_hot_map(sum(SIZES), K, 2, 5)
    other = ids if name == "batch" else map
    split = [list(each.detach().split(SIZES)) for each in (x, other, dy)]
    first, second = pool.run(2, one_step, name, *split)

    layer = build(name)
    normalized = expected.per_channel(x)
    if name == "batch":
        y = expected.by_class(normalized, layer.weight, layer.bias, ids)
    else:
        y = expected.spade(normalized, map, dict(layer.named_parameters()))
    dx, *gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), dx, rtol=1e-9, atol=1e-9)
    for found in (first[2], second[2]):
        torch.testing.assert_close([2 * each for each in found], gradients, rtol=1e-9, atol=1e-9)
    assert (first[3], second[3]) == (2, 2)


class Mixed(nn.Module):
    """Layers of every kind, each with a conversion of its own, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(2, C, 1), *(conditional() for _ in range(2))
        self.map, self.instance, self.style = SPADE(C, 2, MABN, hidden=4), ConditionalInstanceNorm(C, K), AdaIN(0.5)

    def forward(self, x: Tensor, ids: Tensor, map: Tensor) -> Tensor:
        x = self.second(self.first(self.conv(x), ids), ids)
        return self.style(self.instance(self.map(x, map), ids), x.flip(0)).mean()


MABN = "mabn(window=2, warmup=1)"


def conditional() -> ConditionalBatchNorm:
    return ConditionalBatchNorm(C, K, MABN)


def moving_steps(rank: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    torch.manual_seed(1)
    model = DistributedDataParallel(Mixed())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ids = torch.tensor([rank, 3])
    for step in range(5):
        x, map = draw(2, 2, 4, 4, seed=10 * step + rank).float(), one_hot_map(2, 2, 4, 4).float()
        with Ledger(model) as ledger:
            (model(x + rank, ids, map) - 1).square().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.module.state_dict(), {name: tally.collectives for name, tally in ledger.layers.items()}


def test_moving_layers_that_were_built_one_by_one(pool: Pool) -> None:
    (state, sent), (other, _) = pool.run(2, moving_steps)
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    assert all(each.isfinite().all() for each in state.values())
    assert list(sent.values()) == [3]  # one for each conversion, at the end of the step


def refused(rank: int) -> str:
    layer = ConditionalBatchNorm(C, K)
    layer(draw(2, C, 2, 2).float(), torch.tensor([0, 1]))
    ids = torch.tensor([0, K + rank])
    with pytest.raises(ValueError, match="out of range") as raised:
        layer(draw(2, C, 2, 2).float(), ids)
    return str(raised.value)


def converted_otherwise(rank: int) -> None:
    ConditionalBatchNorm(C, K + rank)(draw(2, C, 2, 2).float(), torch.tensor([0, 1]))


def test_ranks_that_differ_hear_of_it(pool: Pool) -> None:
    first, second = pool.run(2, refused)
    assert first == "ConditionalBatchNorm(3, 4): class id 4 is out of range; need 0 to 3."
    assert second == "ConditionalBatchNorm(3, 4): class id 5 is out of range; need 0 to 3."
    for error in pool.run_all(2, converted_otherwise):
        assert isinstance(error, RuntimeError)
        assert "[ConditionalBatchNorm(3, 4): 3 features" in str(error)
        assert "[ConditionalBatchNorm(3, 5): 3 features" in str(error)
