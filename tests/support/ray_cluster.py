"""A Ray cluster of two nodes on this machine, in a network of its own.

Ray listens on every interface whatever it is told, so these tests run only where there is none but
loopback: `make ray` starts them in such a namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]

HEAD, WORKER = "10.77.0.1", "10.77.0.2"
"""Addresses that `make ray` gives the loopback interface."""
DASHBOARD = f"http://{HEAD}:8265"
URL = f"http://{HEAD}:8000"


def until(true: Callable[[], bool], seconds: float = 240, said: Callable[[], Any] = str) -> None:
    """Wait for what other processes do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, said()
        threading.Event().wait(0.2)


class Cluster:
    """Two nodes; the second can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, address: str) -> None:
        """Start a node and wait for it. Each has one core to give away."""
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--node-ip-address", address, "--num-cpus", "1", "--disable-usage-stats"]
        command += ["--object-store-memory", str(80 << 20), "--num-gpus", "0"]
        if address == HEAD:
            command += ["--head", "--port", "6379", "--dashboard-host", HEAD]
        else:
            command += ["--address", f"{HEAD}:6379"]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
            "CAMSERVE_COMPILE": "false",
            "RAY_worker_niceness": "0",  # 15 otherwise: nothing beside a busy neighbour
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # or the head's replica gets all
            "RAY_TMPDIR": str(self.folder),  # a short path: sockets are made in it
        }
        log = (self.folder / f"{address}.log").open("wb")
        with log:
            self._nodes[address] = subprocess.Popen(  # ended by `kill`
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: address in self.alive(), said=lambda: self.log(address))

    def kill(self, address: str) -> None:
        """As a power cut does: every process of a node at once."""
        node = self._nodes.pop(address, None)
        if node is None:
            return
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        node.wait()

    def close(self) -> None:
        for address in (WORKER, HEAD):
            self.kill(address)

    def log(self, address: str) -> str:
        return (self.folder / f"{address}.log").read_text(errors="replace")[-3000:]

    def alive(self) -> set[str]:
        """The addresses of the nodes that the head counts in."""
        try:
            answer = httpx.get(f"{DASHBOARD}/nodes?view=summary", timeout=5, trust_env=False)
            nodes = answer.json()["data"]["summary"]
        except (httpx.HTTPError, ValueError, KeyError):
            return set()
        raylets = [node["raylet"] for node in nodes]
        return {each["nodeManagerAddress"] for each in raylets if each.get("state") == "ALIVE"}

    def deploy(self, arguments: dict[str, Any], import_path: str = "app", **options: Any) -> None:
        """Serve the app at `URL`, and wait until Ray says that it runs as asked."""
        shape = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.2}, **options}
        if "autoscaling_config" in shape:
            del shape["num_replicas"]
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": HEAD, "port": 8000},
            "applications": [
                {
                    "name": "camserve",
                    "route_prefix": "/",
                    "import_path": f"service.ray_serve:{import_path}",
                    "args": {"device": "cpu", **arguments},
                    "deployments": [{"name": "camserve", **shape}],
                }
            ],
        }
        url = f"{DASHBOARD}/api/serve/applications/"
        answer = httpx.put(url, json=config, timeout=240, trust_env=False)
        assert answer.is_success, answer.text
        until(lambda: self.status()["status"] == "RUNNING", said=self.status)

    def status(self) -> dict[str, Any]:
        """What Ray says of the app."""
        url = f"{DASHBOARD}/api/serve/applications/"
        answer = httpx.get(url, timeout=30, trust_env=False).json()
        found: dict[str, Any] = answer["applications"].get("camserve", {"status": "NOT_STARTED"})
        return found

    def replicas(self) -> list[str]:
        """The address of the node of each running replica."""
        replicas = self.status().get("deployments", {}).get("camserve", {}).get("replicas", [])
        return sorted(each["node_ip"] for each in replicas if each["state"] == "RUNNING")


class Clients:
    """Threads that ask again and again, and retry what may be retried, as `Retry-After` says."""

    def __init__(self, count: int, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        self.statuses: list[int] = []
        self.retried: list[int] = []
        self._ask = ask
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def _run(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                self.statuses.append(self._answer(client))

    def _answer(self, client: httpx.Client) -> int:
        for _ in range(60):
            try:
                answer = self._ask(client)
            except httpx.TransportError:
                status, wait = 0, 1.0
            else:
                status, wait = answer.status_code, float(answer.headers.get("Retry-After", 1))
            if status not in (0, 429, 500, 503):  # 500: Ray's word for a replica that died
                return status
            self.retried.append(status)
            self._stop.wait(wait)
        return status

    @contextmanager
    def asking(self) -> Iterator[Clients]:
        """While the `with` runs; then each gets the answer it waits for."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
