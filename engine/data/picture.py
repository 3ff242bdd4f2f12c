"""Still pictures: reads those that games start from, writes PNG files, and arranges frames in grids."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import UserError, reason
from ..files import write_whole

KINDS = {  # a file's first bytes → its decoder
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "mjpeg",
    b"RIFF....WEBP": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II\\*\0|MM\0\\*": "tiff",
}
MAGIC_BYTES = 12
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
LARGEST = 1 << 28  # most pixels of a picture
ORIENTATION = 0x112  # EXIF's tag


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 (h, w, 3) as PNG. Raises UserError where the file cannot be written."""
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
    codec.time_base = Fraction(1, 1)
    packets = codec.encode(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    ) + codec.encode(None)
    write_whole(Path(path), b"".join(bytes(packet) for packet in packets))


def load_picture(path: str | Path) -> np.ndarray:
    """A picture file → uint8 (h, w, 3), upright; transparent pixels are put on black. Raises UserError for
    any other file.

    Its first bytes decide which decoder reads it: libav, given a name, would also open playlists.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAGIC_BYTES)
            kind = next((kind for magic, kind in KINDS.items() if re.match(magic, data, re.DOTALL)), None)
            if kind is None:
                raise ValueError("it is no picture")
            data += file.read()
        if kind == "mjpeg" and data.rfind(JPEG_END) < data.rfind(JPEG_SCAN):
            raise ValueError("it is cut short")  # libav would fill it up with grey
        codec = av.CodecContext.create(kind, "r")
        codec.options = {"max_pixels": str(LARGEST), "err_detect": "crccheck"}
        pictures = codec.decode(av.Packet(data)) or codec.decode(None)
        if not pictures or pictures[0].is_corrupt:
            raise ValueError("it is damaged")
        pixels = pictures[0].to_ndarray(format="rgba")
    except (OSError, ValueError, MemoryError, av.FFmpegError) as error:
        said = f"The picture {path} could not be read ({reason(error)})"
        raise UserError(f"{said}; give a PNG, JPEG, WebP, GIF, BMP or TIFF file.") from error
    picture, opaque = pixels[..., :3], pixels[..., 3:]
    if opaque.min() < 255:
        picture = ((picture * opaque.astype(np.uint16) + 127) // 255).astype(np.uint8)
    return upright(picture, orientation_of(data))


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """A picture uint8 (h, w, 3) → the same turned and mirrored as EXIF's orientation (1 to 8) says."""
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])


def orientation_of(data: bytes) -> int:
    """EXIF's orientation in a picture file's bytes, 1 to 8; 1 (upright) without one. PyAV knows the angle
    only, and not whether the picture is mirrored.
    """
    begin = re.search(rb"(?:\A|Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", data, re.DOTALL)
    if begin is None:
        return 1
    at = begin.end()
    order = "little" if data.startswith(b"II", at) else "big"

    def number(offset: int, size: int) -> int:
        return int.from_bytes(data[at + offset : at + offset + size], order)

    first = number(4, 4)  # the directory: number of entries, then 12 bytes for each
    entries = (first + 2 + 12 * entry for entry in range(number(first, 2)))
    return next((number(entry + 8, 2) for entry in entries if number(entry, 2) == ORIENTATION), 1)


def grid(rows: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """Rows of frames, each uint8 (n, h, w, 3), stacked into one picture with thin dark gaps."""
    widest = max(len(row) for row in rows)
    height, width = rows[0].shape[1:3]
    shape = (len(rows) * (height + gap) - gap, widest * (width + gap) - gap, 3)
    picture = np.full(shape, 24, np.uint8)
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            picture[y * (height + gap) :, x * (width + gap) :][:height, :width] = frame
    return picture
