"""Work counted in steps, so that no clock decides a test."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_run(function: Callable[..., Any], *args: Any) -> int:
    """How many lines of Python one call runs, itself and all that it calls in this thread."""
    count = 0

    def local(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return local

    assert threading.current_thread() is threading.main_thread()
    before = sys.gettrace()
    sys.settrace(local)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count
