"""A request passes through few files of the service: `tools/crossings.py` counts them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(60)
def test_a_warm_explain_in_the_hooked_lane_crosses_between_files_as_seldom_as_promised() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "crossings.py"))
    calls = tool["traced"]()
    seen = {f"{call.file} {call.function}" for call in calls if call.leads_on}
    for step in (
        "routes/classify.py _KnownQueries.get_route_handler.handle",
        "images/upload.py open_upload",
        "inference/batch.py run",
        "models/pool.py ModelPool.lease",
        "pipeline/response.py single_response",
    ):
        assert step in seen, "every thread is traced"
    assert tool["crossings"](calls) <= tool["MOST"] == 80, "\n".join(
        tool["lines"]([call for call in calls if call.leads_on])
    )
