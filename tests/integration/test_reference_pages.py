"""The reference pages say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    [
        *(f"reference/{name}.md" for name in ("settings", "errors", "metrics", "routes", "cli")),
        "explanation/methods.md",
        "llms.txt",
    ],
)
def test_a_reference_page_is_what_the_code_would_write(name: str) -> None:
    """`python docs/generate.py` writes them anew."""
    pages = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    assert (DOCS / name).read_text(encoding="utf-8") == pages[name]()
