"""Transfers: who falls behind makes room, and nobody else does."""

from __future__ import annotations

import pytest

from service.errors import QueueFull
from service.scheduling import transfers
from service.scheduling.transfers import Transfer, Transfers, network_of


class Clock:
    """Seconds as a test wants them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(transfers.time, "monotonic", lambda: self.now)


class Moving:
    """A transfer whose bytes a test counts."""

    def __init__(self, of: Transfers, client: str | None = "192.0.2.1", holds: str = "") -> None:
        self.is_ended = False
        ways = {"end": self._end, "holds": holds.__eq__}
        self.transfer: Transfer = (
            of.send(measure=lambda: self._left, **ways)
            if client is None
            else of.receive(client, **ways)
        )
        self._left = 0

    @property
    def moved(self) -> int:
        return self.transfer.moved

    @moved.setter
    def moved(self, size: int) -> None:
        self._left = self.transfer.moved = size

    def _end(self) -> None:
        self.is_ended = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def of(most: int = 3, most_per_client: int = 3) -> Transfers:
    return Transfers(rate=100, grace=10, most=most, most_per_client=most_per_client)


def test_bytes_give_back_the_time_that_was_lost_and_no_more(clock: Clock) -> None:
    moving = Moving(of())
    assert moving.transfer.deadline == clock.now + 10
    clock.now += 4
    moving.moved += 100
    assert moving.transfer.deadline == clock.now + 7
    moving.moved += 1_000_000
    assert moving.transfer.deadline == clock.now + 10
    clock.now += 9
    moving.moved += 1
    assert moving.transfer.deadline == clock.now + 1.01


def test_who_keeps_the_rate_is_never_slow(clock: Clock) -> None:
    moving = Moving(of())
    for _ in range(100):
        clock.now += 0.9
        moving.moved += 90
        assert not moving.transfer.is_slow
        assert moving.transfer.deadline >= clock.now + 9


def test_who_sends_much_and_then_nothing_is_slow_soon(clock: Clock) -> None:
    moving = Moving(of())
    moving.moved += 30_000_000
    assert not moving.transfer.is_slow
    clock.now += transfers.PATIENCE + 0.1
    assert moving.transfer.is_slow


def test_who_drips_is_slow_too(clock: Clock) -> None:
    """A byte now and then is no sign of life."""
    moving = Moving(of())
    for _ in range(12):
        clock.now += 0.1
        moving.moved += 1
    assert moving.transfer.is_slow


def test_the_slowest_is_ended_for_a_new_request(clock: Clock) -> None:
    all_of_them = of()
    first, second, third = (Moving(all_of_them) for _ in range(3))
    clock.now += 5
    first.moved, second.moved, third.moved = 300, 100, 200
    fourth = Moving(all_of_them)
    assert [each.is_ended for each in (first, second, third, fourth)] == [False, True, False, False]
    assert all_of_them.arriving == 3


def test_nobody_is_ended_before_its_patience_is_over(clock: Clock) -> None:
    all_of_them = of()
    moving = [Moving(all_of_them) for _ in range(3)]
    clock.now += transfers.PATIENCE / 2
    with pytest.raises(QueueFull, match=r"3 requests are arriving.* Retry-After"):
        Moving(all_of_them)
    assert not any(each.is_ended for each in moving)
    assert all_of_them.arriving == 3


def test_a_client_that_has_as_many_as_it_may_makes_room_itself(clock: Clock) -> None:
    all_of_them = of(most=5, most_per_client=2)
    other = Moving(all_of_them, "192.0.2.2")
    clock.now += 5
    own = [Moving(all_of_them)]
    clock.now += 0.1
    own.append(Moving(all_of_them))
    with pytest.raises(QueueFull):
        Moving(all_of_them)
    clock.now += 5
    Moving(all_of_them)
    assert (other.is_ended, [each.is_ended for each in own]) == (False, [True, False])


def test_answers_are_no_requests_that_arrive(clock: Clock) -> None:
    all_of_them = of(most=1)
    answers = [Moving(all_of_them, None) for _ in range(5)]
    assert (all_of_them.arriving, all_of_them.leaving) == (0, 5)
    clock.now += 5
    Moving(all_of_them)
    assert not any(each.is_ended for each in answers)
    assert (all_of_them.arriving, all_of_them.leaving) == (1, 5)


def test_room_is_made_by_who_holds_what_is_wanted(clock: Clock) -> None:
    all_of_them = of(most=9, most_per_client=9)
    upload, answer = Moving(all_of_them, holds="bytes"), Moving(all_of_them, None, holds="images")
    assert not all_of_them.make_room("images")
    clock.now += 5
    assert all_of_them.make_room("images")
    assert (upload.is_ended, answer.is_ended) == (False, True)
    assert not all_of_them.make_room("images")
    assert all_of_them.make_room("bytes")
    assert upload.is_ended


def test_a_transfer_is_counted_until_it_ends(clock: Clock) -> None:
    all_of_them = of()
    with Moving(all_of_them).transfer as transfer:
        assert all_of_them.arriving == 1
        transfer.close()
        assert all_of_them.arriving == 0
    assert (all_of_them.arriving, all_of_them.leaving) == (0, 0)
    assert not all_of_them._arriving


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", network_of("2001:db8::ffff:0:1")),
        ("fe80::1%eth0", network_of("fe80::2")),
        ("", ""),
        ("a name", "a name"),
        ("a:name", "a:name"),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(address: str, network: str) -> None:
    """Of IPv6 everybody has 2**64 addresses."""
    assert network_of(address) == network
    assert network_of("2001:db8:0:1::1") != network_of("2001:db8:0:2::1")
