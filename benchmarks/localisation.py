"""Do the maps show where the object is? Ours beside pytorch-grad-cam and beside trivial maps.

    .venv/bin/python benchmarks/localisation.py --data ../shared/data --model mobilenet_v2

Prints, in Markdown, a table for each measure that separates a good map from a trivial one, and for
each measure whether ours is below the peer's for a method that both have. It is where the 95 %
interval of the paired difference excludes zero on the wrong side; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # pytorch-grad-cam reports its progress

import torch
from localisation_cases import Grid, View, grids, photos, quarter, views
from localisation_maps import FAST, PEERS, SLOW, Map, Peer, ours, trivial
from localisation_measures import Curves, Table, energy, pointed
from torch import Tensor

from service.errors import CamserveError
from service.models.catalog import parse_model
from service.models.loading import load_model
from service.models.pool import ModelPool, Replica

MODELS = ("mobilenet_v2", "squeezenet1_1")
TRIVIAL = ("centre", "random")


@dataclass
class Tables:
    """One table a measure."""

    grid: Table = field(default_factory=lambda: Table("energy in the right quarter"))
    pointing: Table = field(default_factory=lambda: Table("pointing at off-centre objects"))
    mask: Table = field(default_factory=lambda: Table("energy in the mask / area of the mask"))
    insertion: Table = field(default_factory=lambda: Table("insertion"))
    deletion: Table = field(default_factory=lambda: Table("deletion", sign=-1))

    def all(self) -> tuple[Table, ...]:
        return self.grid, self.pointing, self.mask, self.insertion, self.deletion


@dataclass
class Bench:
    """The model under test, ours and the peer's, and what was measured."""

    replica: Replica
    peer: Peer
    options: argparse.Namespace
    tables: Tables = field(default_factory=Tables)
    refused: dict[str, str] = field(default_factory=dict)

    def maps(
        self, pixels: Tensor, targets: Sequence[int], *, slow: bool
    ) -> Iterator[tuple[str, str, list[Map]]]:
        """(method, side, a map of each target): trivial ones, ours, the peer's raw and handed out.

        Slow methods explain the first target alone.
        """
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        for name, cam in trivial(size, int(pixels.sum())).items():
            yield name, "ours", [cam] * len(targets)
        for method in self.options.methods:
            if method in SLOW and not slow:
                continue
            asked = targets[:1] if method in SLOW else targets
            found = ours(self.replica, pixels, method, asked)
            if isinstance(found, CamserveError):
                self.refused[method] = str(found)
                continue
            yield method, "ours", found
            if method in PEERS:
                pairs = [self.peer.maps(pixels, method, target) for target in asked]
                yield method, "peer", [raw for raw, _ in pairs]
                yield method, "delivered", [delivered for _, delivered in pairs]

    def look_at_grid(self, number: int, grid: Grid) -> None:
        """Energy in the right quarter for each of the four targets."""
        slow = number < self.options.slow_grids
        for method, side, maps in self.maps(grid.pixels, grid.targets, slow=slow):
            for index, cam in enumerate(maps):
                value = energy(cam, quarter(index, (cam.shape[0], cam.shape[1])))
                self.tables.grid.add(method, side, (f"grid {number}", index), value)

    def look_at_view(self, number: int, view: View) -> None:
        """Pointing, energy in the mask, and for the first ones insertion and deletion."""
        curves = None
        if number < self.options.curves:
            curves = Curves(self.replica, view.pixels, view.target, self.options.seed)
        case = (view.photo, number)
        for method, side, (cam,) in self.maps(
            view.pixels, [view.target], slow=number < self.options.slow
        ):
            if view.boxes and side != "delivered":
                self.tables.pointing.add(method, side, case, pointed(cam, view.boxes))
            if view.mask is not None:
                ratio = energy(cam, view.mask) / float(view.mask.mean())
                self.tables.mask.add(method, side, case, ratio)
            if curves is not None and side != "delivered":
                inserted, deleted = curves.areas(cam)
                self.tables.insertion.add(method, side, case, inserted)
                self.tables.deletion.add(method, side, case, deleted)


def main() -> int:
    """Measure, print, and say by the exit code whether ours is below the peer's anywhere."""
    options = _options()
    torch.set_num_threads(options.threads)
    below = False
    for name in [options.model] if options.model else MODELS:
        weights = options.data / "weights" / f"{name}.fp16.safetensors"
        if not weights.exists():
            sys.exit(f"{weights} is not there; say with --data where the real weights are.")
        model = load_model(parse_model(f"torchvision/{name}@{weights}"))
        with ModelPool([model], replicas=1).lease(model.name) as replica:
            bench = Bench(replica, Peer(model), options)
            print(f"## {name}\n")
            _measure(bench)
        below |= _report(bench)
    return int(below)


def _measure(bench: Bench) -> None:
    options = bench.options
    start = time.monotonic()
    with _progress("views"):
        whole, every = views(photos(options.data), bench.replica, options.seed)
    chosen = every[: options.limit]
    for number, view in enumerate(chosen):
        with _progress(f"view {number + 1} of {len(chosen)}"):
            bench.look_at_view(number, view)
    made = grids(whole, options.grids, options.seed)
    for number, grid in enumerate(made):
        with _progress(f"grid {number + 1} of {len(made)}"):
            bench.look_at_grid(number, grid)
    packages = ("torch", "torchvision", "grad-cam", "numpy")
    off_centre = [view for view in chosen if view.boxes]
    print(
        f"{len(whole)} photographs classified right; {len(chosen)} views "
        f"({len(off_centre)} with an off-centre object, of "
        f"{len({view.photo for view in off_centre})} photographs); {len(made)} grids; layer "
        f"`{bench.replica.model.target_layer}`; Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
        + f"; {time.monotonic() - start:.0f} s.\n"
    )


def _report(bench: Bench) -> bool:
    methods = [*bench.options.methods, *TRIVIAL]
    for method, reason in bench.refused.items():
        print(f"`{method}` is refused: {reason}\n")
    for table in bench.tables.all():
        print("\n".join(table.lines(methods)), end="\n\n")
    verdicts = [table.verdict(bench.options.methods) for table in bench.tables.all()]
    for _, sentence in verdicts:
        print(f"- {sentence}")
    print(flush=True)
    return any(is_below for is_below, _ in verdicts)


@contextmanager
def _progress(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="photographs and weights")
    add("--model", choices=MODELS, help="one of the two; both by default")
    add("--methods", nargs="+", choices=FAST + SLOW, default=[*FAST, *SLOW])
    add("--limit", type=int, help="views at most; all by default")
    add("--grids", type=int, default=24, help="2×2 grids, four cases each")
    add("--curves", type=int, default=24, help="views with insertion and deletion")
    add("--slow", type=int, default=4, help=f"views for {', '.join(SLOW)}")
    add("--slow-grids", type=int, default=1, help="grids for them, one case each")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
