"""What the files of deploy/ say, for the tests that hold it against the service."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = [DEPLOY / "kubernetes" / name for name in ("cpu", "gpu")]
RULES = DEPLOY / "prometheus" / "rules" / "camserve.yml"
FROM_GPU_EXPORTER = re.compile(r"DCGM_\w+")
"""Metrics of NVIDIA's exporter, which is another program."""


class Query(NamedTuple):
    """A query of the dashboard: on which panel, how its lines are named."""

    panel: str
    legend: str
    expression: str

    @property
    def needs_gpu(self) -> bool:
        return bool(FROM_GPU_EXPORTER.search(self.expression)) or "device_memory" in self.expression


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana" / "dashboards" / "camserve.json").read_text()))


def queries() -> Iterator[Query]:
    """Every query of the dashboard, as Grafana sends it for all instances."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m")
            expression = expression.replace("$instance", ".*")
            assert "$" not in expression, expression
            yield Query(panel["title"], target["legendFormat"], expression)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metric_names(expression: str) -> set[str]:
    """The names of metrics in a query; those of histograms and counters as they are declared."""
    found = re.findall(r"\b(?:camserve|process)_\w+", expression)
    return {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in found}


class _Compose(yaml.SafeLoader):
    """Compose's own tags say how files are merged: what they mark is read as it is."""


_Compose.add_multi_constructor(
    "!", lambda loader, _suffix, node: loader.construct_sequence(node, deep=True)
)


def compose(path: Path = ROOT / "docker-compose.yml") -> dict[str, Any]:
    return dict(yaml.load(path.read_text(), Loader=_Compose))  # noqa: S506 - a SafeLoader
