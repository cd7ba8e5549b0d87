"""What `mkdocs.yml` cannot say: pages from outside docs/, and the words behind a fence."""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent

GUESTS = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "reference/repeat-the-benchmarks.md",
}
"""Pages that live elsewhere in the repository, by their place there, and their place here."""

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)#\s]+)([^)]*)\)")
FENCE = re.compile(r"^```(\w+)[ ]+(.+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the guests, and the icon that the service itself has."""
    for source, place in GUESTS.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=content))
    icon = ROOT / "service" / "routes" / "page" / "favicon.svg"
    files.append(File.generated(config, "images/favicon.svg", abs_src_path=str(icon)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site; a fence keeps its language, and the file that it is."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    at_home = {place: source for source, place in GUESTS.items()}
    folder = posixpath.dirname(at_home.get(here, posixpath.join("docs", here)))

    def link(found: re.Match[str]) -> str:
        words, place, rest = found.groups()
        if "://" in place:
            return found[0]
        target = posixpath.normpath(posixpath.join(folder, place))
        if target not in GUESTS and not target.startswith("docs/") and (ROOT / target).exists():
            return words[1:-1]  # a file of the repository, which the site does not have
        there = GUESTS.get(target, target.removeprefix("docs/"))
        return f"{words}({posixpath.relpath(there, posixpath.dirname(here) or '.')}{rest})"

    def fence(found: re.Match[str]) -> str:
        file = re.search(r"file=(\S+)", found[2])
        return f'```{found[1]} title="{file[1]}"' if file else f"```{found[1]}"

    return FENCE.sub(fence, LINK.sub(link, markdown))


def on_post_build(config: Any) -> None:
    """Put the pages' own text beside them, as `llms.txt` names them."""
    for page in sorted(Path(config["docs_dir"]).rglob("*.md")):
        place = Path(config["site_dir"]) / page.relative_to(config["docs_dir"])
        shutil.copy(page, place)
