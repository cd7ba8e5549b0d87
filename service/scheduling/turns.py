"""Calls that wait for a worker: requests of many images take turns with all others."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from service.scheduling.jobs import Call


class Turns:
    """A queue of calls. Not for several threads at once: its owner has a lock.

    Requests take turns with each other, and with calls that belong to none: one call of each, so
    that thirty-two images of one keep another's single image waiting for one of them, not for all.
    And a request has at most `most` calls running, so that one leaves a thread to all others.

    ended: called when a call of a request has run, with the request.
    """

    def __init__(self, most: int, ended: Callable[[int], None]) -> None:
        self._most = most
        self._ended = ended
        self._waiting: OrderedDict[int | Call[Any], deque[Call[Any]]] = OrderedDict()
        self._running: Counter[int | Call[Any]] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def has_next(self) -> bool:
        """Whether a call may run now."""
        return self._next() is not None

    @property
    def next_is_of_request(self) -> bool:
        """Whether the call whose turn it is is one of several of a request."""
        return isinstance(self._next(), int)

    def _next(self) -> int | Call[Any] | None:
        return next((each for each in self._waiting if self._running[each] < self._most), None)

    def add(self, call: Call[Any], request: int | None = None) -> None:
        """Queue a call. request: a number of the request that it is one of several calls of."""
        key = call if request is None else request
        self._waiting.setdefault(key, deque()).append(call)

    def take(self) -> Call[Any] | Turn:
        """The call whose turn it is, where there is one (`has_next`)."""
        key = self._next()
        assert key is not None
        calls = self._waiting.pop(key)
        call = calls.popleft()
        if calls:
            self._waiting[key] = calls
        if not isinstance(key, int):
            return call
        self._running[key] += 1
        return Turn(call, key, self._ended)

    def end(self, request: int) -> None:
        """A call of the request has run."""
        self._running[request] -= 1
        if not self._running[request]:
            del self._running[request]


class Turn:
    """A call of a request, and the word that it has run."""

    def __init__(self, call: Call[Any], request: int, ended: Callable[[int], None]) -> None:
        self._call = call
        self._request = request
        self._ended = ended

    def run(self) -> None:
        try:
            self._call.run()
        finally:
            self._ended(self._request)

    def give_up(self) -> None:
        self._call.give_up()
