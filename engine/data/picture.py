"""Still pictures: PNG files and the grids that training and evaluation show."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..config import UserError
from ..files import write_whole


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
    """Any image file that FFmpeg reads → uint8 (h, w, 3)."""
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (OSError, StopIteration, av.FFmpegError) as error:
        raise UserError(
            f"The picture {path} could not be read ({error}); give a PNG or JPEG file."
        ) from error


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
