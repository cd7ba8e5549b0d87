"""Run the tutorial on right reasons, and keep the images that it makes.

    PYTHONPATH=tests/support .venv/bin/python docs/make_tutorial_images.py

Writes docs/images/tutorial-*.webp. Only what the project itself drew is in them.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from PIL import Image
from reading import blocks, reader

DOCS = Path(__file__).parent
PICTURES = ("sunflower", "dandelion", "plane")


def main() -> None:
    """Every block but those that want an image of one's own."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        sys.path.insert(0, name)
        with reader(folder) as reading:
            for block in blocks(DOCS / "tutorials" / "right-for-the-right-reason.md"):
                if "airport.jpg" not in block.text:
                    print(reading.do(block), end="")
        for picture in PICTURES:
            target = DOCS / "images" / f"tutorial-{picture}.webp"
            with Image.open(folder / f"{picture}.jpg") as drawn:
                drawn.save(target, quality=85, method=6)
            print(f"docs/images/{target.name}: {target.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
