"""Frames in a Matroska file, numbered by their time stamps; readable even when its writer was killed."""

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
CLUSTER_MS = 250  # of video that Matroska holds back, and a killed process therefore loses
START_CODE = re.compile(b"\0?\0\0\1")  # before every unit that the encoder makes; the file has lengths


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def url_of(path: Path) -> str:
    """What libav opens as this file, whatever it is called: `day:1` alone is for it a protocol `day`."""
    return f"file:{path.absolute()}"


class VideoWriter:
    """Appends uint8 (h, w, 3) frames to the new file `path`; disk errors, as where there is one already, come
    as OSError from any call.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float, lossless: bool) -> None:
        # bitexact: no random segment id, so that the same frames make the same bytes.
        container = {"cluster_time_limit": str(CLUSTER_MS), "flush_packets": "1", "fflags": "+bitexact"}
        path.open("xb").close()  # libav itself would tell only with the first frame
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
        packets = self._stream.encode(picture)  # one, as nothing is held back
        checksum = _checksum(b"".join(map(bytes, packets)), START_CODE.split)
        self._file.mux(packets)
        return checksum

    def finish(self) -> None:
        """Encodes what is left, before `close`."""
        self._file.mux(self._stream.encode(None))

    def close(self) -> None:
        self._file.close()


def read_frames(path: Path, fps: float, start: int = 0) -> Iterator[av.VideoFrame]:
    """Decodes from frame number `start` on, until the end or the first gap or damage."""
    number = start
    try:
        with av.open(url_of(path), format="matroska") as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            size = stream.height, stream.width
            # a picture that was mended by guessing is damage
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            scale = float(stream.time_base * _rate(fps))  # video ticks → frame numbers
            if start:
                # Half a frame late, because Matroska rounds to milliseconds; goes back to a key frame.
                file.seek(int((start + 0.5) / scale), stream=stream)
            for picture in file.decode(stream):
                found = round(picture.pts * scale)
                # a picture of another size in midstream is another video's
                if found > number or picture.is_corrupt or (picture.height, picture.width) != size:
                    return
                if found == number:
                    yield picture
                    number += 1
    except (av.FFmpegError, IndexError):
        return  # the caller counts and says where


def count_frames(
    path: Path, fps: float, checksums: Sequence[int | None], size: tuple[int, int]
) -> tuple[int, int]:
    """Whole frames from the start, and those after the first gap or damage; nothing is decoded.

    `checksums` are those that `VideoWriter.write` told, one a frame; None where it is not known.
    (0, 0) where it is no video. Raises UserError where its pictures are not of `size`, height and width.
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
        pass  # cut in a kill: what came before is whole
    return count, later


def _checksum(packet: bytes, split: Callable[[bytes], Iterable[bytes]]) -> int:
    """CRC-32 of a packet without what separates its units, which differs between encoder and file."""
    checksum = 0
    for unit in split(packet):
        checksum = zlib.crc32(unit, checksum)
    return checksum


def _units(packet: bytes) -> Iterator[bytes]:
    """The units of a packet in the file, each after its length."""
    at = 0
    while at + 4 <= len(packet):
        end = at + 4 + int.from_bytes(packet[at : at + 4], "big")
        yield packet[at + 4 : end]
        at = end
