"""Frames in a Matroska file, numbered by time stamps; readable even if its writer was killed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..config import UserError

# RGB without a colour conversion: 3 to 4 times as fast as yuv444p at the same quality and size, because
# swscale's conversion costs more than the encoder does. crf 16: 44 dB on ViZDoom at 128x96; qp 0 is exact.
CODEC, QUALITY, EXACT = "libx264rgb", {"crf": "16"}, {"qp": "0"}
CLUSTER_MS = 250  # of video that Matroska buffers, and so is lost in a kill
START_CODE = re.compile(b"\0?\0\0\1")  # before every unit from the encoder; in the file, lengths are there


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def url_of(path: Path) -> str:
    """A URL by which libav opens this file, whatever its name: it would take `day:1` for a protocol `day`."""
    return f"file:{path.absolute()}"


class VideoWriter:
    """Appends frames, uint8 (h, w, 3), to a new file. Any call may raise OSError; the first one does if the
    file exists.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float, lossless: bool) -> None:
        # bitexact: no random segment id, so that the same frames make the same bytes.
        container = {"cluster_time_limit": str(CLUSTER_MS), "flush_packets": "1", "fflags": "+bitexact"}
        path.open("xb").close()  # libav itself would raise only with the first frame
        self._file = av.open(url_of(path), "w", format="matroska", options=container)
        self._rate = _rate(fps)
        # zerolatency: no B-frames and no lookahead, so that every frame leaves the encoder at once.
        codec = {"preset": "ultrafast", "tune": "zerolatency"} | (EXACT if lossless else QUALITY)
        self._stream = self._file.add_stream(CODEC, rate=self._rate, options=codec)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "rgb24"
        self._stream.codec_context.thread_count = 1  # the same bytes on every machine
        self._stream.codec_context.gop_size = max(1, round(self._rate))  # a second

    def write(self, number: int, frame: np.ndarray) -> int:
        """Encodes the frame, uint8 (h, w, 3), whose number follows that of the last one → its checksum."""
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = number, 1 / self._rate
        packets = self._stream.encode(picture)  # exactly one, as nothing is buffered
        checksum = _checksum(b"".join(map(bytes, packets)), START_CODE.split)
        self._file.mux(packets)
        return checksum

    def finish(self) -> None:
        """Flushes the encoder; to be called before `close`."""
        self._file.mux(self._stream.encode(None))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_frames(path: Path, fps: float, start: int = 0) -> Iterator[av.VideoFrame]:
    """Decodes from frame number `start` on, until the end or the first gap or damage."""
    number = start
    try:
        with av.open(url_of(path), format="matroska") as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            size = stream.height, stream.width
            # do not conceal errors by guessing
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            scale = float(stream.time_base * _rate(fps))  # video ticks → frame numbers
            if start:
                # Half a frame late, because Matroska rounds to milliseconds; goes back to a key frame.
                file.seek(int((start + 0.5) / scale), stream=stream)
            for picture in file.decode(stream):
                found = round(picture.pts * scale)
                # a picture of another size comes from another video
                if found > number or picture.is_corrupt or (picture.height, picture.width) != size:
                    return
                if found == number:
                    yield picture
                    number += 1
    except (av.FFmpegError, IndexError):
        return  # the caller counts the frames and reports where it ended


def count_frames(
    path: Path, fps: float, checksums: Sequence[int | None], size: tuple[int, int]
) -> tuple[int, int]:
    """→ how many frames are complete from the start on, and how many more after the first gap or damage;
    nothing is decoded. (0, 0) for a file that is no video.

    `checksums`: for each frame what `VideoWriter.write` returned, None where unknown. `size`: height and
    width; UserError where the video has another.
    """
    count, later = 0, 0
    try:
        with av.open(url_of(path), format="matroska") as file:
            stream = file.streams.video[0]
            if (stream.height, stream.width) != tuple(size):
                said = f"{path} has pictures of {stream.width}x{stream.height}, but its recording tells of"
                raise UserError(f"{said} {size[1]}x{size[0]}; copy the recording again.")
            scale = float(stream.time_base * _rate(fps))
            for packet in file.demux(stream):
                if packet.pts is None or packet.is_corrupt:
                    continue
                number = round(packet.pts * scale)
                if not count <= number < len(checksums):
                    continue
                if checksums[number] not in (None, _checksum(bytes(packet), _units)):
                    continue
                if number == count and not later:
                    count += 1
                elif number > count:
                    later += 1
    except (av.FFmpegError, IndexError):
        pass  # cut in a kill: the frames before are complete
    return count, later


def _checksum(packet: bytes, split: Callable[[bytes], Iterable[bytes]]) -> int:
    """CRC-32 of a packet's units, without the separators, which differ between encoder and file."""
    checksum = 0
    for unit in split(packet):
        checksum = zlib.crc32(unit, checksum)
    return checksum


def _units(packet: bytes) -> Iterator[bytes]:
    """The units of a packet as in the file, where each follows its length."""
    at = 0
    while at + 4 <= len(packet):
        end = at + 4 + int.from_bytes(packet[at : at + 4], "big")
        yield packet[at + 4 : end]
        at = end
