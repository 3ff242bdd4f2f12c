"""Pictures to start from: any kind, any size, turned as the camera tells."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engine.config import UserError
from engine.data.picture import load_picture, save_picture
from engine.worlds.frames import fit

# 48x64, in squares, each of another colour, so that every turn is another picture
SEEN = np.random.default_rng(0).integers(0, 255, (3, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)


def encoded(codec: str, pixels: np.ndarray, given: str, kept: str) -> bytes:
    """A picture file's bytes; `given` and `kept` are names of pixel formats."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = pixels.shape[1], pixels.shape[0], kept
    encoder.time_base = Fraction(1, 1)
    encoder.options = {"qmin": "1", "qmax": "1"} if codec == "mjpeg" else {}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=given)
    return b"".join(map(bytes, encoder.encode(frame.reformat(format=kept)) + encoder.encode(None)))


def exif(orientation: int, order: str) -> bytes:
    """A TIFF header with one entry before the orientation."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    head = (b"II" if order == "little" else b"MM") + number(42, 2) + number(8, 4) + number(2, 2)
    width = number(0x100, 2) + number(3, 2) + number(1, 4) + number(64, 2) + bytes(2)
    turn = number(0x112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    return head + width + turn + bytes(4)


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF's number: what is to be done
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x, 1),
    9: lambda x: x,  # no such thing
}


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_photo_is_turned_as_its_camera_tells(orientation: int, order: str, tmp_path: Path) -> None:
    file = encoded("mjpeg", SEEN, "rgb24", "yuvj444p")
    told = b"Exif\0\0" + exif(orientation, order)
    file = file[:2] + b"\xff\xe1" + (len(told) + 2).to_bytes(2, "big") + told + file[2:]
    (tmp_path / "photo").write_bytes(file)
    seen, wanted = load_picture(tmp_path / "photo").astype(int), TURNS[orientation](SEEN)
    assert seen.shape == wanted.shape and np.abs(seen - wanted).mean() < 3


GREY = SEEN[..., 1]
CLEAR = np.concatenate([SEEN, np.full((48, 64, 1), 255, np.uint8)], 2)
CLEAR[:16, :, 3], CLEAR[16:32, :, 3] = 0, 51


@pytest.mark.parametrize(
    "codec, pixels, given, kept, wanted",
    [
        ("png", SEEN, "rgb24", "rgb24", SEEN),
        ("png", GREY, "gray", "gray", GREY[..., None].repeat(3, 2)),
        ("png", GREY.astype(np.uint16) * 257, "gray16le", "gray16be", GREY[..., None].repeat(3, 2)),
        ("png", SEEN.astype(np.uint16) * 257, "rgb48le", "rgb48be", SEEN),
        ("png", CLEAR, "rgba", "rgba", CLEAR[..., :3] * (CLEAR[..., 3:] / 255)),
        ("bmp", SEEN, "rgb24", "bgr24", SEEN),
        ("tiff", SEEN, "rgb24", "rgb24", SEEN),
        ("gif", GREY, "gray", "gray", GREY[..., None].repeat(3, 2)),
        ("libwebp", CLEAR[32:], "rgba", "bgra", SEEN[32:]),
    ],
)
def test_every_kind_of_picture(codec, pixels, given, kept, wanted, tmp_path: Path) -> None:
    (tmp_path / "a:1%d?").write_bytes(encoded(codec, pixels, given, kept))
    seen = load_picture(tmp_path / "a:1%d?")
    assert seen.dtype == np.uint8 and seen.shape == wanted.shape
    assert np.abs(seen - np.asarray(wanted, float)).max() <= (60 if codec == "libwebp" else 1)


@pytest.mark.parametrize("codec, kept", [("png", "rgb24"), ("mjpeg", "yuvj444p")])
def test_half_a_picture_is_none(codec: str, kept: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (200, 300, 3), np.uint8)
    file = encoded(codec, noise, "rgb24", kept)
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "half").write_bytes(file[: int(share * len(file))])
        with pytest.raises(UserError, match="half could not be read"):
            load_picture(tmp_path / "half")


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "film").write_bytes(b"\0\0\0\x1cftypisom" + bytes(99))
    for name in ("empty", "film", "missing", ".", "x" * 300):
        with pytest.raises(UserError, match="could not be read"):
            load_picture(tmp_path / name)


@pytest.mark.parametrize(
    "size", [(1, 1), (10, 10), (1, 5000), (5000, 1), (95, 127), (97, 129), (31, 77), (407, 1000), (1000, 407)]
)
def test_a_picture_of_any_size_fills_the_frame(size: tuple[int, int]) -> None:
    assert (fit(np.full((*size, 3), 77, np.uint8), 96, 128, whole=False) == 77).all()


def test_the_middle_is_averaged_over_areas() -> None:
    picture = np.random.default_rng(2).integers(0, 255, (20, 64, 3), np.uint8)
    seen = fit(picture, 4, 6, whole=False)
    middle = picture[:, 17:47].astype(float).reshape(4, 5, 6, 5, 3).mean((1, 3))
    assert np.abs(seen - middle).max() <= 0.51
    same = fit(picture, 20, 64, whole=False)
    np.testing.assert_array_equal(same, picture)
    whole = fit(picture, 40, 64)  # a game's picture loses nothing: black above and below
    np.testing.assert_array_equal(whole[10:30], picture)
    assert not whole[:10].any() and not whole[30:].any()


def test_saved_pictures_come_back(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", SEEN)
    np.testing.assert_array_equal(load_picture(tmp_path / "a.png"), SEEN)
