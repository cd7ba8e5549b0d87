"""Requests that arrive and answers that leave: a client that is too slow makes room for others.

    with transfers.receive("192.0.2.7", end=give_up) as transfer:
        transfer.moved = size  # whenever more has arrived

A transfer has `grace` seconds. They pass, and every `rate` bytes that it moves give one back: never
more than were lost, so that nobody sends much, and then nothing for long. Who runs it ends it when
none is left. Before that, one that has lost some is ended as soon as somebody else needs what it
holds.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from service.errors import QueueFull

PATIENCE = 1.0
"""Seconds that a transfer may lose before it counts as slow, and is ended for others."""


class Transfers:
    """All transfers of the service. Used on the event loop alone.

    rate:            bytes a second that a client sends or reads at least, over `grace` seconds.
    most:            requests that have arrived in part, in all.
    most_per_client: those of one address; of IPv6, of one /64 network.
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
        """Answers that their clients have not read yet."""
        return len(self._all) - self.arriving

    def receive(
        self,
        client: str,
        *,
        end: Callable[[], None],
        holds: Callable[[str], bool] = lambda _: False,
    ) -> Transfer:
        """A request that begins to arrive; see `Transfer`.

        Raises QueueFull where as many arrive as may, and none of them is slow.
        """
        network = network_of(client)
        while self._arriving[network] >= self.most_per_client:
            self._end_slowest(lambda each: each.network == network)
        while self.arriving >= self.most:
            self._end_slowest(lambda each: each.network is not None)
        self._arriving[network] += 1
        return self._begin(Transfer(self, network, None, end, holds))

    def send(
        self, *, measure: Callable[[], int], end: Callable[[], None], holds: Callable[[str], bool]
    ) -> Transfer:
        """An answer that begins to leave; see `Transfer`."""
        return self._begin(Transfer(self, None, measure, end, holds))

    def make_room(self, counter: str) -> bool:
        """End the slowest transfer that holds some of a counter; False where none is slow."""
        try:
            self._end_slowest(lambda each: each.holds(counter))
        except QueueFull:
            return False
        return True

    def _begin(self, transfer: Transfer) -> Transfer:
        self._all.add(transfer)
        return transfer

    def _end_slowest(self, counts: Callable[[Transfer], bool]) -> None:
        slow = [each for each in self._all if counts(each) and each.is_slow]
        if not slow:
            raise QueueFull(
                f"{self.arriving} requests are arriving, which is as many as this service takes "
                "at once, in all or from one address; try again after the seconds in Retry-After."
            )
        slowest = min(slow, key=lambda each: each.deadline)
        slowest.close()
        slowest.end()

    def forget(self, transfer: Transfer) -> None:
        """Count a transfer no longer. For `Transfer` alone."""
        if transfer not in self._all:
            return
        self._all.remove(transfer)
        if transfer.network is not None:
            self._arriving[transfer.network] -= 1
            self._arriving += Counter()  # drops zeros, which would pile up


class Transfer:
    """One request or answer on its way; it ends with its `with`, or with `close`.

    network: whose request arrives; None for an answer.
    moved:   bytes that came or went so far; set by who receives them.
    measure: finds it where nobody is told of each byte, as of those that leave.
    end:     called when the transfer has to make room; gives back what is held.
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
        won = (self.moved - self._counted) / self._transfers.rate
        self._counted = self.moved
        self._deadline = min(self._deadline + won, latest)
        return self._deadline

    @property
    def is_slow(self) -> bool:
        """Whether it was below the rate for long enough to know."""
        return time.monotonic() + self._transfers.grace - self.deadline >= PATIENCE

    def close(self) -> None:
        """Count it no longer; a second call does nothing."""
        self._transfers.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def network_of(client: str) -> str:
    """What one client may choose its address from: an IPv4 address, or an IPv6 /64 network."""
    if ":" not in client:
        return client
    try:
        address = ipaddress.IPv6Address(client.partition("%")[0])
    except ValueError:
        return client
    return str(address.ipv4_mapped or int(address) >> 64)
