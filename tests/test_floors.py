"""The floor that import-linter cannot see: methods never import torch.distributed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

METHODS = Path(__file__).parents[1] / "distnorm" / "methods"
FORBIDDEN = "torch.distributed"


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def _offences(source: str) -> list[str]:
    return [name for name in _imported(ast.parse(source)) if name == FORBIDDEN or name.startswith(f"{FORBIDDEN}.")]


@pytest.mark.parametrize("path", sorted(METHODS.rglob("*.py")), ids=lambda path: path.name)
def test_methods_do_not_import_torch_distributed(path: Path) -> None:
    assert _offences(path.read_text()) == []


def test_there_are_methods_to_look_at() -> None:
    assert (METHODS / "__init__.py").is_file()


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "from torch.distributed.distributed_c10d import new_group",
        "import torch\ntorch.distributed.all_reduce(x)",
    ],
)
def test_every_way_of_importing_it_is_seen(source: str) -> None:
    assert _offences(source)


def test_plain_torch_is_fine() -> None:
    assert not _offences("import torch\nfrom torch import Tensor, nn\ntorch.nn.functional.relu(x)")
