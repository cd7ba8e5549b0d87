from __future__ import annotations

import ctypes
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import build_service
from service.resources import collector_paused, memory_limit
from service.settings import Settings

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, MACHINE),
        ({"memory.max": "max\n"}, MACHINE),
        ({"memory.max": "268435456\n"}, 256 << 20),
        ({"memory/memory.limit_in_bytes": "134217728\n"}, 128 << 20),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
    ],
)
def test_the_limit_is_the_containers_or_else_the_machines(
    tmp_path: Path, files: dict[str, str], limit: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


def test_metrics_say_what_memory_is_held_and_how_much_may_be() -> None:
    service = build_service(Settings(models=("tiny:small",), workers=1))
    families = text_string_to_metric_families(service.metrics.render().decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["process_resident_memory_bytes"] > 10 << 20
    assert values["camserve_memory_limit_bytes"] == memory_limit()


ARENAS = """
import ctypes, sys, threading
from service.resources import tune_allocator

tune_allocator()
together = threading.Barrier(8)

def allocate():
    together.wait()
    kept = [bytearray(1000) for _ in range(1000)]
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not the C library glibc")
@pytest.mark.parametrize(("asked", "most"), [(None, 2), ("4", 4)])
def test_threads_share_two_arenas_or_as_many_as_the_environment_says(
    tmp_path: Path, asked: str | None, most: int
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if asked is not None:
        environment["MALLOC_ARENA_MAX"] = asked
    file = tmp_path / "arenas.xml"
    subprocess.run([sys.executable, "-c", ARENAS, file], check=True, env=environment)
    assert file.read_text().count("<heap nr=") == most


COLLECTED = """
import gc
from service.app import build_service
from service.resources import spare_collector
from service.settings import Settings

spare_collector()
service = build_service(Settings(models=("builtin",), workers=2))
assert service.pool.models
print(gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_a_full_collection_passes_over_what_was_imported_and_not_over_models() -> None:
    printed = subprocess.check_output([sys.executable, "-c", COLLECTED], text=True)
    frozen, collectable = (int(each) for each in printed.splitlines()[-1].split())
    assert frozen > 5 * collectable > 5_000


def test_the_collector_is_paused_until_the_last_one_is_done() -> None:
    """And stays off where it was off before."""
    assert gc.isenabled()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="why"), collector_paused():
        raise ValueError("why")
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


ALLOCATING = """
import ctypes, re, pathlib
from service.resources import return_freed_memory, tune_allocator

tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) >> 10
"""

FREED = """
blocks = [libc.malloc(64 << 20) for _ in range(16)]
for block in blocks:
    ctypes.memset(block, 1, 64 << 20)
steps = [resident()]
for block in reversed(blocks):
    libc.free(block)
    steps.append(resident())
print(*steps)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not the C library glibc")
def test_freed_memory_returns_to_the_kernel_in_pieces_of_at_most_256_mib() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", ALLOCATING + FREED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [int(step) for step in result.stdout.split()]
    returned = [before - after for before, after in itertools.pairwise(steps)]
    assert max(returned) <= 256 + 64, "what one free() gives back while it holds Python's lock"
    assert steps[0] - steps[-1] >= 512, "most of the GiB went back"


SCATTERED = """
blocks, kept = [], []
for _ in range(100):
    blocks.append(libc.malloc(1 << 20))
    kept.append(libc.malloc(1000))
    ctypes.memset(blocks[-1], 1, 1 << 20)
for block in blocks:
    libc.free(block)
freed = resident()
return_freed_memory()
print(freed - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not the C library glibc")
def test_freed_memory_between_blocks_in_use_is_returned_when_asked_for() -> None:
    printed = subprocess.check_output([sys.executable, "-c", ALLOCATING + SCATTERED], text=True)
    assert int(printed) > 90
