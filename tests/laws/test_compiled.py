"""Law 7: one graph, whatever the policy, and no recompilation after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import distnorm
from distnorm import Recipe
from tests.zoo import POLICIES, pairs


def _steps(model: nn.Module, module: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    for _ in range(5):
        x = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)
        model(x).pow(3).sum().backward()
        seen += [*(parameter.grad.clone() for parameter in module.parameters()), *map(torch.clone, module.buffers())]
    return seen


# Graphs do not show the policy.
@pytest.mark.parametrize(("under_test", "policy"), pairs(POLICIES, usual=()))
def test_one_graph(under_test, policy):
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        return distnorm.convert(layers.double(), Recipe(method=under_test.method, policy=policy))

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = build(), build()
    found = _steps(torch.compile(compiled, fullgraph=True, backend=counter), compiled)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, _steps(eager, eager), rtol=1e-9, atol=1e-9)
