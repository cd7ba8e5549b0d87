"""Calls that wait for a worker: requests of many images take turns with all others."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from service.jobs import Call


class Turns:
    """A queue of calls. Not for several threads at once: its owner has a lock.

    What belongs to no request goes first, in order. The requests then take turns: one call of
    each, so that thirty-two images of one keep another's single image waiting for one of them, not
    for all. And a request has not more than `most` calls running, so that one leaves a thread to
    all others.

    ended: called when a call of a request has run, with the request.
    """

    def __init__(self, most: int, ended: Callable[[int], None]) -> None:
        self._most = most
        self._ended = ended
        self._first: deque[Call[Any]] = deque()
        self._by_request: OrderedDict[int, deque[Call[Any]]] = OrderedDict()
        self._running: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._by_request.values()))

    @property
    def has_first(self) -> bool:
        """Whether a call waits that belongs to no request."""
        return bool(self._first)

    @property
    def has_next(self) -> bool:
        """Whether a call may run now."""
        return bool(self._first) or self._next() is not None

    def _next(self) -> int | None:
        return next((each for each in self._by_request if self._running[each] < self._most), None)

    def add(self, call: Call[Any], request: int | None = None) -> None:
        """Queue a call. request: a number of the request that it is one of several calls of."""
        if request is None:
            self._first.append(call)
        else:
            self._by_request.setdefault(request, deque()).append(call)

    def take(self) -> Call[Any] | Turn:
        """The call whose turn it is, where there is one (`has_next`)."""
        if self._first:
            return self._first.popleft()
        request = self._next()
        assert request is not None
        calls = self._by_request.pop(request)
        call = calls.popleft()
        if calls:
            self._by_request[request] = calls
        self._running[request] += 1
        return Turn(call, request, self._ended)

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
