"""Pictures as environments draw them → frames: their pixels as uint8 RGB, their size as wanted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..config import UserError

ROUNDING = 1e-3  # by which arithmetic in floats may leave its range


class Pixels:
    """What one environment draws, picture by picture → uint8 (h, w, 3).

    uint8 is taken as it is, other numbers where it is certain what they mean; grey becomes RGB and alpha
    goes. An environment's floats are of one range, 0 to 1 or 0 to 255, in all its pictures.
    """

    def __init__(self, name: str) -> None:
        """`name`: the environment's, for what is said of it."""
        self._name = name
        self._white = 0.0  # 1 or 255 once a picture has told which of them is white in floats

    def __call__(self, picture: Any) -> np.ndarray:
        """A picture of any type and layout → uint8 (h, w, 3). Raises UserError where that is not certain."""
        if picture is None:
            self._refuse("nothing (render gives None)")
        try:
            pixels = np.asarray(picture)
        except Exception:  # rows of different lengths, or an array on another device
            pixels = np.array(None)
        if not pixels.ndim:
            self._refuse(f"a {type(picture).__name__}, which is no array")
        return self._rgb(self._bytes(self._laid(pixels)))

    def _laid(self, picture: np.ndarray) -> np.ndarray:
        """Of any shape → (h, w, 1, 3 or 4)."""
        shape = picture.shape
        if picture.ndim == 2:
            picture = picture[..., None]
        elif picture.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
            picture = picture.transpose(1, 2, 0)  # channels first
        if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4) or not picture.size:
            self._refuse(f"an array of shape {shape}")
        return picture

    def _bytes(self, picture: np.ndarray) -> np.ndarray:
        if picture.dtype == np.uint8:
            return picture
        if picture.dtype == bool:
            return picture * np.uint8(255)
        if picture.dtype.kind not in "iuf":
            self._refuse(f"values of type {picture.dtype}")
        low, high = picture.min(), picture.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            self._refuse("values that are no numbers (NaN or infinite)")
        rounding = ROUNDING if picture.dtype.kind == "f" else 0
        if low < -rounding or high > 255 + rounding:
            self._refuse(f"values from {low:g} to {high:g}")
        if picture.dtype.kind != "f":
            return picture.astype(np.uint8)
        if high > rounding:  # black is the same in both
            white = 1.0 if high <= 1 + rounding else 255.0
            if self._white == 1 and white == 255:
                self._refuse(f"floats up to 1 in one picture and up to {high:g} in another")
            self._white = self._white or white
        scaled = picture.astype(np.float64) * (255 / (self._white or 255))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    def _rgb(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 1, 3 or 4) → (h, w, 3); what shows through lies on black, as the frame does."""
        colours, alpha = picture[..., :3], picture[..., 3:]
        if alpha.size and alpha.min() != alpha.max():  # the same everywhere: a byte that nobody uses
            return ((colours.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
        return colours.repeat(3, axis=2) if picture.shape[2] == 1 else colours

    def _refuse(self, what: str) -> None:
        wanted = "uint8 of (height, width, 3), or floats from 0 to 1"
        raise UserError(f"The environment {self._name!r} renders {what}; pictures are {wanted}.") from None


def fit(picture: np.ndarray, height: int, width: int, whole: bool = True) -> np.ndarray:
    """Picture (h, w, 3) → uint8 (height, width, 3), averaged over areas: whole, centred on black; or its
    middle, as large as fills the frame.

    Areas have whole-pixel borders: integer arithmetic, the same everywhere. Enlarging repeats pixels.
    """
    scale = (min if whole else max)(height / picture.shape[0], width / picture.shape[1])
    picture = middle(picture, math.ceil(height / scale), math.ceil(width / scale))
    rows, columns = (max(round(side * scale), 1) for side in picture.shape[:2])
    total = picture
    area = np.ones((1, 1, 1), np.uint32)
    for axis, (old, new) in enumerate(((picture.shape[0], rows), (picture.shape[1], columns))):
        borders = np.arange(new) * old // new
        total = np.add.reduceat(total, borders, axis=axis, dtype=np.uint32)
        sizes = np.maximum(np.diff(np.append(borders, old)), 1)
        area = area * np.expand_dims(sizes, tuple(i for i in range(3) if i != axis))
    made = middle((total + area // 2) // area, height, width)
    frame = np.zeros((height, width, 3), np.uint8)
    rows, columns = made.shape[:2]
    top, left = (height - rows) // 2, (width - columns) // 2
    frame[top : top + rows, left : left + columns] = made
    return frame


def middle(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture (h, w, 3), of at most that size."""
    top, left = (max(0, old - new) // 2 for old, new in zip(picture.shape, (height, width), strict=False))
    return picture[top : top + height, left : left + width]
