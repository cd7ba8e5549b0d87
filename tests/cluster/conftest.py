"""The cluster that the tests in this folder share."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import HEAD, WORKER, Cluster


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("Ray listens on every interface; `make ray` runs this where there is none")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    cluster = Cluster(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")  # a token in the user's home switches it on
            cluster.start(HEAD)
            yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """Both nodes, whatever the test before did to them."""
    if WORKER not in _cluster.alive():
        _cluster.kill(WORKER)
        _cluster.start(WORKER)
    return _cluster
