"""Debian's Firefox, driven by Marionette, the protocol that is built into it.

Playwright drives only its own build of Firefox, and Debian has no geckodriver. The protocol is
small: a message is `length:[0, id, command, parameters]`, its answer `length:[1, id, error,
result]`.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 90
WAIT_SECONDS = 40

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's id (W3C WebDriver, §12)."""

PREFERENCES = {
    "marionette.port": 0,  # any free one, which Firefox writes into its profile
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
}


class Firefox:
    """A window; see `firefox` for one."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS)
        self._count = 0
        self._receive()  # the greeting
        self._send("WebDriver:NewSession", {})

    def close(self) -> None:
        self._send("Marionette:Quit", {"flags": ["eForceQuit"]})
        self._socket.close()

    def go(self, url: str) -> None:
        self._send("WebDriver:Navigate", {"url": url})

    def reload(self) -> None:
        self._send("WebDriver:Refresh", {})

    def resize(self, width: int, height: int) -> None:
        self._send("WebDriver:SetWindowRect", {"width": width, "height": height})

    def run(self, script: str, *args: Any) -> Any:
        """The value of a function's body."""
        return self._send("WebDriver:ExecuteScript", {"script": script, "args": args})["value"]

    def click(self, selector: str) -> None:
        self._send("WebDriver:ElementClick", {"id": self._find(selector)})

    def keys(self, selector: str, text: str) -> None:
        """Types into an element; into a field for files their paths, one a line."""
        self._send("WebDriver:ElementSendKeys", {"id": self._find(selector), "text": text})

    def select(self, selector: str, value: str) -> None:
        """A value of a list, by a click on its option."""
        self.click(f'{selector} option[value="{value}"]')

    def until(self, expression: str) -> None:
        """Until JavaScript is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.run(f"return {expression}"):
            assert time.monotonic() < deadline, f"{expression} did not come true"
            threading.Event().wait(0.05)

    def screenshot(self, file: Path) -> None:
        """A PNG of the window."""
        taken = self._send("WebDriver:TakeScreenshot", {"full": True})
        file.write_bytes(base64.b64decode(taken["value"]))

    def _find(self, selector: str) -> str:
        found = self._send("WebDriver:FindElement", {"using": "css selector", "value": selector})
        return str(found["value"][ELEMENT])

    def _send(self, command: str, parameters: dict[str, Any]) -> Any:
        self._count += 1
        message = json.dumps([0, self._count, command, parameters])
        self._socket.sendall(f"{len(message.encode())}:{message}".encode())
        _, count, error, result = self._receive()
        assert count == self._count
        assert error is None, f"{command}: {error['message']}"
        return result

    def _receive(self) -> Any:
        length = b""
        while not length.endswith(b":"):
            length += self._bytes(1)
        return json.loads(self._bytes(int(length[:-1])))

    def _bytes(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            part = self._socket.recv(count - len(received))
            assert part, "Firefox has ended"
            received += part
        return received


@contextmanager
def firefox(profile: Path) -> Iterator[Firefox]:
    """A window of Firefox with this new profile; the test is skipped where it is not installed."""
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        pytest.skip("Firefox is not installed; on Debian: apt-get install firefox-esr")
    lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in PREFERENCES.items()]
    (profile / "user.js").write_text("".join(lines))
    command = [path, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
    log = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            window = Firefox(_port(browser, profile / "MarionetteActivePort"))
            yield window
            window.close()
        finally:
            browser.terminate()
            browser.wait(40)


def _port(browser: subprocess.Popen[bytes], file: Path) -> int:
    """The port that Firefox has written into its profile."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert browser.poll() is None, "Firefox ended before it was ready"
        if file.exists() and file.read_text().strip():
            return int(file.read_text())
        threading.Event().wait(0.05)
    pytest.fail("Firefox was not ready in time")
