"""Change one token of the service at a time, and see whether the tests of that module notice.

    PYTHONPATH=. python tools/mutants.py --count 45 --seed 0 --jobs 2
    PYTHONPATH=. python tools/mutants.py service/cam service/models/pool.py

Mutants are drawn by a seed and run in copies of the checkout, each against the tests of its module
that `mutants.toml` names. What survives is printed: kill it with a test, or list it there with the
reason why no test can tell it from the original.

Why no tool from elsewhere: mutmut (3.8) changes the bodies of functions alone, none with a
decorator but static and class methods, so that constants, tables and fields of dataclasses are left
out; it calls every function through a wrapper, which torch.fx traces and pickles see; and it learns
which test reaches what from a run of the whole suite, in forks of a process that has run torch.
cosmic-ray (8.7) changes the files of the checkout itself, knows one test command for all of them,
and lists every mutant there is instead of drawing some: 4,000 here, each at the ten seconds
that importing torch and a few tests take.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

ROOT = Path(__file__).parent.parent
TARGETS = (
    *("service/cam", "service/images", "service/inference", "service/scheduling"),
    "service/models/pool.py",
)
KNOWN = Path(__file__).with_suffix(".toml")
NEEDS_A_TOOL = "not browser and not labeling and not container and not protocols and not ray"
MARKED = f"{NEEDS_A_TOOL} and not gpu and not large"

_SWAPPED = (
    *(("==", "!="), ("is", "is not"), ("in", "not in"), ("and", "or"), ("True", "False")),
    *(("+", "-"), ("*", "/"), ("<<", ">>"), ("&", "|"), ("min", "max"), ("any", "all")),
    *(("+=", "-="), ("*=", "/="), ("<<=", ">>="), ("&=", "|="), ("break", "continue")),
)
INSTEAD: dict[str, tuple[str, ...]] = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "//": ("/",),
    "//=": ("/=",),
    "%": ("*",),
    "**": ("*",),
    "^": ("&",),
    **{one: (other,) for pair in _SWAPPED for one, other in (pair, pair[::-1])},
}
"""What a token becomes. A number becomes the next one; `not` and a minus sign are left out."""

Place = tuple[int, int]
"""Line, from 1, and character, from 0."""


@dataclass(frozen=True)
class Mutant:
    """One change: `before` between two places of one line of a module becomes `after`."""

    module: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def applied(self, source: str) -> str:
        """The source of its module with the change."""
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1]
        lines[self.line - 1] = text[: self.start] + self.after + text[self.end :]
        return "".join(lines)

    def shown(self, source: str) -> tuple[str, str]:
        """Its line without and with the change."""
        before, after = (
            text.splitlines()[self.line - 1].strip() for text in (source, self.applied(source))
        )
        return before, after


# ---- what can be changed


class _Finder(ast.NodeVisitor):
    """Collects the tokens of a module that may be changed.

    Left out is what says nothing about behaviour: annotations, decorators, asserts, unions of types
    at the top of a module, and the words of f-strings.
    """

    def __init__(self, source: str) -> None:
        self.found: set[tuple[Place, Place, str, tuple[str, ...]]] = set()
        self._lines = source.splitlines()
        self._depth = 0
        self._tokens = [
            each
            for each in tokenize.generate_tokens(io.StringIO(source).readline)
            if each.type in {tokenize.OP, tokenize.NAME, tokenize.NUMBER}
        ]
        self._at = {each.start: each for each in self._tokens}

    def _place(self, line: int, column: int) -> Place:
        """A place as tokenize counts it: ast counts bytes of UTF-8."""
        return line, len(self._lines[line - 1].encode()[:column].decode())

    def _start(self, node: ast.expr | ast.stmt) -> Place:
        return self._place(node.lineno, node.col_offset)

    def _end(self, node: ast.expr | ast.stmt) -> Place:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._place(node.end_lineno, node.end_col_offset)

    def _first(self, node: ast.expr | ast.stmt, *after: str) -> None:
        """Note the token that a node begins with."""
        token = self._at[self._start(node)]
        self.found.add((token.start, token.end, token.string, after or INSTEAD[token.string]))

    def _between(self, left: ast.expr, right: ast.expr) -> None:
        """Note the operator between two operands; brackets are passed over."""
        start, end = self._end(left), self._start(right)
        within = [each for each in self._tokens if start <= each.start and each.end <= end]
        names = " ".join(each.string for each in within if each.type == tokenize.NAME)
        for token in within:
            if names in {"is not", "not in"} and token.type == tokenize.NAME:
                last = self._at[token.end[0], token.end[1] + 1]
                self.found.add((token.start, last.end, names, INSTEAD[names]))
                return
            if token.string in INSTEAD:
                self.found.add((token.start, token.end, token.string, INSTEAD[token.string]))
                return

    def visit_Compare(self, node: ast.Compare) -> None:
        for pair in pairwise((node.left, *node.comparators)):
            self._between(*pair)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for pair in pairwise(node.values):
            self._between(*pair)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if self._depth or not isinstance(node.op, ast.BitOr):
            self._between(node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._between(node.target, node.value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._first(node, "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._first(node)
        elif isinstance(node.value, int | float):
            self._first(node, str(node.value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in {"min", "max", "any", "all"}:
            self._first(node.func)
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._first(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._first(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        for each in (*node.args.defaults, *node.args.kw_defaults, *node.body):
            if each is not None:
                self.visit(each)
        self._depth -= 1

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in node.body:
            self.visit(each)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assert states what the types cannot."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """One token, in Python 3.11."""


def mutants_of(module: str) -> list[Mutant]:
    """Every change of one module, in order."""
    source = (ROOT / module).read_text(encoding="utf-8")
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return [
        Mutant(module, line, start, end, before, after)
        for (line, start), (_, end), before, instead in sorted(finder.found)
        for after in instead
    ]


# ---- what is known of modules and mutants


@cache
def _known() -> dict[str, Any]:
    return tomllib.loads(KNOWN.read_text(encoding="utf-8"))


def tests_of(module: str) -> tuple[str, ...]:
    """A module's own tests, as paths in the checkout. Raises LookupError where none are named."""
    fits = [each for each in _known()["tests"] if module == each or module.startswith(f"{each}/")]
    if not fits:
        raise LookupError(f"{KNOWN.name} names no tests of {module}")
    return tuple(f"tests/{name}.py" for name in _known()["tests"][max(fits, key=len)])


def equivalents() -> set[tuple[str, str, str]]:
    """Module, line and changed line of every mutant that changes nothing."""
    listed = _known().get("equivalent", ())
    return {(each["module"], each["line"], each["mutant"]) for each in listed}


# ---- running them


class Copy:
    """A copy of the checkout's files, in which a mutant may live."""

    def __init__(self, parent: Path) -> None:
        self.root = parent / "checkout"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        if (shared := ROOT.parent / "shared").is_dir():
            (parent / "shared").symlink_to(shared)

    def tested(self, module: str, seconds: float | None) -> subprocess.CompletedProcess[str]:
        """A run of the module's tests up to the first failure. Raises TimeoutExpired."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--no-header"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", MARKED, *tests_of(module)]
        # Bytecode is told from the source by its second and its size, which a mutant may share.
        own = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
        return subprocess.run(  # noqa: S603 - our own tests
            command,
            cwd=self.root,
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def outcome(self, mutant: Mutant, seconds: float) -> str:
        """`survived`, `killed`, or `timeout`, which counts as killed."""
        path = self.root / mutant.module
        source = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied(source), encoding="utf-8")
        try:
            return "killed" if self.tested(mutant.module, seconds).returncode else "survived"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            path.write_text(source, encoding="utf-8")


class Runner:
    """Runs mutants, each in a copy that no other uses meanwhile."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._free: SimpleQueue[Copy] = SimpleQueue()
        for each in copies:
            self._free.put(each)
        self._seconds: dict[tuple[str, ...], float] = {}
        self._lock = Lock()

    def __call__(self, mutant: Mutant) -> tuple[Mutant, str]:
        copy = self._free.get()
        try:
            return mutant, copy.outcome(mutant, 3 * self._unchanged(copy, mutant.module) + 30)
        finally:
            self._free.put(copy)

    def _unchanged(self, copy: Copy, module: str) -> float:
        """Seconds that the module's tests take without a mutant. Raises where they fail."""
        tests = tests_of(module)
        with self._lock:
            known = self._seconds.get(tests)
        if known is not None:
            return known
        began = time.monotonic()
        ran = copy.tested(module, None)
        if ran.returncode:
            raise RuntimeError(f"the tests of {module} fail without a mutant:\n{ran.stdout}")
        with self._lock:
            return self._seconds.setdefault(tests, time.monotonic() - began)


def modules(targets: Sequence[str]) -> Iterator[str]:
    """The modules of files and folders, as paths in the checkout."""
    for target in targets:
        path = (ROOT / target).resolve()
        for each in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield each.relative_to(ROOT).as_posix()


def main() -> int:
    """1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, help="files and folders to change")
    parser.add_argument("--count", type=int, default=45, help="how many mutants are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants that run side by side")
    parser.add_argument("--list", action="store_true", help="show what is drawn, run nothing")
    given = parser.parse_args()

    everything = [each for module in modules(given.targets) for each in mutants_of(module)]
    seeded = random.Random(given.seed)  # noqa: S311 - the same mutants again
    drawn = seeded.sample(everything, min(given.count, len(everything)))
    sources = {each.module: (ROOT / each.module).read_text(encoding="utf-8") for each in drawn}
    known = equivalents()
    same = [each for each in drawn if (each.module, *each.shown(sources[each.module])) in known]
    print(f"{len(drawn)} of {len(everything)} mutants, seed {given.seed}", flush=True)

    def tell(mutant: Mutant, outcome: str) -> None:
        before, after = mutant.shown(sources[mutant.module])
        print(f"{outcome:10} {mutant.module}:{mutant.line}\n    {before}\n    {after}", flush=True)

    for each in same:
        tell(each, "equivalent")
    rest = [each for each in drawn if each not in same]
    if given.list:
        for each in rest:
            tell(each, "drawn")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(given.jobs)]
        counts = {"killed": 0, "timeout": 0, "survived": 0}
        with ThreadPoolExecutor(given.jobs) as pool:
            for mutant, outcome in pool.map(Runner(copies), rest):
                counts[outcome] += 1
                tell(mutant, outcome)
    killed = counts["killed"] + counts["timeout"]
    print(
        f"{killed} of {len(rest)} killed ({counts['timeout']} by a timeout), "
        f"{counts['survived']} survived, {len(same)} more are equivalent"
    )
    return 1 if counts["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
