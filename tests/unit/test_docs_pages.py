"""The documentation as files: every page is found, every link and picture is there."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FROM_OUTSIDE = {"changes.md", "contributing.md", "reference/repeat-the-benchmarks.md"}

LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\""
)
FENCED = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)

NAMED = re.compile(
    r"`((?:api_schemas|benchmarks|deploy|docs|examples|service|tests|tools)/[\w./-]*)`"
)
WALK = re.compile(r"^\| (?:loop|worker) \| `([\w./]+)` \| (.+) \|$", re.MULTILINE)

RUN_BY = {
    "docs/index.md": "integration/test_tutorials.py",
    "docs/tutorials/right-for-the-right-reason.md": "integration/test_tutorials.py",
    "docs/tutorials/find-and-mend.md": "integration/test_tutorials.py",
    "docs/how-to/use-the-command-line.md": "integration/test_tutorials.py",
    "docs/how-to/coming-from-torchserve-kserve-vertex.md": "integration/test_howto_peers.py",
    "docs/how-to/labelbox-and-coco.md": "integration/test_export.py",
    "docs/how-to/serve-your-model.md": "integration/test_howto_serve.py",
    "docs/how-to/use-the-python-client.md": "integration/test_client_howto.py",
    "docs/how-to/experiments.md": "integration/test_client_howto.py",
}
"""Pages whose commands a test runs, and which."""

NOT_RUN = {
    "docs/how-to/audit-a-model.md": "wants a folder of images; test_audit_command runs it on few",
    "docs/how-to/compare-versions.md": "wants two versions; test_compare_command compares two",
    "docs/explanation/boxes-and-regions.md": "wants weights; test_boxes_over_http asks the same",
    "docs/how-to/watch-for-drift.md": "wants many answers; test_drift watches a service",
    "docs/how-to/cvat.md": "wants a CVAT server; test_cvat has its client and a stand-in",
    "docs/how-to/deploy.md": "wants containers or a cluster; test_smoke runs the image",
    "docs/how-to/generate-a-client.md": "wants its tool; test_generated_client runs it",
    "docs/how-to/trace-requests.md": "wants a collector; test_tracing plays one",
    "docs/how-to/explain-many-images.md": "wants many images; test_bulk runs it on few",
    "docs/how-to/fiftyone.md": "wants FiftyOne; test_fiftyone runs its steps there",
    "docs/how-to/label-studio.md": "wants Label Studio; test_labeling_page goes its way",
    "docs/how-to/label-the-uncertain-first.md": "wants Label Studio; test_uncertain_first does it",
    "docs/how-to/manage-models.md": "of weights of one's own; test_repository sends the same verbs",
    "docs/how-to/operate.md": "wants the containers; test_prometheus asks them",
    "docs/how-to/ray.md": "wants Ray; test_serve, test_bulk_on_ray, test_audit_on_ray run there",
    "docs/how-to/scale.md": "wants containers or a cluster; test_deploy_files reads their files",
    "docs/how-to/secure-your-service.md": "test_access sends keys in the same three forms",
    "docs/how-to/tune.md": "wants photographs and minutes; test_calibration does it on a small net",
    "docs/how-to/upgrade.md": "wants containers or a cluster; test_cli drains a process",
    "docs/how-to/x-anylabeling.md": "wants the tool; test_x_anylabeling talks to its client",
    "docs/reference/capacity.md": "takes minutes of full load; it says what it measured",
}
"""Pages with commands that no test runs as they stand, and why."""


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(each)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_page_is_in_the_navigation_once() -> None:
    site = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages_of(site["nav"]))
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    assert set(listed) == there | FROM_OUTSIDE
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("folder", ["tutorials", "how-to", "reference", "explanation"])
def test_every_page_of_a_folder_is_linked_from_its_index(folder: str) -> None:
    linked = set(targets(DOCS / folder / "index.md"))
    others = {page for page in PAGES if page.parent.name == folder} - {DOCS / folder / "index.md"}
    assert others <= linked, others - linked


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=name)
def test_every_relative_link_and_picture_is_there(page: Path) -> None:
    missing = [str(target) for target in targets(page) if not target.exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        path, _, anchor = (found[1] or found[2]).partition("#")
        if anchor and "://" not in path:
            target = page if not path else page.parent / path
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(each) for each in headings}, found[0]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs both make it of plain words."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
    return re.sub(r"[\s]+", "-", plain)


def targets(page: Path) -> Iterator[Path]:
    """What a page links to beside it."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        path = (found[1] or found[2]).partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            yield (page.parent / path).resolve()


def test_pictures_say_what_they_show_and_each_is_used() -> None:
    used = set()
    for page in (ROOT / "README.md", *PAGES):
        text = page.read_text(encoding="utf-8")
        for alternative, path in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text):
            assert len(alternative.split()) > 2, path
            used.add((page.parent / path).resolve())
        for tag in re.findall(r"<img [^>]*>", text):
            assert re.search(r'alt="[^"]{20,}"', tag), tag
            used.add((page.parent / re.search(r'src="([^"]+)"', tag)[1]).resolve())  # type: ignore[index]
    assert set((DOCS / "images").iterdir()) <= used


def test_every_page_with_commands_is_run_by_a_test_or_says_why_not() -> None:
    shells = re.compile(r"^```(sh|console|bash|shell)\b", re.MULTILINE)
    with_commands = {name(page) for page in PAGES if shells.search(page.read_text("utf-8"))}
    assert with_commands == RUN_BY.keys() | NOT_RUN.keys()
    for page, test in RUN_BY.items():
        parts = [part for part in Path(page).parts if part != "docs"]
        assert all(f'"{part}"' in (ROOT / "tests" / test).read_text() for part in parts), page
    tests = {each.stem for each in (ROOT / "tests").rglob("test_*.py")}
    for page, reason in NOT_RUN.items():
        assert set(re.findall(r"\btest_\w+", reason)) <= tests, page


def test_the_site_asks_nothing_of_other_hosts() -> None:
    site = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert site["plugins"] == ["search"]
    for page in PAGES:
        assert not re.search(
            r"!\[[^\]]*\]\(https?://|<img[^>]+src=\"https?://", page.read_text("utf-8")
        )


def test_the_house_is_drawn_as_it_is() -> None:
    """`python docs/house.py` draws it into the page, from the imports and the import contract."""
    house = runpy.run_path(str(DOCS / "house.py"))
    assert house["PAGE"].read_text(encoding="utf-8") == house["page"]()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *PAGES]
)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """By its path from the root of the repository; NNNN stands for a number."""
    names = NAMED.findall(page.read_text(encoding="utf-8"))
    assert [each for each in names if "NNNN" not in each and not (ROOT / each).exists()] == []


def test_the_walk_of_a_request_names_what_is_in_its_files() -> None:
    steps = WALK.findall((DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8"))
    assert len(steps) > 20
    for file, text in steps:
        source = (ROOT / file).read_text(encoding="utf-8")
        for each in re.findall(r"`(\w+)`", text):
            assert re.search(rf"\b{each}\b", source), f"{each} in {file}"


def test_the_glossary_is_in_the_order_of_the_alphabet() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([^|`]+) \| ", page.partition("## Glossary")[2], re.MULTILINE)[1:]
    assert len(words) > 40
    assert words == sorted(words)
