"""A stock model's running statistics belong to its weights as they are: evaluation stays, until training goes on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import distnorm


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*parts).double()


@pytest.fixture
def trained() -> nn.Sequential:
    stock = net()
    for step in range(3):
        stock(batch(step) + 1)
    return stock.eval()


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loaded(stock: nn.Module) -> nn.Sequential:
    model = distnorm.convert(net(seed=1), "mabn")
    model.load_state_dict(stock.state_dict())
    return model.eval()


def equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_evaluates_as_the_stock_model(trained):
    y = trained(batch(9))
    equal(distnorm.convert(copy.deepcopy(trained), "mabn")(batch(9)), y)
    equal(loaded(trained)(batch(9)), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_ask_their_own_norms(trained, copied):
    model = loaded(trained)
    mine = copied(model)
    model.train()(batch(3)).sum().backward()
    equal(mine(batch(9)), trained(batch(9)))
    assert mine[0]._norms == (mine[1],)


def test_reverts_to_the_stock_model(trained):
    model = distnorm.revert(loaded(trained))
    equal(model(batch(9)), trained(batch(9)))
    equal(model[0].weight, trained[0].weight)
    assert vars(model[0]).keys() == vars(trained[0]).keys()


def test_after_training_the_weights_act_centred(trained):
    model = loaded(trained)
    model.train()(batch(3)).sum().backward()
    y = model.eval()(batch(9))
    assert not torch.allclose(y, trained(batch(9)))
    equal(loaded(model)(batch(9)), y)
    torch.testing.assert_close(distnorm.revert(model)(batch(9)), y)
