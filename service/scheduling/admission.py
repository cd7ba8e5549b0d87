"""Who may come in: a bound on images and bytes, decided before any work is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from service.errors import InvalidOption, QueueFull, ShuttingDown

MEBIBYTE = 1 << 20


class Admission:
    """Counts what the service holds and refuses at once what it will not hold.

    max_images: images of all admitted requests, from the end of their body to the end of their
                answer.
    max_bytes:  bytes of their bodies, counted as they arrive.
    max_answer_bytes: of their answers: what these may take, and once they are made what they do.
    make_room:  ends a request whose client is too slow and that holds some of a counter ("images",
                "bytes", "answers"), before another one is refused for want of it; False where there
                is none. It is called on the thread that asks for room.
    """

    def __init__(
        self,
        *,
        max_images: int,
        max_bytes: int,
        max_answer_bytes: int = 256 << 20,
        make_room: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.max_answer_bytes = max_answer_bytes
        self._make_room = make_room
        self._lock = threading.Lock()
        self._images = 0
        self._bytes = 0
        self._answer_bytes = 0
        self._expected = 0
        self._open = True

    @property
    def images(self) -> int:
        """Images held now."""
        return self._images

    @property
    def answer_bytes(self) -> int:
        """Bytes of answers held now, or priced and not yet made."""
        return self._answer_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no request is held, and none whose body still arrives."""
        return not self._images and not self._expected

    @property
    def is_open(self) -> bool:
        """Whether new requests are taken."""
        return self._open

    def admit(self, declared_bytes: int = 0) -> Permit:
        """Take a place for one image; a request with more asks its permit to `grow`.

        Raises QueueFull or ShuttingDown.
        """
        permit = Permit(self)
        permit.grow(1, declared_bytes)
        return permit

    def expect(self) -> Permit:
        """Let in a request whose body is still to come: it grows by its bytes, then by its images.

        It is finished also where the service is closed meanwhile. Raises ShuttingDown.
        """
        if not self._open:
            raise _closed()
        with self._lock:
            self._expected += 1
        return Permit(self, is_expected=True)

    def close(self) -> None:
        """Admit nothing from now on; permits that were given stay good."""
        self._open = False

    def take(self, permit: Permit, images: int, declared_bytes: int) -> None:
        """Count places. For `Permit` alone."""
        while True:
            with self._lock:
                lacking = self._lacking(permit, images, declared_bytes)
                if lacking is None:
                    self._images += images
                    self._bytes += declared_bytes
                    return
            if not self._make_room(lacking):
                raise self._full(lacking)

    def hold_answer(self, more: int, *, held: int) -> None:
        """Count bytes of an answer of which `held` are counted already. For `Permit` alone.

        Raises QueueFull. Fewer bytes (`more` below 0) and a lone answer are always taken.
        """
        while True:
            with self._lock:
                others = self._answer_bytes - held
                is_over = self._answer_bytes + more > self.max_answer_bytes
                if more <= 0 or not others or not is_over:
                    self._answer_bytes += more
                    return
            if not self._make_room("answers"):
                raise QueueFull(
                    f"Answers of {others} bytes are being made or sent, and this one may take "
                    f"{held + more} more; at most {self.max_answer_bytes} are held at once. Try "
                    "again after the seconds in Retry-After, or ask for less."
                )

    def check(self) -> None:
        """Raise QueueFull or ShuttingDown where `admit` would; nothing is taken."""
        nobody = Permit(self)
        while (lacking := self._lacking(nobody, 1, 0)) is not None:
            if not self._make_room(lacking):
                raise self._full(lacking)

    def _lacking(self, permit: Permit, images: int, declared_bytes: int) -> str | None:
        """The counter that has no room; None where all have."""
        if not self._open and not permit.is_let_in:
            raise _closed()
        # What is larger than the whole bound is let in alone, or it could never be served.
        others = self._images - permit.images
        if images and others and self._images + images > self.max_images:
            return "images"
        is_alone = not others and self._bytes == permit.bytes
        if not is_alone and self._bytes + declared_bytes > self.max_bytes:
            return "bytes"
        return None

    def _full(self, counter: str) -> QueueFull:
        held = {
            "images": f"{self._images} images are waiting or running",
            "bytes": f"Bodies of {self._bytes} bytes are held",
        }
        return QueueFull(
            f"{held[counter]}, which is as many as this service holds; try again after the "
            "seconds in Retry-After."
        )

    def give(self, images: int, declared_bytes: int) -> None:
        """Free places. For `Permit` alone."""
        with self._lock:
            self._images -= images
            self._bytes -= declared_bytes

    def arrived(self) -> None:
        """Expect one request less. For `Permit` alone."""
        with self._lock:
            self._expected -= 1


def _closed() -> ShuttingDown:
    return ShuttingDown("The service is shutting down; ask another instance.")


class Permit:
    """The right of one request to be worked on; leaving its `with` gives it back.

    images, bytes: what it holds now.
    """

    def __init__(self, admission: Admission, *, is_expected: bool = False) -> None:
        self._admission = admission
        self._is_expected = is_expected
        self.images = 0
        self.bytes = 0
        self._answer_bytes = 0

    def holds(self, counter: str) -> bool:
        """Whether it holds some of a counter: "images", "bytes" or "answers"."""
        held = {"images": self.images, "bytes": self.bytes, "answers": self._answer_bytes}
        return bool(held[counter])

    @property
    def is_let_in(self) -> bool:
        """Whether its request was accepted before the service was closed."""
        return self._is_expected or self.images > 0

    def grow(self, images: int, declared_bytes: int = 0) -> None:
        """Take places for more images or bytes. Raises QueueFull; what is held stays held."""
        self._admission.take(self, images, declared_bytes)
        self.images += images
        self.bytes += declared_bytes
        if images:
            self._arrive()

    @property
    def answer_bytes(self) -> int:
        """Bytes that are held for the answer."""
        return self._answer_bytes

    def hold_answer(self, size: int) -> None:
        """Hold this many bytes for the answer, in place of those held for it so far.

        Raises QueueFull where it is more and the service holds too many; what is held stays held.
        """
        self._admission.hold_answer(size - self._answer_bytes, held=self._answer_bytes)
        self._answer_bytes = size

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        self.hold_answer(0)
        images, declared_bytes = self.images, self.bytes
        self.images = self.bytes = 0
        self._arrive()
        self._admission.give(images, declared_bytes)

    def _arrive(self) -> None:
        if self._is_expected:
            self._is_expected = False
            self._admission.arrived()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Held:
    """The permits of one request; leaving its `with` gives them back.

    A route returns its answer before a byte of it is sent. What is kept here is held until the
    answer has left, or the connection has ended.
    """

    def __init__(self) -> None:
        self._permits: list[Permit] = []

    def holds(self, counter: str) -> bool:
        """Whether one of them holds some of a counter."""
        return any(permit.holds(counter) for permit in self._permits)

    def keep(self, permit: Permit) -> Permit:
        """Hold a permit until the answer has left."""
        self._permits.append(permit)
        return permit

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        for permit in self._permits:
            permit.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Bill:
    """The bytes of one request's answer, which its permit holds.

        bill.add(2 << 20)       # what it may take; refused where that is too much
        bill.made(len(body))    # what it takes

    most:    bytes that one answer may take.
    advice:  says what a request for less would leave out, in a sentence.
    in_turn: whether its parts are made one after another, so that what is too much beside the
             others now may fit when they are made: QueueFull then, in place of InvalidOption.
    """

    def __init__(
        self, permit: Permit, most: int, advice: Callable[[], str], *, in_turn: bool = False
    ) -> None:
        self._permit = permit
        self._most = most
        self._advice = advice
        self._in_turn = in_turn
        self._total = 0
        self._made = 0

    def add(self, size: int) -> None:
        """Hold so many bytes more.

        Raises InvalidOption for more than one answer may take, and QueueFull where the service
        holds too many; then nothing more is held.
        """
        total = self._total + size
        if total > self._most:
            if self._in_turn and self._made + size <= self._most:
                raise QueueFull("Other parts of this answer are still being made.")
            raise InvalidOption(
                f"The answer may take up to {_mebibytes(total)}, and at most "
                f"{_mebibytes(self._most)} are allowed. {self._advice()}"
            )
        self._permit.hold_answer(total)
        self._total = total

    def take_back(self, size: int) -> None:
        """Hold so many bytes less: what they were priced for is not made."""
        self._total -= size
        # A permit that was given back holds nothing any more.
        self._permit.hold_answer(min(self._total, self._permit.answer_bytes))

    def made(self, size: int, priced: int | None = None) -> None:
        """Something takes `size` bytes until it is sent: the answer, or what was `priced`."""
        priced = self._total if priced is None else priced
        self._made += size
        if size < priced:
            self.take_back(priced - size)


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:.3g} MiB" if size < 100 * MEBIBYTE else f"{size // MEBIBYTE} MiB"
