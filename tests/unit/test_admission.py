"""Admission: places are counted before any work, and always given back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import QueueFull, ShuttingDown
from service.scheduling.admission import Admission, Permit, RequestPermits


def admission(images: int = 3, size: int = 1000) -> Admission:
    return Admission(max_images=images, max_bytes=size)


def test_as_many_are_admitted_as_there_are_places() -> None:
    places = admission()
    permits = [places.admit() for _ in range(3)]
    with pytest.raises(QueueFull, match=r"3 images .* Retry-After") as refused:
        places.admit()
    assert refused.value.retry_after >= 1
    permits[0].release()
    assert places.admit()


def test_a_permit_is_given_back_at_the_end_of_its_with() -> None:
    places = admission()
    with places.admit(500):
        assert places.images == 1
    assert places.images == 0
    with pytest.raises(ZeroDivisionError), places.admit(500) as permit:
        permit.grow(2 // 0)
    assert places.images == 0
    with places.admit(1000), pytest.raises(QueueFull):
        places.admit(1)


def test_giving_back_twice_gives_back_once() -> None:
    places = admission()
    other, permit = places.admit(), places.admit()
    permit.release()
    permit.release()
    assert places.images == 1
    other.release()
    assert places.images == 0


def test_bytes_are_bounded_too() -> None:
    places = admission(images=100)
    with places.admit(600):
        with pytest.raises(QueueFull):
            places.admit(401)
        assert places.images == 1
        with places.admit(400):
            assert places.images == 2


def test_a_permit_grows_while_there_is_room_and_keeps_what_it_has_when_there_is_none() -> None:
    places = admission()
    with places.admit() as permit, places.admit() as other:
        permit.grow(1)
        with pytest.raises(QueueFull):
            other.grow(1)
        assert places.images == 3
        assert [(each.images, each.bytes) for each in (permit, other)] == [(2, 0), (1, 0)]
    assert places.images == 0


def test_what_is_larger_than_everything_is_let_in_alone() -> None:
    """Otherwise it could never be served."""
    places = admission(images=2, size=100)
    with places.admit(5000) as permit:
        permit.grow(30)
        assert places.images == 31
        with pytest.raises(QueueFull):
            places.admit()
    with places.admit(), pytest.raises(QueueFull):
        places.admit(5000)


def test_a_closed_admission_takes_nothing_new_and_lets_what_it_has_grow() -> None:
    places = admission()
    with places.admit() as permit:
        places.close()
        assert not places.is_open
        with pytest.raises(ShuttingDown) as refused:
            places.admit()
        assert refused.value.retry_after >= 1
        permit.grow(1)
        assert places.images == 2
    assert places.images == 0


def test_nothing_is_lost_between_threads() -> None:
    places = admission(images=4)

    def come_and_go(_: int) -> int:
        refused = 0
        for _turn in range(200):
            try:
                with places.admit(1) as permit:
                    permit.grow(1, 1)
            except QueueFull:
                refused += 1
        return refused

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(come_and_go, range(8)))
    assert places.images == 0
    with places.admit(1000):
        pass


def test_a_request_that_arrives_holds_its_bytes_and_no_place() -> None:
    places = admission(images=1, size=100)
    with places.expect() as permit:
        assert not places.is_idle
        permit.grow(0, 60)
        with places.admit(), pytest.raises(QueueFull, match=r"60 bytes .* Retry-After"):
            permit.grow(0, 41)
        permit.grow(1)
        with pytest.raises(QueueFull):
            places.check()
    assert places.is_idle
    assert places.images == 0


def test_a_request_that_arrives_when_the_service_closes_is_finished() -> None:
    places = admission()
    with places.expect() as permit:
        places.close()
        permit.grow(0, 10)
        permit.grow(1)
        with pytest.raises(ShuttingDown):
            places.expect()
        assert not places.is_idle
    assert places.is_idle


def test_room_is_made_before_anybody_is_refused() -> None:
    held: list[Permit] = []
    wanted: list[str] = []

    def make_room(counter: str) -> bool:
        wanted.append(counter)
        if held:
            held.pop().release()
            return True
        return False

    places = Admission(max_images=2, max_bytes=100, make_room=make_room)
    held += [places.admit(60), places.admit(40)]
    with places.admit(50) as permit:
        assert wanted == ["images", "bytes"]
        permit.grow(1)
        with pytest.raises(QueueFull):
            places.check()
    assert wanted == ["images", "bytes", "images"]
    assert places.is_idle


def test_what_is_kept_is_given_back_once() -> None:
    places = admission()
    with RequestPermits() as held:
        assert not held.holds("images")
        first, second = held.keep(places.admit(5)), held.keep(places.admit())
        assert held.holds("images")
        assert held.holds("bytes")
        first.release()
        assert not held.holds("bytes")
        held.release()
        assert places.images == 0
        second.grow(1)
    assert places.images == 0


# ---- bytes of answers


def test_bytes_of_answers_are_bounded_over_all_permits_and_given_back() -> None:
    places = Admission(max_images=9, max_bytes=9, max_answer_bytes=1000)
    with places.admit() as one, places.admit() as other:
        one.hold_answer(600)
        other.hold_answer(400)
        with pytest.raises(QueueFull, match=r"600 bytes .* 401 more; at most 1000") as refused:
            other.hold_answer(401)
        assert refused.value.retry_after >= 1
        assert other.answer_bytes == 400, "what was held stays held"
        one.hold_answer(10)  # the answer is made, and smaller
        other.hold_answer(990)
        assert places.answer_bytes == 1000
    assert places.answer_bytes == 0


def test_an_answer_over_the_whole_budget_is_let_in_alone() -> None:
    places = Admission(max_images=9, max_bytes=9, max_answer_bytes=1000)
    with places.admit() as one, places.admit() as other:
        one.hold_answer(5000)
        one.hold_answer(6000)
        with pytest.raises(QueueFull):
            other.hold_answer(1)
        other.hold_answer(0)


def test_bytes_of_answers_are_given_back_once() -> None:
    places = Admission(max_images=9, max_bytes=9, max_answer_bytes=1000)
    permit = places.admit()
    permit.hold_answer(500)
    permit.release()
    permit.release()
    assert (places.answer_bytes, places.images) == (0, 0)
