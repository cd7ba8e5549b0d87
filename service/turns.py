"""Calls that wait for a worker: requests of many images take turns with all others."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from service.jobs import Call


class Turns:
    """A queue of calls. Not for several threads at once: its owner has a lock.

    What belongs to no request goes first, in order. The requests then take turns: one call of
    each, so that thirty-two images of one keep another's single image waiting for one of them, not
    for all.
    """

    def __init__(self) -> None:
        self._first: deque[Call[Any]] = deque()
        self._by_request: OrderedDict[int, deque[Call[Any]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._by_request.values()))

    def __bool__(self) -> bool:
        return bool(self._first or self._by_request)

    @property
    def has_first(self) -> bool:
        """Whether a call waits that belongs to no request."""
        return bool(self._first)

    def add(self, call: Call[Any], request: int | None = None) -> None:
        """Queue a call. request: a number of the request that it is one of several calls of."""
        if request is None:
            self._first.append(call)
        else:
            self._by_request.setdefault(request, deque()).append(call)

    def take(self) -> Call[Any]:
        """The call whose turn it is. Raises KeyError where none waits."""
        if self._first:
            return self._first.popleft()
        request, calls = self._by_request.popitem(last=False)
        call = calls.popleft()
        if calls:
            self._by_request[request] = calls
        return call
