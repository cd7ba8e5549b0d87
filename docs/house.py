"""Draw the house into architecture.md: each room of the code, its floor and what it imports.

    python docs/house.py

The floors are those of the import contract in pyproject.toml, the sentences are the docstrings, the
imports are read from the syntax trees: nothing of the service is imported. A test compares the
committed page with what this would write.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BEGIN, END = "<!-- house:begin -->", "<!-- house:end -->"


@dataclass(frozen=True)
class Part:
    """A module or package below `service` or `api_schemas`.

    path: of its file, or of its folder with a slash at the end, from the root of the repository.
    """

    name: str
    path: str
    tree: ast.Module

    @property
    def sentence(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join((ast.get_docstring(self.tree) or "").split("\n\n")[0].split())


def parts(package: str) -> dict[str, Part]:
    """Every module of a package by its dotted name, a package as its `__init__`."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        path = file.relative_to(ROOT)
        is_package = path.name == "__init__.py"
        name = ".".join(path.parent.parts if is_package else path.with_suffix("").parts)
        shown = f"{path.parent.as_posix()}/" if is_package else path.as_posix()
        found[name] = Part(name, shown, ast.parse(file.read_text(encoding="utf-8")))
    return found


def floors() -> list[list[str]]:
    """The rooms of `service` on each floor, the ground floor first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each["type"] == "layers")
    return [re.findall(r"\w+", layer) for layer in reversed(layers)]


def room_of(name: str) -> str:
    """The first two parts of a dotted name: the room that a module is in."""
    return ".".join(name.split(".")[:2])


def imported(part: Part, known: Mapping[str, Part]) -> Iterator[str]:
    """The modules of this repository that a module imports, anywhere in it."""
    for node in ast.walk(part.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module in known:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in known else node.module


def arrows(known: Mapping[str, Part]) -> Mapping[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for name, part in known.items():
        targets = {room_of(target) for target in imported(part, known)}
        found.setdefault(room_of(name), set()).update(targets - {room_of(name)})
    return found


def drawing(levels: list[list[str]]) -> Iterator[str]:
    """The floors as text, the roof first."""
    rows = [f" {number:>2}   {'   '.join(names)} " for number, names in enumerate(levels)]
    width = max(map(len, rows))
    yield "```text"
    yield f"┌{'─' * width}┐"
    for row in reversed(rows):
        yield f"│{row:<{width}}│"
    yield f"└{'─' * width}┘"
    yield "```"


def rooms_table(levels: list[list[str]], known: Mapping[str, Part]) -> Iterator[str]:
    """Every room of `service` from the roof down, each with the packages in it."""
    leads_to = arrows(known)
    floor_of = {name: number for number, names in enumerate(levels) for name in names}
    yield "| floor | room | what it is | imports |"
    yield "|---|---|---|---|"
    for number, names in reversed(list(enumerate(levels))):
        for name in names:
            part = known[f"service.{name}"]
            targets = [room.removeprefix("service.") for room in leads_to[part.name]]
            targets = sorted({room.split(".")[0] for room in targets if room != "service"})
            targets.sort(key=lambda room: -floor_of.get(room, -1))
            shown = " ".join(f"`{room}`" for room in targets) or "–"
            yield f"| {number} | `{part.path}` | {part.sentence} | {shown} |"
            for inner in known.values():
                if inner.name.startswith(f"{part.name}.") and inner.path.endswith("/"):
                    yield f"| | `{inner.path}` | {inner.sentence} | |"


def wire_table(known: Mapping[str, Part]) -> Iterator[str]:
    """Every module and package right below `api_schemas`."""
    leads_to = arrows(known)
    yield "| room | what it is | imports |"
    yield "|---|---|---|"
    for name, part in known.items():
        if name.count(".") == 1:
            targets = sorted(room for room in leads_to[name] if room.startswith("api_schemas."))
            shown = " ".join(f"`{room.removeprefix('api_schemas.')}`" for room in targets) or "–"
            yield f"| `{part.path}` | {part.sentence} | {shown} |"


def page() -> str:
    """The page with the house as it is now; all else as it was written."""
    service, wire = parts("service"), parts("api_schemas")
    levels = floors()
    lines = [
        BEGIN,
        "",
        *drawing(levels),
        "",
        *rooms_table(levels, service | wire),
        "",
        f"Beside the house stands `api_schemas/`. {wire['api_schemas'].sentence}",
        "",
        *wire_table(wire),
        "",
        END,
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
