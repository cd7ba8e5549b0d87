"""Write explanations and feature maps as images for TensorBoard."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from service.cam.encoding import EncodedImage
from service.errors import ConfigurationError, install_hint


class Board:
    """A folder of TensorBoard events; several threads may add images."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._lock = threading.Lock()

    def add(self, tag: str, image: EncodedImage) -> None:
        """Write one image. TensorBoard groups images by the part of the tag before `/`."""
        with Image.open(io.BytesIO(image.data)) as opened:
            pixels = np.asarray(opened)
        with self._lock:
            self._writer.add_image(tag, pixels, dataformats="HWC" if pixels.ndim == 3 else "HW")


@contextmanager
def open_board(folder: Path) -> Iterator[Board]:
    """Open a folder for `tensorboard --logdir`; it is complete when the `with` ends.

    Raises ConfigurationError if TensorBoard is not installed or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            "--tensorboard needs the extra `tensorboard`, which is not installed: "
            f"{install_hint('tensorboard')}."
        ) from error
    try:
        writer = SummaryWriter(folder)
    except OSError as error:
        raise ConfigurationError(f"--tensorboard {folder}: {error.strerror or error}.") from error
    with writer:
        yield Board(writer)
