"""How often the way of one `POST /explain` crosses between the files of the service.

    python tools/crossings.py          # the hand-offs in order, and how many they are
    python tools/crossings.py --all    # with the calls that come straight back

One warm request for one JPEG is answered in this process by the app with the built-in model, in the
hooked lane (`CAMSERVE_COMPILE=false`). The HTTP server in front of the app takes no part.

What counts. A call is seen where a function of one file of `service/` or `api_schemas/` runs and
the nearest caller of those folders is in another file; what lies between them (FastAPI, pydantic,
torch) is looked through. Such a call is a hand-off if it leads on: if it calls, before it returns,
into a further file. A hand-off crosses twice, on the way in and on the way out. A call that comes
straight back, as for a property, a bound or a sum, is no hand-off: who follows the request need not
follow it.

All threads count. What the event loop or a thread begins by itself has no caller, and the calls
that it makes count. A coroutine that continues after an `await` is the call that it was. A
context manager written as a generator is called twice, when it is entered and when it is left.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("service", "api_schemas")
IMAGE = ROOT / "examples" / "sunflower.jpg"

MOST = 80
"""Crossings that one request may take."""

CONTINUED = 2
"""From this argument of a RESUME instruction on a frame continues after an `await` or `yield from`;
0 stands at the beginning of a function, 1 behind a `yield`."""


@dataclass(slots=True)
class Call:
    """Calls of one frame of a file from another file.

    depth: how many calls between files lie around it. times: 2 for a context manager.
    """

    thread: int
    depth: int
    caller: str
    file: str
    function: str
    times: int = 0
    leads_on: bool = False


class Recorder:
    """A profile function that notes each call between files while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.calls: list[Call] = []
        self._by_frame: dict[FrameType, Call] = {}
        self._names: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_on or event != "call" or (file := self._file(frame)) is None:
            return
        if frame.f_code.co_code[frame.f_lasti + 1] & 3 >= CONTINUED:
            return
        callers = [each for each in _above(frame) if self._file(each) is not None]
        files = [self._file(each) for each in callers]
        if not files or files[0] is None or files[0] == file:
            return
        for each in callers:
            if each in self._by_frame:
                self._by_frame[each].leads_on = True
        if frame not in self._by_frame:
            depth = sum(each in self._by_frame for each in callers)
            thread, function = threading.get_ident(), frame.f_code.co_qualname
            call = Call(thread, depth, files[0], file, function.replace(".<locals>", ""))
            self._by_frame[frame] = call
            self.calls.append(call)
        self._by_frame[frame].times += 1

    def stop(self) -> list[Call]:
        """The calls in order; frames are let go."""
        self.is_on = False
        self._by_frame.clear()
        return self.calls

    def _file(self, frame: FrameType) -> str | None:
        """The file of a frame as it is printed; None where it is none of ours."""
        name = frame.f_code.co_filename
        if name not in self._names:
            inside = Path(name).is_relative_to(ROOT) and Path(name).relative_to(ROOT)
            ours = inside and inside.parts[0] in FOLDERS
            self._names[name] = str(inside).removeprefix("service/") if ours else None
        return self._names[name]


def _above(frame: FrameType) -> Iterator[FrameType]:
    above = frame.f_back
    while above is not None:
        yield above
        above = above.f_back


def crossings(calls: list[Call]) -> int:
    """How often the hand-offs among these calls cross between files, in and out."""
    return sum(2 * call.times for call in calls if call.leads_on)


def traced() -> list[Call]:
    """The calls between files of one warm request, in order. Raises RuntimeError if it fails."""
    recorder = Recorder()
    threading.setprofile(recorder)
    try:
        return asyncio.run(_traced(recorder))
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]


async def _traced(recorder: Recorder) -> list[Call]:
    from service.app import create_app  # noqa: PLC0415 - takes seconds, which --help need not wait
    from service.settings import Settings  # noqa: PLC0415

    app = create_app(Settings(models=("builtin",), workers=1, compile=False))
    image = IMAGE.read_bytes()
    async with app.router.lifespan_context(app):
        for _ in range(2):
            await _explained(app, image)
        recorder.is_on = True
        sys.setprofile(recorder)
        try:
            await _explained(app, image)
        finally:
            sys.setprofile(None)
            recorder.is_on = False
    return recorder.stop()


async def _explained(app: Any, image: bytes) -> None:
    """Send one request as a server would, and read the answer."""
    messages = [{"type": "http.request", "body": image, "more_body": False}]
    status = 0

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = {"host": "localhost", "content-type": "image/jpeg", "content-length": len(image)}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/explain",
        "raw_path": b"/explain",
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    if status != 200:
        raise RuntimeError(f"the request was answered {status}")


def lines(calls: list[Call]) -> Iterator[str]:
    """One line a call: the thread, the files, the function, indented by the calls around it."""
    threads: dict[int, str] = {}
    for call in calls:
        name = threads.setdefault(call.thread, f"worker {len(threads)}" if threads else "loop")
        times = f" x{call.times}" if call.times > 1 else ""
        indent = "  " * call.depth
        yield f"{name:9}{indent}{call.caller} > {call.file} {call.function}{times}"


def main() -> int:
    """Print the hand-offs of one request; 1 if they cross more often than MOST."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also print calls that lead nowhere")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    calls = traced()
    for line, same in groupby(lines([c for c in calls if c.leads_on or options.all])):
        count = len(list(same))
        print(line if count == 1 else f"{line} ({count} times)")
    total = crossings(calls)
    print(
        f"{total} crossings, {MOST} at most: {total // 2} hand-offs in and out, beside "
        f"{sum(call.times for call in calls if not call.leads_on)} calls that come straight back"
    )
    return int(total > MOST)


if __name__ == "__main__":
    sys.exit(main())
