"""docs/status.md holds every reason that the code can produce, and operations.md no metric that does not exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from trimtab_operator.api import finetunejob_reasons, modelendpoint_reasons
from trimtab_operator.api.reasons import REFUSALS
from trimtab_operator.core.metrics import PREFIX, Metrics, RuntimeCollector
from trimtab_operator.core.store import Store

ROOT = Path(__file__).parents[2]
OPERATOR = ROOT / "operator" / "trimtab_operator"
FOLDERS = (*(OPERATOR / part for part in ("finetunejob", "modelendpoint")), ROOT / "trainer-image", ROOT / "serving")
MODULES = [*(OPERATOR / "core").glob("pod*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
CAMEL_CASE = re.compile(r"([A-Z]+[a-z]+)+")
OPERATIONS = ROOT / "docs" / "operations.md"


def texts(node: ast.AST | None) -> Iterator[str]:
    """The CamelCase literals that an expression may give; what it only compares with or looks up is none."""
    match node:
        case ast.Constant(value=str(text)) if CAMEL_CASE.fullmatch(text):
            yield text
        case ast.IfExp(body=body, orelse=other):
            yield from texts(body)
            yield from texts(other)
        case ast.BoolOp(values=values):
            for value in values:
                yield from texts(value)
        case ast.Dict(values=values):
            for value in values:
                yield from texts(value)


def produced(tree: ast.AST) -> Iterator[str]:
    """Literals that become a reason: assigned to `reason`, passed as `reason`, or first of a Stuck or Because."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, args=args, keywords=keywords):
                if getattr(func, "id", "") in ("Stuck", "Because") and args:
                    yield from texts(args[0])
                for keyword in keywords:
                    if keyword.arg == "reason":
                        yield from texts(keyword.value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for name, value in zip(names, values, strict=True):
                    if getattr(name, "id", "") == "reason":
                        yield from texts(value)
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=value):
                if getattr(target, "id", "") in ("reason", "_REASONS"):
                    yield from texts(value)


def test_every_reason_that_the_code_can_produce_is_explained() -> None:
    known = {
        reason.name for reason in (*finetunejob_reasons.all_reasons(), *modelendpoint_reasons.all_reasons(), *REFUSALS)
    }
    found = {
        reason: module.name for module in MODULES for reason in produced(ast.parse(module.read_text(encoding="utf-8")))
    }
    assert len(found) > 20, "the search finds what there is"
    assert {reason: module for reason, module in found.items() if reason not in known} == {}


def test_no_reason_stands_twice_and_each_is_documented() -> None:
    text = (ROOT / "docs" / "status.md").read_text()
    for module in (finetunejob_reasons, modelendpoint_reasons):
        names = [reason.name for reason in module.all_reasons()]
        assert [name for name in names if names.count(name) > 1] == []
        assert [name for name in names if f"| `{name}` |" not in text] == []


@pytest.fixture
def registry() -> CollectorRegistry:
    metrics = Metrics()
    metrics.show_leadership(lambda: True, lambda: 0)
    metrics.registry.register(RuntimeCollector(Store(), lambda: 0, lambda: 0.0, dict))
    return metrics.registry


def test_operations_explains_the_metrics_that_exist_and_no_other(registry: CollectorRegistry) -> None:
    exist = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
        if family.name.startswith(PREFIX)
    }
    told = set(re.findall(rf"`({PREFIX}[a-z_]+)", OPERATIONS.read_text()))
    assert told == exist


def test_operations_explains_every_alert() -> None:
    rule = (ROOT / "helm/trimtab/templates/monitoring/prometheusrule.yaml").read_text()
    alerts = set(re.findall(r"alert: (\w+)", rule))
    assert alerts
    assert set(re.findall(r"`(Trimtab[A-Z]\w+)`", OPERATIONS.read_text())) == alerts


def test_the_runbook_speaks_of_reasons_that_exist() -> None:
    names = {
        reason.name for reason in (*finetunejob_reasons.all_reasons(), *modelendpoint_reasons.all_reasons(), *REFUSALS)
    }
    headings = re.findall(r"^### `(\w+)`", OPERATIONS.read_text(), re.MULTILINE)
    assert headings
    assert [name for name in headings if name not in names] == []
