"""The URL of a service that is ready, with a command to try it."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from service.cli.flags import ERR
from service.settings import Settings

_log = structlog.get_logger(__name__)


def announce(settings: Settings, port: int) -> None:
    """Print where the service listens, or log it as JSON."""
    url = _url(settings.host, port)
    if settings.log_format == "json":
        _log.info("serving", url=url, docs=f"{url}/docs")
    else:
        _print_url(url)


def _url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - only compared
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _print_url(url: str) -> None:
    sample = _sample()
    ERR.print(f"\n[bold]camserve[/] serves on [bold]{url}[/]\n", highlight=False)
    ERR.print("  explain an image:")
    ERR.print(
        f"    curl -F image=@{sample} '{url}/explain?include=overlay'",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(
        f"    curl -F image=@{sample} {url}/explain -H 'accept: image/jpeg' -o why.jpg",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(f"  try every route:          {url}/docs", highlight=False)
    ERR.print("  how-to and reference:     README.md and docs/\n", highlight=False)


def _sample() -> str:
    """Return the path of the sample image in a checkout, else a placeholder."""
    sample = Path(__file__).parents[2] / "examples" / "sunflower.jpg"
    return os.path.relpath(sample) if sample.exists() else "YOUR.jpg"
