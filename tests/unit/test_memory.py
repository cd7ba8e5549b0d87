from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import build_service
from service.memory import memory_limit
from service.settings import Settings

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, MACHINE),
        ({"memory.max": "max\n"}, MACHINE),
        ({"memory.max": "268435456\n"}, 256 << 20),
        ({"memory/memory.limit_in_bytes": "134217728\n"}, 128 << 20),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
    ],
)
def test_the_limit_is_the_containers_or_else_the_machines(
    tmp_path: Path, files: dict[str, str], limit: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


def test_metrics_say_what_memory_is_held_and_how_much_may_be() -> None:
    service = build_service(Settings(models=("tiny:small",), workers=1))
    families = text_string_to_metric_families(service.metrics.render().decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["process_resident_memory_bytes"] > 10 << 20
    assert values["camserve_memory_limit_bytes"] == memory_limit()
