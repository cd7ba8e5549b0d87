"""budget: images are decoded within one bound of memory, whoever sends them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pictures
import pytest

from service.errors import DeadlineExceeded, ImageTooLarge
from service.images.budget import SHARE, DecodeBudget
from service.images.decode import Preprocessing, decoding_bytes
from service.images.headers.header import SPARE_BYTES, Header
from service.images.upload import channel_bytes, decode_channels, open_headers, open_upload
from service.resources import memory_limit

HOW = Preprocessing(32, (32, 32))


def test_without_a_setting_it_is_a_share_of_the_memory_limit() -> None:
    assert DecodeBudget().max_bytes == memory_limit() // SHARE
    assert DecodeBudget(1000).max_bytes == 1000


def test_what_is_taken_comes_back_also_after_an_error() -> None:
    budget = DecodeBudget(100)
    taken = []

    def fail() -> None:
        with budget.take(60):
            taken.append(budget.taken)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (taken, budget.taken) == ([60], 0)


def test_more_than_there_is_is_refused_with_the_numbers() -> None:
    with (
        pytest.raises(ImageTooLarge, match="takes 1,001 bytes of memory, and the limit is 1,000"),
        DecodeBudget(1000).take(1001),
    ):
        raise AssertionError("it was given")


def test_who_must_wait_waits_until_it_is_free() -> None:
    budget, order = DecodeBudget(100), []
    began, waiting = threading.Event(), threading.Event()

    def second() -> None:
        assert began.wait(5)
        waiting.set()
        with budget.take(60):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(second)
        with budget.take(60):
            began.set()
            assert waiting.wait(5)
            with budget.take(40):
                order.append("first")
        future.result(5)
    assert order == ["first", "second"]


def test_nobody_waits_longer_than_the_deadline() -> None:
    budget = DecodeBudget(100)
    with budget.take(60), pytest.raises(DeadlineExceeded, match="memory"):  # noqa: SIM117
        with budget.take(60, deadline=time.monotonic() - 1):
            raise AssertionError("it was given")
    assert budget.taken == 0


def test_threads_together_never_hold_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of them are answered: whoever holds some does not wait for more."""
    data = pictures.png(200, 150)
    needed = channel_bytes(open_headers(data, 3, 100_000))
    budget = DecodeBudget(2 * needed + needed // 2)
    most = 0

    def watch(*arguments: object, **options: object) -> object:
        nonlocal most
        most = max(most, budget.taken)
        return decode_channels(*arguments, **options)

    monkeypatch.setattr("service.images.upload.decode_channels", watch)
    with ThreadPoolExecutor(8) as pool:
        opened = list(
            pool.map(
                lambda _: open_upload(
                    data, HOW, "crop", max_pixels=100_000, preview_side=None, budget=budget
                ),
                range(40),
            )
        )
    assert {each.width for each in opened} == {200}
    assert needed <= most <= budget.max_bytes
    assert budget.taken == 0


def test_an_image_over_the_budget_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("service.images.upload.decode_channels", must_not_run)
    with pytest.raises(ImageTooLarge, match="bytes of memory"):
        open_upload(
            pictures.png(),
            HOW,
            "crop",
            max_pixels=100_000,
            preview_side=None,
            budget=DecodeBudget(1_000_000),
        )


@pytest.mark.parametrize(
    ("orientation", "pixel_bytes", "expected"),
    [
        (1, 2.5, 3 * 1200 + (3000 + 700)),
        (1, 0, 3 * 1200 + 700),
        (6, 2.5, 3 * 1200 + (3000 + 700)),
        (6, 0, 3 * 1200 + 3 * 1200),
    ],
)
def test_decoding_takes_the_result_and_the_larger_of_the_stored_and_the_turned_image(
    orientation: int, pixel_bytes: float, expected: int
) -> None:
    found = Header("PNG", 40, 30, orientation, pixel_bytes, fixed_bytes=700)
    assert decoding_bytes(found) == expected + SPARE_BYTES


KEPT_BYTES = 20 << 20
"""What the process itself may keep meanwhile. 30 bytes a pixel, as it was, would be 90 MB."""

MEASURE = """
import ctypes, gc, io, sys
import cv2, numpy as np, torch
from PIL import Image
import tiffs
from service.images.budget import DecodeBudget
from service.images.decode import Preprocessing
from service.images.upload import Hiding, open_upload

torch.set_num_threads(1)
WIDTH, HEIGHT = 2000, 1500
rough = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
image = Image.fromarray(rough).resize((WIDTH, HEIGHT))
alpha = Image.merge("RGBA", [*image.split(), image.split()[0]])
turned = Image.Exif()
turned[0x112] = 6
zeros = np.zeros((HEIGHT, WIDTH, 4), np.uint16)


def saved(picture, name, **options):
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


def deep(samples):
    values = np.asarray(alpha).astype(np.uint16)[..., :samples] * 257
    return cv2.imencode(".png", values)[1].tobytes()


def deep_avif():
    values = np.asarray(image).astype(np.uint16) * 4
    flags = [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_SPEED, 10]
    return cv2.imencode(".avif", values, flags)[1].tobytes()


packed = {"compression": tiffs.DEFLATE}
FILES = {
    "progressive JPEG": saved(image, "JPEG", progressive=True, subsampling=0),
    "CMYK JPEG": saved(image.convert("CMYK"), "JPEG"),
    "turned PNG": saved(alpha, "PNG", exif=turned),
    "RGB PNG of 16 bits": deep(3),
    "RGBA PNG of 16 bits": deep(4),
    "GIF": saved(image, "GIF"),
    "lossless WebP": saved(alpha, "WEBP", lossless=True, method=0),
    "lossy WebP": saved(alpha, "WEBP", method=0),
    "TIFF of 16 bits": tiffs.tiff(zeros[..., :3], 16, 2, rows=16, **packed),
    "planar TIFF": tiffs.tiff(zeros[..., :3], 16, 2, planar=True, **packed),
    "float TIFF in tiles": tiffs.tiff(zeros, 64, 2, 3, tile=(256, 256), extra=(2,), **packed),
    "YCbCr TIFF": saved(image.convert("YCbCr"), "TIFF", compression="tiff_lzw"),
    "AVIF": saved(image, "AVIF", speed=10),
    "AVIF with alpha": saved(alpha, "AVIF", speed=10, subsampling="4:4:4"),
    "AVIF of 10 bits": deep_avif(),
}


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


class Watched(DecodeBudget):
    def take(self, amount, deadline=None):
        self.asked = amount
        return super().take(amount, deadline)


def measured(data, hiding):
    budget = Watched(1 << 40)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    open_upload(data, Preprocessing(), "crop", max_pixels=10**8, preview_side=None, hiding=hiding,
                budget=budget)
    return status("VmHWM") - before, budget.asked


measured(FILES["GIF"], None)  # once for what is loaded at the first use
for name, data in FILES.items():
    print(*measured(data, None), name, sep="|")
print(*measured(FILES["GIF"], Hiding(boxes=[(0, 0, 900, 900)], fill="blur")), "masked", sep="|")
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
def test_no_kind_takes_more_memory_than_it_announces() -> None:
    """The highest resident size while each is decoded, masked and fitted; in another process."""
    environment = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    printed = subprocess.check_output([sys.executable, "-c", MEASURE], text=True, env=environment)
    lines = [line.split("|") for line in printed.splitlines()]
    assert len(lines) == 16
    over = {name: (int(m), int(a)) for m, a, name in lines if int(m) > int(a) + KEPT_BYTES}
    assert over == {}
