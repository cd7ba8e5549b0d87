"""Twenty thousand requests, a fifth of them faulty: what is answered right, and what is left.

    .venv/bin/python benchmarks/soak.py --requests 20000      # about ten minutes on two cores

The parts are those of `tests/integration/test_soak.py`, which is the same with four hundred
requests: `tests/support/soaking.py`. Ctrl-C ends it early, with the table of what was sent until
then.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import torch
from measuring import ROOT, machine

sys.path.insert(0, str(ROOT / "tests" / "support"))

from soaking import Soak, served_for_a_soak

from service.resources import tune_allocator


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, print the table, and fail where anything is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--hang-timeout", type=float, default=5.0, help="of the server")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tune_allocator()  # as `camserve serve` does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background

    def say(number: int) -> None:
        print(f"{number} requests", end="\r", file=sys.stderr, flush=True)

    with served_for_a_soak(hang_timeout=options.hang_timeout) as server:
        soak = Soak(server, clients=options.clients, progress=say)
        soak.run(options.requests)
        print(f"{soak.table()}\n\n{machine()}")
    found = soak.verdicts()
    print("\n".join(found) or "Everything is as it must be.")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
