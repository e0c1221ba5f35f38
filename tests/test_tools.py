"""Tools of torch's that read a model: they find in converted layers what they find in stock ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import distnorm
from distnorm.kernels.activations import ACTIVATIONS
from distnorm.layers.module import DistNorm
from distnorm.methods import RMS
from distnorm.policies import Local
from distnorm.recipe import Recipe
from tests.blocks import Named, Nested, Returned, Sequence, Torchvision
from tests.training import batches, same, train, worn

X = batches((3, 4, 6, 5), dtype=torch.float64)
MODES = pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
FUSE = pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
KINDS = pytest.mark.parametrize("kind", [Torchvision, Nested, Returned, Named, Sequence])
CONVERSIONS: list[tuple[str, dict[str, Any]]] = [
    ("sync_bn", {"fuse": True}),
    ("sync_bn", {"overlap": True}),
    ("sync_bn", {"weights": "centralized"}),
    ("mabn", {}),
]
RECIPES = pytest.mark.parametrize(("recipe", "options"), CONVERSIONS, ids=str)


class Net(nn.Module):
    """Convolutions and a linear layer that feed norms, and norms of every kind."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3), worn(nn.BatchNorm2d(6, **options)), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(6, 4, 3), worn(nn.SyncBatchNorm(4, **options)), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 5), worn(nn.BatchNorm1d(5, **options)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean(3).flatten(1))


def net(recipe: str = "sync_bn", options: dict[str, Any] | None = None, **of_layers: Any) -> nn.Module:
    return distnorm.convert(Net(**of_layers).double(), recipe, **(options or {}))


def block(kind: type[nn.Module], fuse: bool) -> nn.Module:
    torch.manual_seed(0)
    return distnorm.convert(kind().double(), "sync_bn", fuse=fuse)


# --- torch.fx ------------------------------------------------------------------------------------


def nodes(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


@KINDS
@FUSE
@MODES
def test_a_graph_has_the_nodes_of_the_stock_models(kind: type[nn.Module], fuse: bool, mode: bool) -> None:
    stock = kind().double()
    traced = fx.symbolic_trace(block(kind, fuse).train(mode))
    assert nodes(traced.graph) == nodes(fx.symbolic_trace(stock).graph)
    same(train(traced.train(), X), train(block(kind, False), X))


@RECIPES
@MODES
def test_a_graph_trains_and_evaluates_as_its_model(recipe: str, options: dict[str, Any], mode: bool) -> None:
    """Weights that a recipe centres are centred in the graph, too, whenever they are in the model."""
    model = net(recipe, options)
    traced = fx.symbolic_trace(copy.deepcopy(model).train(mode))
    assert nodes(traced.graph) == nodes(fx.symbolic_trace(Net().eval()).graph)
    torch.testing.assert_close(traced.eval()(X[0]), model.eval()(X[0]))
    same(train(traced.train(), X), train(model.train(), X))
    torch.testing.assert_close(distnorm.revert(traced).eval()(X[0]), distnorm.revert(model).eval()(X[0]))


class Leaves(fx.Tracer):
    """Names every node by the module that it comes from, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.at = ""
        self.names: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.at = self.at, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.at):
                return self.create_proxy("call_module", self.at, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.at = before

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.names[proxy.node] = self.at
        return proxy


@FUSE
@MODES
@pytest.mark.parametrize("name", ["stem.1", "middle.1", "middle.2", "head.0"])
def test_features_are_extracted_by_name(name: str, fuse: bool, mode: bool) -> None:
    model = net("sync_bn", {"fuse": fuse}).train(mode)
    tracer = Leaves()
    graph = tracer.trace(model)
    (feature,) = (node for node in graph.nodes if node.op == "call_module" and tracer.names[node] == name)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ((feature, output.args[0]),)
    found, y = fx.GraphModule(model, graph)(X[0])
    seen: list[Tensor] = []
    other = net().train(mode)
    other.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    torch.testing.assert_close(y, other(X[0]))
    torch.testing.assert_close(found, seen[0])


def test_a_layer_by_itself_cannot_be_traced() -> None:
    with pytest.raises(TypeError, match=r"DistBatchNorm2d becomes one node of a graph, .*trace a model that has it"):
        fx.symbolic_trace(distnorm.convert(nn.BatchNorm2d(3), "sync_bn"))


# --- torch.jit -----------------------------------------------------------------------------------

SCRIPTABLE = [
    ("sync_bn", {}, {}),
    ("sync_bn", {"fuse": True}, {}),
    ("sync_bn", {"overlap": True}, {}),
    ("local_bn", {}, {"affine": False}),
    ("local_bn", {}, {"track_running_stats": False}),
    ("periodic_bn", {}, {"momentum": None}),
    ("lazy_bn", {"weights": "none"}, {}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("recipe", "options", "of_layers"), SCRIPTABLE, ids=str)
def test_a_script_evaluates_and_its_model_trains_on(
    recipe: str, options: dict[str, Any], of_layers: dict[str, Any]
) -> None:
    model, other = net(recipe, options, **of_layers), net(recipe, options, **of_layers)
    train(model, X)
    train(other, X)
    scripted = torch.jit.script(model.eval())
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for each in (scripted, torch.jit.load(file), torch.jit.freeze(scripted)):
        torch.testing.assert_close(each(X[0]), model(X[0]))
    assert scripted.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(torch.jit.Error, match=r"stem.1: scripted in evaluation.*call eval\(\)"):
        scripted.train()(X[0])
    same(train(model.train(), X), train(other, X))


class ByHand(nn.Module):
    """A block whose code names the epilogue itself."""

    def __init__(self, name: str, parameter: float) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.name, self.parameter = name, parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), residual=x, activation=self.name, parameter=self.parameter)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogues_in_code_are_scripted_and_go_on(name: str) -> None:
    model = distnorm.convert(ByHand(name, 0.3), "sync_bn").double()
    model(X[0])
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(X[0]), model(X[0]))
    norm = model.bn(model.conv(X[0]), residual=X[0])
    torch.testing.assert_close(scripted(X[0]), ACTIVATIONS[name].compute(norm, 0.3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_leaves_no_forward_on_the_layers_that_run_on() -> None:
    model = net("sync_bn", {"fuse": True}).eval()
    torch.jit.script(model)
    model(X[0])
    norms = [each for each in model.modules() if isinstance(each, distnorm.DistNorm)]
    assert norms and not any("forward" in vars(each) for each in norms)  # which fused code takes for a user's


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("kind", [Torchvision, Nested, Returned, Sequence])
@FUSE
def test_blocks_are_scripted(kind: type[nn.Module], fuse: bool) -> None:
    model = block(kind, fuse).eval()
    for scripted in (torch.jit.script(model), torch.jit.trace(model, (X[0],))):
        torch.testing.assert_close(scripted(X[0]), model(X[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_of_its_own_and_half_precision_are_scripted() -> None:
    layer = worn(distnorm.nn.SyncBatchNorm(4)).bfloat16().eval()
    x = X[0].bfloat16()
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_scripted_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"stem.1: torch.jit.script cannot share statistics in training. Script the"):
        torch.jit.script(net())
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    rms = distnorm.convert(untracked, Recipe(method=RMS(), policy=Local())).eval()
    with pytest.raises(RuntimeError, match=r"^0: without running statistics torch.jit.script supports batch norm"):
        torch.jit.script(rms)


# --- torch.export --------------------------------------------------------------------------------


@KINDS
@FUSE
@MODES
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(kind: type[nn.Module], fuse: bool, mode: bool, strict: bool) -> None:
    model, other = block(kind, fuse).train(mode), block(kind, False).train(mode)
    exported = torch.export.export(model, (X[0],), strict=strict).module()
    torch.testing.assert_close(exported(X[0]), other(X[0]))
    assert not any(isinstance(each, DistNorm) for each in exported.modules())


@RECIPES
def test_every_recipe_is_exported(recipe: str, options: dict[str, Any]) -> None:
    model = net(recipe, options)
    train(model, X)
    exported = torch.export.export(model.eval(), (X[0],), strict=False).module()
    torch.testing.assert_close(exported(X[0]), model(X[0]))
