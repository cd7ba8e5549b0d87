"""Requests that arrive and answers that are sent: slow clients are ended when others need room.

    with transfers.receive("192.0.2.7", end=give_up) as transfer:
        transfer.moved = size  # whenever more has arrived

A transfer has `grace` seconds. They pass, and every `rate` bytes that it moves give one back: never
more than were lost, so that a client cannot send much at first and then nothing for long. The code
that runs a transfer ends it when no seconds are left. Before that, a transfer that has lost some is
ended as soon as another one needs what it holds.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

from service.errors import QueueFull

PATIENCE = 1.0
"""Seconds that a transfer may lose before it counts as slow, and is ended for others."""


class Transfers:
    """All transfers of the service. Used on the event loop alone.

    rate:            minimum bytes per second that a client sends or reads, over `grace` seconds.
    most:            requests that have arrived in part, in total.
    most_per_client: those of one IPv4 address or one IPv6 /64 network.
    """

    def __init__(
        self, *, rate: float, grace: float, most: int = 512, most_per_client: int = 256
    ) -> None:
        self.rate = rate
        self.grace = grace
        self.most = most
        self.most_per_client = most_per_client
        self._all: set[Transfer] = set()
        self._arriving: Counter[str] = Counter()

    @property
    def arriving(self) -> int:
        """Requests that have arrived in part."""
        return self._arriving.total()

    @property
    def leaving(self) -> int:
        """Answers that their clients have not read completely."""
        return len(self._all) - self.arriving

    def receive(
        self,
        client: str,
        *,
        end: Callable[[], None],
        holds: Callable[[str], bool] = lambda _: False,
    ) -> Transfer:
        """Start the transfer of a request that arrives.

        Raises QueueFull if the maximum of requests is arriving and none of them is slow.
        """
        network = network_of(client)
        while self._arriving[network] >= self.most_per_client:
            self._end_slowest(lambda other: other.network == network)
        while self.arriving >= self.most:
            self._end_slowest(lambda other: other.network is not None)
        self._arriving[network] += 1
        return self._begin(Transfer(self, network, None, end, holds))

    def send(
        self, *, measure: Callable[[], int], end: Callable[[], None], holds: Callable[[str], bool]
    ) -> Transfer:
        """Start the transfer of an answer that is sent."""
        return self._begin(Transfer(self, None, measure, end, holds))

    def make_room(self, counter: str) -> bool:
        """End the slowest transfer that holds some of a counter; False if none is slow."""
        try:
            self._end_slowest(lambda transfer: transfer.holds(counter))
        except QueueFull:
            return False
        return True

    def _begin(self, transfer: Transfer) -> Transfer:
        self._all.add(transfer)
        return transfer

    def _end_slowest(self, matches: Callable[[Transfer], bool]) -> None:
        slow = [transfer for transfer in self._all if matches(transfer) and transfer.is_slow]
        if not slow:
            raise QueueFull(
                f"{self.arriving} requests are arriving, which is the maximum of this service in "
                "total or from one address; try again after the seconds in Retry-After."
            )
        slowest = min(slow, key=lambda transfer: transfer.deadline)
        slowest.close()
        slowest.end()

    def forget(self, transfer: Transfer) -> None:
        """Stop counting a transfer. For `Transfer` alone."""
        if transfer not in self._all:
            return
        self._all.remove(transfer)
        if transfer.network is not None:
            self._arriving[transfer.network] -= 1
            self._arriving += Counter()  # drops zeros, which would pile up


class Transfer:
    """One request or answer in transfer; it ends with its `with`, or with `close`.

    network: of the client whose request arrives; None for an answer.
    moved:   bytes received or sent so far; set by the code that receives them.
    measure: returns `moved` where the code does not see each byte, as of an answer.
    end:     called when the transfer has to make room; releases what it holds.
    holds:   whether it holds some of a counter of `Admission`, which ending it would free.
    """

    def __init__(
        self,
        transfers: Transfers,
        network: str | None,
        measure: Callable[[], int] | None,
        end: Callable[[], None],
        holds: Callable[[str], bool],
    ) -> None:
        self.network = network
        self.end = end
        self.holds = holds
        self.moved = 0
        self._measure = measure
        self._transfers = transfers
        self._counted = 0
        self._deadline = time.monotonic() + transfers.grace

    @property
    def deadline(self) -> float:
        """When it must have moved more, as `time.monotonic` counts."""
        if self._measure is not None:
            self.moved = self._measure()
        latest = time.monotonic() + self._transfers.grace
        gained = (self.moved - self._counted) / self._transfers.rate
        self._counted = self.moved
        self._deadline = min(self._deadline + gained, latest)
        return self._deadline

    @property
    def is_slow(self) -> bool:
        """Whether it has been below the rate for longer than PATIENCE."""
        return time.monotonic() + self._transfers.grace - self.deadline >= PATIENCE

    def close(self) -> None:
        """Stop counting it; a second call does nothing."""
        self._transfers.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def network_of(client: str) -> str:
    """The addresses that one client may have: one IPv4 address, or an IPv6 /64 network."""
    if ":" not in client:
        return client
    try:
        address = ipaddress.IPv6Address(client.partition("%")[0])
    except ValueError:
        return client
    return str(address.ipv4_mapped or int(address) >> 64)
