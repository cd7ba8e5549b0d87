"""`python -m camserve`, and the command `camserve`: the command line of the service."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run the command line. Exits with code 2 if another module called `service` hides it."""
    spec = find_spec("service")
    origin = Path((spec and spec.origin) or "service").resolve()
    if origin.parent != Path(__file__).resolve().parents[1] / "service":
        sys.exit(_clash(origin))
    from service.cli.main import main as run  # noqa: PLC0415 - only if it is this service

    run()


def _clash(origin: Path) -> int:
    sys.stderr.write(
        f"error: the module 'service' in {origin.parent} hides camserve's package of the same "
        "name. Rename it, or take its folder out of PYTHONPATH; the command `camserve` does not "
        "search the current folder, `python -m` does.\n"
    )
    return 2


if __name__ == "__main__":
    main()
