"""BMP: its header."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.images.headers.header import Header, corrupt, unsupported

_OS2, _OS2_SECOND = 12, 64
_SIZES = (_OS2, 40, 52, 56, _OS2_SECOND, 108, 124)
PLAIN, RLE8, RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6
_COMPRESSIONS = {4: "JPEG-compressed", 5: "PNG-compressed"}
_DEFAULT_MASKS = {
    16: (0x7C00, 0x3E0, 0x1F, 0),
    24: (0xFF0000, 0xFF00, 0xFF, 0),
    32: (0xFF0000, 0xFF00, 0xFF, 0),
}
_AT_MASKS = 54


@dataclass(frozen=True, slots=True)
class BmpHeader(Header):
    """`bits`: of a pixel. `compression`: PLAIN, RLE8 or RLE4. `offset`: start of the pixels.

    masks: of red, green, blue and alpha, for pixels of 16 bits or more.
    palette: uint8 (colours, 3), blue first, as bytes.
    top_down: whether the upper row comes first. run_bytes: bytes of run lengths, as in the header.
    """

    bits: int = 24
    compression: int = PLAIN
    offset: int = 54
    masks: tuple[int, int, int, int] = _DEFAULT_MASKS[24]
    palette: bytes = b""
    top_down: bool = False
    run_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row without compression: a multiple of four."""
        return (self.width * self.bits + 31) // 32 * 4

    @property
    def stored_bytes(self) -> int:
        """Bytes of all pixels; of run lengths as in the header."""
        return self.row_bytes * self.height if self.compression == PLAIN else self.run_bytes


def read(data: bytes) -> BmpHeader:
    """Read the header of a BMP. Raises CorruptImage, UnsupportedImage."""
    if len(data) < 26:
        raise corrupt()
    offset, size = struct.unpack_from("<II", data, 10)
    if size not in _SIZES:
        raise unsupported(f"a BMP with a header of {size} bytes")
    if len(data) < 14 + size:
        raise corrupt()
    if size == _OS2:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, stored, colours = PLAIN, 0, 0
    else:
        width, height, _, bits, compression, stored = struct.unpack_from("<iiHHII", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
    _check_kind(bits, compression, second=size == _OS2_SECOND)
    masks = _masks(data, size, bits, compression)
    palette, after = _palette(data, 14 + size, 3 if size == _OS2 else 4, bits, colours)
    return BmpHeader(
        format="BMP",
        width=max(width, 0),
        height=abs(height),
        pixel_bytes=0,
        fixed_bytes=len(data),
        bits=bits,
        compression=PLAIN if bits > 8 else compression,
        offset=offset or after,
        masks=masks,
        palette=palette,
        top_down=height < 0,
        run_bytes=stored,
    )


def _check_kind(bits: int, compression: int, *, second: bool) -> None:
    if compression in _COMPRESSIONS or (second and compression > RLE4):
        raise unsupported(f"a {_COMPRESSIONS.get(compression, 'Huffman-coded')} BMP")
    if bits not in (1, 2, 4, 8, *_DEFAULT_MASKS):
        raise unsupported(f"a BMP of {bits} bits a pixel")
    allowed = {8: (PLAIN, RLE8), 4: (PLAIN, RLE4), 16: (PLAIN, _MASKS, _ALPHA_MASKS)}
    allowed[24] = allowed[32] = allowed[16]
    if compression not in allowed.get(bits, (PLAIN,)):
        raise unsupported(f"a BMP of {bits} bits a pixel in compression {compression}")


def _masks(data: bytes, size: int, bits: int, compression: int) -> tuple[int, int, int, int]:
    default = _DEFAULT_MASKS.get(bits, _DEFAULT_MASKS[24])
    if compression not in (_MASKS, _ALPHA_MASKS):
        return default
    count = 4 if size >= 56 or compression == _ALPHA_MASKS else 3
    if len(data) < _AT_MASKS + 4 * count:
        raise corrupt()
    masks = (*struct.unpack_from(f"<{count}I", data, _AT_MASKS), 0)[:4]
    if not any(masks[:3]):
        return default
    shown = " ".join(f"{mask:08x}" for mask in masks)
    apart = sum(masks) == masks[0] | masks[1] | masks[2] | masks[3]
    known = bits != 24 or masks == default
    if not (known and apart and all(masks[:3]) and all(_is_run(mask) for mask in masks)):
        raise unsupported(f"a BMP with the colour masks {shown}")
    return masks[0], masks[1], masks[2], masks[3]


def _is_run(mask: int) -> bool:
    """Whether its set bits are contiguous, 16 at most."""
    low = mask & -mask
    return mask == 0 or ((mask + low) & mask == 0 and mask // low < 1 << 16)


def _palette(data: bytes, offset: int, size: int, bits: int, colours: int) -> tuple[bytes, int]:
    """Blue, green, red of each colour, and the end of the palette."""
    if bits > 8:
        return b"", offset
    count = min(colours or 1 << bits, 1 << bits)
    end = offset + count * size
    if end > len(data):
        raise corrupt()
    entries = [data[at : at + 3] for at in range(offset, end, size)]
    return b"".join(entries), end
