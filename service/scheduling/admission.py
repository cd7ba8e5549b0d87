"""Admission: bounds on the images and bytes that the service holds, checked before any work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from service.errors import InvalidOption, QueueFull, ShuttingDown

MEBIBYTE = 1 << 20


class Admission:
    """Counts the images and bytes that the service holds, and refuses what exceeds its bounds.

    max_images: images of all admitted requests, from the end of their body to the end of their
                answer.
    max_bytes:  bytes of their bodies, counted as they arrive.
    max_answer_bytes: bytes of their answers: the estimate, and once an answer is built its size.
    make_room:  ends a request whose client is too slow and that holds some of a counter ("images",
                "bytes", "answers"), before another one is refused; False if there is none. It is
                called on the thread that needs room.
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
        """Bytes of answers held now, or reserved and not yet built."""
        return self._answer_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no request is held or still arriving."""
        return not self._images and not self._expected

    @property
    def is_open(self) -> bool:
        """Whether new requests are admitted."""
        return self._open

    def admit(self, declared_bytes: int = 0) -> Permit:
        """Reserve room for one image; the permit of a request with more of them grows (`grow`).

        Raises QueueFull or ShuttingDown.
        """
        permit = Permit(self)
        permit.grow(1, declared_bytes)
        return permit

    def expect(self) -> Permit:
        """Accept a request whose body is still to come: it grows by its bytes, then by its images.

        It is finished even if the service is closed meanwhile. Raises ShuttingDown.
        """
        if not self._open:
            raise shutdown_error()
        with self._lock:
            self._expected += 1
        return Permit(self, is_expected=True)

    def close(self) -> None:
        """Admit nothing from now on; existing permits stay valid."""
        self._open = False

    def take(self, permit: Permit, images: int, declared_bytes: int) -> None:
        """Count images and bytes. For `Permit` alone."""
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

        Raises QueueFull. Fewer bytes (`more` below 0) and a single answer are always accepted.
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
                    f"Answers of {others} bytes are being built or sent, and this one may take "
                    f"{held + more} more; at most {self.max_answer_bytes} are held at once. Try "
                    "again after the seconds in Retry-After, or request less."
                )

    def check(self) -> None:
        """Raise QueueFull or ShuttingDown where `admit` would; nothing is reserved."""
        empty = Permit(self)
        while (lacking := self._lacking(empty, 1, 0)) is not None:
            if not self._make_room(lacking):
                raise self._full(lacking)

    def _lacking(self, permit: Permit, images: int, declared_bytes: int) -> str | None:
        """The counter that has no room; None if all have."""
        if not self._open and not permit.is_accepted:
            raise shutdown_error()
        # A request larger than the whole bound is admitted alone, or it could never be served.
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
            f"{held[counter]}, which is the maximum of this service; try again after the "
            "seconds in Retry-After."
        )

    def give(self, images: int, declared_bytes: int) -> None:
        """Free images and bytes. For `Permit` alone."""
        with self._lock:
            self._images -= images
            self._bytes -= declared_bytes

    def arrived(self) -> None:
        """Expect one request less. For `Permit` alone."""
        with self._lock:
            self._expected -= 1


def shutdown_error() -> ShuttingDown:
    """The error of work that comes after the service was closed."""
    return ShuttingDown("The service is shutting down; ask another instance.")


class Permit:
    """What one request may hold of the service's bounds; leaving its `with` releases it.

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
    def is_accepted(self) -> bool:
        """Whether its request was accepted before the service was closed."""
        return self._is_expected or self.images > 0

    def grow(self, images: int, declared_bytes: int = 0) -> None:
        """Reserve room for more images or bytes. Raises QueueFull; what is held stays held."""
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

        Raises QueueFull if that is more and the service holds too many; what is held stays held.
        """
        self._admission.hold_answer(size - self._answer_bytes, held=self._answer_bytes)
        self._answer_bytes = size

    def release(self) -> None:
        """Release everything; a second call does nothing."""
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

    def __exit__(self, *_: object) -> None:
        self.release()


class RequestPermits:
    """The permits of one request; leaving its `with` releases them.

    A route returns its answer before a byte of it is sent. The permits kept here are held until the
    answer has been sent, or the connection has ended.
    """

    def __init__(self) -> None:
        self._permits: list[Permit] = []

    def holds(self, counter: str) -> bool:
        """Whether any of them holds some of a counter."""
        return any(permit.holds(counter) for permit in self._permits)

    def keep(self, permit: Permit) -> Permit:
        """Hold a permit until the answer has been sent."""
        self._permits.append(permit)
        return permit

    def release(self) -> None:
        """Release all of them; a second call does nothing."""
        for permit in self._permits:
            permit.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Bill:
    """The bytes of one request's answer, which its permit holds.

        bill.add(2 << 20)       # what it may take; refused if that is too much
        bill.settle(len(body))  # what it takes

    most:    bytes that one answer may take.
    advice:  returns a sentence on what a smaller request would leave out.
    in_turn: whether its parts are built one after another, so that what is too much beside the
             others now may fit when they are built: QueueFull then, in place of InvalidOption.
    """

    def __init__(
        self, permit: Permit, most: int, advice: Callable[[], str], *, in_turn: bool = False
    ) -> None:
        self._permit = permit
        self._most = most
        self._advice = advice
        self._in_turn = in_turn
        self._total = 0
        self._settled = 0

    def add(self, size: int) -> None:
        """Hold this many bytes more.

        Raises InvalidOption for more than one answer may take, and QueueFull if the service holds
        too many; then nothing more is held.
        """
        total = self._total + size
        if total > self._most:
            if self._in_turn and self._settled + size <= self._most:
                raise QueueFull("Other parts of this answer are still being built.")
            raise InvalidOption(
                f"The answer may take up to {_mebibytes(total)}, and at most "
                f"{_mebibytes(self._most)} are allowed. {self._advice()}"
            )
        self._permit.hold_answer(total)
        self._total = total

    def reduce(self, size: int) -> None:
        """Hold this many bytes less: the part they were reserved for is not built."""
        self._total -= size
        # A permit that was released holds nothing any more.
        self._permit.hold_answer(min(self._total, self._permit.answer_bytes))

    def settle(self, size: int, priced: int | None = None) -> None:
        """Hold `size` bytes in place of `priced` ones; by default for the whole answer."""
        priced = self._total if priced is None else priced
        self._settled += size
        if size < priced:
            self.reduce(priced - size)


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:.3g} MiB" if size < 100 * MEBIBYTE else f"{size // MEBIBYTE} MiB"
