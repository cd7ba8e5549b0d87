"""Who may come in: a bound on images and bytes, decided before any work is done."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from service.errors import QueueFull, ShuttingDown


class Admission:
    """Counts what the service holds and refuses at once what it will not hold.

    max_images: images of all admitted requests, from their arrival to their answer.
    max_bytes:  declared bytes of their bodies.
    max_answer_bytes: of their answers: what these may take, and once they are made what they do.
    """

    def __init__(
        self, *, max_images: int, max_bytes: int, max_answer_bytes: int = 256 << 20
    ) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.max_answer_bytes = max_answer_bytes
        self._lock = threading.Lock()
        self._images = 0
        self._bytes = 0
        self._answer_bytes = 0
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

    def close(self) -> None:
        """Admit nothing from now on; permits that were given stay good."""
        self._open = False

    def take(self, images: int, declared_bytes: int, *, held: int) -> None:
        """Count places; `held` are those the same request has. For `Permit` alone."""
        with self._lock:
            self._refuse(images, declared_bytes, held)
            self._images += images
            self._bytes += declared_bytes

    def hold_answer(self, more: int, *, held: int) -> None:
        """Count bytes of an answer of which `held` are counted already. For `Permit` alone.

        Raises QueueFull. Fewer bytes (`more` below 0) and a lone answer are always taken.
        """
        with self._lock:
            others = self._answer_bytes - held
            if more > 0 and others and self._answer_bytes + more > self.max_answer_bytes:
                raise QueueFull(
                    f"Answers of {others} bytes are being made or sent, and this one may take "
                    f"{held + more} more; at most {self.max_answer_bytes} are held at once. Try "
                    "again after the seconds in Retry-After, or ask for less."
                )
            self._answer_bytes += more

    def check(self) -> None:
        """Raise QueueFull or ShuttingDown where `admit` would; nothing is taken."""
        self._refuse(1, 0, 0)

    def _refuse(self, images: int, declared_bytes: int, held: int) -> None:
        if not held and not self._open:
            raise ShuttingDown("The service is shutting down; ask another instance.")
        # What is larger than the whole bound is let in alone, or it could never be served.
        crowded = self._images > held
        if crowded and (
            self._images + images > self.max_images or self._bytes + declared_bytes > self.max_bytes
        ):
            raise QueueFull(
                f"{self._images} images are waiting or running, which is as many as this "
                "service holds; try again after the seconds in Retry-After."
            )

    def give(self, images: int, declared_bytes: int) -> None:
        """Free places. For `Permit` alone."""
        with self._lock:
            self._images -= images
            self._bytes -= declared_bytes


class Permit:
    """The right of one request to be worked on; leaving its `with` gives it back."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._images = 0
        self._bytes = 0
        self._answer_bytes = 0

    def grow(self, images: int, declared_bytes: int = 0) -> None:
        """Take places for more images or bytes. Raises QueueFull; what is held stays held."""
        self._admission.take(images, declared_bytes, held=self._images)
        self._images += images
        self._bytes += declared_bytes

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
        self._admission.give(self._images, self._bytes)
        self._images = self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
