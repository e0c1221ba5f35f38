"""Write ``csrc/activations.h``: the formulas of ``kernels/gpu/activations.py`` in C.

Run ``python -m tests.support.activations_header`` after a formula has changed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "distnorm" / "kernels"
FORMULAS = KERNELS / "gpu" / "activations.py"
HEADER = KERNELS / "csrc" / "activations.h"

BEGIN = """\
/* Formulas of activations in float32. Written from kernels/gpu/activations.py, which explains them, by
   python -m tests.support.activations_header. */

#include <math.h>

#include "exponential.h"

typedef struct {
    float value, gradient;
} activated_t;
"""


class _InC(ast.NodeTransformer):
    """Turns arithmetic into what unparses to C."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Name(f"{node.value!r}f")

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name == "tl.where":
            test, one, two = map(ast.unparse, node.args)
            return ast.Name(f"({test} ? {one} : {two})")
        return ast.Call(ast.Name({"tl.exp": "exponential", "tl.abs": "fabsf"}.get(name, name)), node.args, [])


def in_c(node: ast.expr) -> str:
    return ast.unparse(_InC().visit(node))


def function(definition: ast.FunctionDef) -> Iterator[str]:
    """The lines of one function in C."""
    names = [each.arg for each in definition.args.args]
    kind = "float" if len(names) == 1 else "activated_t"
    yield f"static inline {kind} {definition.name}({', '.join(f'float {name}' for name in names)})"
    yield "{"
    body = definition.body[1:]
    used = {each.id for statement in body for each in ast.walk(statement) if isinstance(each, ast.Name)}
    yield from (f"    (void){name};" for name in names if name not in used)
    for statement in body[:-1]:
        assert isinstance(statement, ast.Assign)
        yield f"    float {ast.unparse(statement.targets[0])} = {in_c(statement.value)};"
    found = body[-1]
    assert isinstance(found, ast.Return) and found.value is not None
    if isinstance(found.value, ast.Tuple):
        value, gradient = map(in_c, found.value.elts)
        yield f"    return (activated_t){{{value}, {gradient}}};"
    else:
        yield f"    return {in_c(found.value)};"
    yield "}"


def header() -> str:
    """The file's content."""
    definitions = [each for each in ast.parse(FORMULAS.read_text()).body if isinstance(each, ast.FunctionDef)]
    functions = ["\n".join(function(each)) for each in definitions]
    names = [each.name for each in definitions if len(each.args.args) == 3]
    comment = "/* In the order of their numbers, which begin behind that of ReLU. */"
    listed = f"{comment}\n#define FORMULAS_OF_ACTIVATIONS(F) \\\n    {' '.join(f'F({name})' for name in names)}"
    return "\n\n".join([BEGIN.rstrip(), *functions, listed]) + "\n"


if __name__ == "__main__":
    HEADER.write_text(header())
