"""A dozen real models, and the page with all others: docs/zoo.md shows what ``make zoo`` found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers  # noqa: F401, the models below import it when they are built

from tests.models import checks, table
from tests.models.case import Case
from tests.models.checks import CHECKS, COPIES, Subject
from tests.models.operators import nms
from tests.models.transformers_models import TINY
from tests.models.zoo import LIBRARIES, cases

pytestmark = [
    pytest.mark.filterwarnings("ignore:distnorm.convert.fuse=True. fused nothing"),
    # torch 2.13: Dynamo looks at it, of the inputs of a module that is compiled inside of a model
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
QUICK = ("patchtst", "segformer")
"""Models that are compiled in ``make test``, too."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.family)
def test_a_converted_model_is_the_stock_model(case: Case) -> None:
    norms, converted, _ = checks.counts(case)
    assert norms == converted > 0
    subject = Subject(case)
    for check in CHECKS.values():
        check(subject)
    for way in ("deepcopy", "pickle"):
        checks.copied(subject, way)
    assert set(COPIES) == {"deepcopy", "pickle", "aot_eager"}


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] * (each.family not in QUICK), id=each.family) for each in TINY]
)
def test_a_compiled_model_computes_the_same(case: Case) -> None:
    checks.copied(Subject(case), "aot_eager")


def test_the_page_shows_what_was_found() -> None:
    page = table.PAGE.read_text()
    assert table.page_of(page, table.read(table.RESULTS)) == page


def test_stored_results_are_few_and_of_models_that_there_are() -> None:
    records = table.read(table.RESULTS)
    assert table.RESULTS.stat().st_size <= 100_000
    assert {key for key in records if "/" in key} <= set(cases())


def test_every_model_agrees_or_says_why() -> None:
    """None of the reasons is a fault of distnorm's."""
    records = {key: record for key, record in table.read(table.RESULTS).items() if "/" in key}
    assert {key: table.faults(record) for key, record in records.items() if table.faults(record)} == {}
    for key, record in records.items():
        found = record.get("values", {})
        whole = found.get("converted") == found.get("norms") and found.get("difference", 0.0) <= checks.CLOSE
        assert whole or found["reasons"], key


def test_every_library_is_listed() -> None:
    assert {each.library for each in cases().values()} == set(LIBRARIES)
    assert len(cases()) > 150


def test_a_table_by_hand() -> None:
    found = {"norms": 4, "converted": 3, "fused": 2, "difference": 2e-12, "float32": 3e-6}
    reasons = ["left alone: 1 a.B (it <skips>)", "pickle: the stock model too, AttributeError: x", "values: 3 apart"]
    times = {"ms": 3.0, "local_bn": 1.04, "fused": 0.9}
    record = {"model": "r", "values": found | {"reasons": reasons}, "times": times}
    assert table.faults(record) == ["values: 3 apart"]
    assert table.row("timm/resnet", record) == [
        "resnet: `r`", "4", "3", "2", "2e-12", "3e-06", "1.04", "0.90",
        "left alone: 1 a.B (it &lt;skips>); pickle: the stock model too, AttributeError: x; values: 3 apart",
    ]  # fmt: skip
    totals = [line for line in table.summary({"timm/resnet": record}) if line.startswith("| timm")]
    assert totals == ["| timm | 1 | 0 | 4 | 3 | 2 | 50 % | 1.04 | 0.90 |"]


def test_boxes_that_overlap_less_are_kept() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [2.0, 2.0, 6.0, 6.0]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms(boxes, scores, 0.8).tolist() == [1, 2, 0]
