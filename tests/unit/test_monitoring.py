"""The table of log events is that of the code, and Prometheus could answer what is asked of it."""

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
OF_TWO = re.compile(
    r"(?P<left>.+?) (?:and|or|unless|/)"
    r"(?: on \((?P<on>.*?)\)| ignoring \((?P<ignoring>.*?)\))?(?: group_left)? (?P<right>.+)"
)


def _strings(node: ast.expr, function: ast.AST) -> Iterator[str]:
    """What an expression may be: a string, one of two, or a name that is given one nearby."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body, function)
        yield from _strings(node.orelse, function)
    elif isinstance(node, ast.Name):
        for line in ast.walk(function):
            is_it = isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
            if is_it and line.targets[0].id == node.id:
                yield from _strings(line.value, function)


@functools.cache
def logged() -> dict[str, str]:
    """Event -> a file that logs it."""
    found = {}
    for package in ("jobs", "worker"):
        for path in (REPOSITORY / package).rglob("*.py"):
            text = path.read_text()
            if "log = structlog" not in text:
                continue
            for function in ast.walk(ast.parse(text)):
                if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and call.args and _is_of_a_log(call.func):
                        names = list(_strings(call.args[0], function))
                        assert names, f"{path}:{call.lineno}: which event is this?"
                        found |= dict.fromkeys(names, str(path))
    return found


def _is_of_a_log(called: ast.expr) -> bool:
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.value.id == "log" and called.attr in LEVELS
    return isinstance(called, ast.Name) and called.id == "report"


def documented() -> set[str]:
    text = (REPOSITORY / "docs/monitoring.md").read_text().split("\n## Logs", 1)[1]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_each_event_that_is_logged_stands_in_the_table_and_no_other():
    assert documented() == set(logged())


def test_an_event_has_a_noun_and_what_became_of_it():
    assert all(EVENT.fullmatch(name) for name in logged())


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((REPOSITORY / "deploy/prometheus/rushes.yml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """Of the alerts, and of the dashboard."""
    yield from (alert["expr"] for alert in alerts())
    dashboard = json.loads((REPOSITORY / "deploy/grafana/rushes.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_both_sides_of_an_operator_have_the_same_labels():
    """A sum has none, a rate has `job` and `instance`: nothing would ever match."""
    of_two = [found for expression in expressions() if (found := OF_TWO.fullmatch(expression))]
    assert len(of_two) >= 4
    for found in of_two:
        sums = [bool(re.search(r"\bsum ?\(", found[side])) for side in ("left", "right")]
        assert not any(sums) or found["on"] == "", found[0]
        if found["ignoring"]:
            assert f"sum without ({found['ignoring']})" in found["right"], found[0]


def test_each_alert_waits_and_says_what_it_means_and_stands_in_the_docs():
    for alert in alerts():
        assert set(alert) == {"alert", "expr", "for", "annotations"}, alert
        assert re.fullmatch(r"[0-9]+m", alert["for"]), alert
        assert alert["annotations"]["summary"].endswith("."), alert
    told = (REPOSITORY / "docs/monitoring.md").read_text()
    assert re.findall(r"^\| `(Rushes\w+)` \|", told, re.MULTILINE) == [a["alert"] for a in alerts()]


def test_the_alert_that_scraping_fails_is_of_the_job_in_the_docs():
    told = (REPOSITORY / "docs/monitoring.md").read_text()
    config = yaml.safe_load(told.split("```yaml\n", 1)[1].split("```", 1)[0])
    (scrape,) = config["scrape_configs"]
    assert f'up{{job="{scrape["job_name"]}"}} == 0' in expressions()
    assert config["rule_files"] == ["rushes.yml"]
