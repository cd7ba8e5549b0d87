"""The whole service for tests: in this thread's reach, or behind a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
from running import DEVICE, Server, running
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

Serve = Callable[..., AbstractContextManager[TestClient]]
RunServer = Callable[..., AbstractContextManager[Server]]


@contextmanager
def served(**settings: Any) -> Iterator[TestClient]:
    """A client of a new app with these settings; its threads end with the `with`."""
    values = {"models": ("tiny:small",), "device": DEVICE, "workers": 1, **settings}
    with TestClient(create_app(Settings(**values))) as client:
        yield client


@pytest.fixture(scope="session")
def serve() -> Serve:
    """A client of a service with settings of its own; see `served`."""
    return served


@pytest.fixture(scope="session")
def run_server() -> RunServer:
    """A server with settings of its own, for hang-ups, drains and chunks; see `running`."""
    return running


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """A client of the models `small` (the default) and `other`."""
    with served(models=("tiny:small", "other=tiny:other"), workers=2) as client:
        yield client


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """A client for real servers."""
    with httpx.Client(timeout=10, trust_env=False) as client:
        yield client
