"""The reference against torch's batch norm, against itself on a split batch, and to the second order."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.reference import batch_norm, rms_norm

SHAPES = [(6, 3), (5, 3, 4), (4, 3, 2, 5), (3, 3, 2, 1, 2)]


def _random(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_rank_is_torch_batch_norm(shape: tuple[int, ...]) -> None:
    x = _random(*shape, mean=2.0).requires_grad_()
    weight, bias = _random(3, seed=1).requires_grad_(), _random(3, seed=2).requires_grad_()
    dy = _random(*shape, seed=3)
    mean, var = _random(3, seed=4), _random(3, seed=5).exp()
    ours = batch_norm([x], weight, bias, eps=1e-3, momentum=0.3, running_mean=mean, running_var=var)
    theirs = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-3)
    torch.testing.assert_close(ours.outputs, [theirs])
    torch.testing.assert_close([ours.running_mean, ours.running_var], [mean, var])
    torch.testing.assert_close(
        torch.autograd.grad(ours.outputs[0], (x, weight, bias), dy), torch.autograd.grad(theirs, (x, weight, bias), dy)
    )


@pytest.mark.parametrize("normalize", [batch_norm, rms_norm])
@pytest.mark.parametrize("sizes", [(1, 5), (0, 6), (2, 0, 3, 1)], ids=str)
def test_the_split_does_not_matter(normalize, sizes: tuple[int, ...]) -> None:
    x = _random(6, 3, 2, mean=1.0)
    whole, parts = normalize([x]), normalize(list(x.split(list(sizes))))
    assert [len(y) for y in parts.outputs] == list(sizes)
    assert torch.equal(torch.cat(parts.outputs), whole.outputs[0])
    assert torch.equal(parts.running_var, whole.running_var)


@pytest.mark.parametrize("normalize", [batch_norm, rms_norm])
def test_two_derivatives(normalize) -> None:
    inputs = [_random(2, 2, 2).requires_grad_(), _random(1, 2, 2, seed=1).requires_grad_()]
    weight, bias = _random(2, seed=2).requires_grad_(), _random(2, seed=3).requires_grad_()

    def function(x0: Tensor, x1: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(normalize([x0, x1], weight, bias, eps=0.1).outputs)

    assert torch.autograd.gradcheck(function, (*inputs, weight, bias))
    assert torch.autograd.gradgradcheck(function, (*inputs, weight, bias))


def test_rms_by_hand() -> None:
    x = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    result = rms_norm([x], torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), eps=0.0, momentum=0.5)
    expected = torch.tensor([[6 / 12.5**0.5, 6.0], [8 / 12.5**0.5, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(result.outputs[0], expected)
    assert result.running_var.tolist() == [6.75, 1.0]
    assert result.running_mean.tolist() == [0.0, 0.0]


def test_too_few_values() -> None:
    with pytest.raises(ValueError, match="1 value per channel"):
        batch_norm([torch.ones(1, 3), torch.ones(0, 3)])
    with pytest.raises(ValueError, match="no value"):
        rms_norm([torch.ones(0, 3)])
