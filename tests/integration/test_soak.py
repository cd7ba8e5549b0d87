"""A short soak; `benchmarks/soak.py` is the long one."""

from __future__ import annotations

import pytest
import torchvision  # noqa: F401 - slow to import, and no clock runs here
from soaking import Soak, served_for_a_soak


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_400_requests_a_fifth_faulty_leave_nothing_and_every_good_one_is_answered_right() -> None:
    with served_for_a_soak(hang_timeout=2.0) as server:
        soak = Soak(server, clients=8, different=60, warming=80)
        soak.run(400)
        assert not soak.verdicts(), soak.table()
    assert soak.answered == 320
    assert soak.faulty.keys() == soak._faults.kinds.keys(), "every kind was sent"
