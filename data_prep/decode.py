"""Audio files to samples: what the header says, whether the file is whole, and the samples in blocks.

libsndfile reads what it can, FFmpeg (PyAV) the rest. Both give half of a truncated file without complaint, so the header is
held against the file first, and against the samples afterwards. FFmpeg may open nothing but the file itself: formats
that name other files or addresses (playlists, concatenations) are not among those it is allowed.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from data_prep.failures import Rejected
from data_prep.tars import opened, size_of, tar_above

SUFFIXES = frozenset(".wav .wave .flac .mp3 .ogg .oga .opus .m4a .mp4 .aac .webm .mka .mkv .mov .wma .aif .aiff .au .caf .w64 .amr".split())
MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 768_000
MAX_CHANNELS = 64
_BLOCK_SAMPLES = 2**18
_FORMATS = "aac,ac3,aiff,amr,asf,au,caf,flac,matroska,webm,mov,mp4,mp3,ogg,wav,w64"  # single files, all of them
_STREAMED = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # sizes that writers leave who do not know the end
_TOLERANCE_S = 0.3  # encoder delay and padding: a header that promises this much more is believed


@dataclass
class Header:
    """What a file says of itself. `duration_s` is 0 where it does not say."""

    duration_s: float
    sample_rate_hz: int
    num_channels: int
    decoder: str


def read_header(path: Path) -> Header:
    """Look at a file without decoding it.

    Raises:
        Rejected: "unreadable", "not_a_file", "empty", "truncated", "not_audio", "bad_format".
    """
    try:
        if tar_above(path) is None and not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise Rejected("not_a_file", "expected a plain file, this is a folder, a pipe or a device")
        num_bytes = size_of(path)
        if num_bytes == 0:
            raise Rejected("empty", "the file has no bytes")
        with opened(path) as stream:
            _check_whole(stream, num_bytes)
    except OSError as error:
        raise Rejected("unreadable", f"{error.strerror or error}") from error
    header = _soundfile_header(path) or _av_header(path)
    if not MIN_RATE_HZ <= header.sample_rate_hz <= MAX_RATE_HZ:
        raise Rejected("bad_format", f"{header.sample_rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if not 1 <= header.num_channels <= MAX_CHANNELS:
        raise Rejected("bad_format", f"{header.num_channels} channels, expected 1 to {MAX_CHANNELS}")
    return header


def read_blocks(path: Path, header: Header) -> Iterator[np.ndarray]:
    """The samples, float32 [S, C] in blocks, full scale 1.

    Raises:
        Rejected: "corrupt" where decoding fails, "truncated" where fewer samples come than the header promised.
    """
    blocks = _soundfile_blocks(path) if header.decoder == "soundfile" else _av_blocks(path)
    num_samples = 0
    for block in blocks:
        num_samples += len(block)
        yield block
    missing_s = header.duration_s - num_samples / header.sample_rate_hz
    if missing_s > _TOLERANCE_S:
        raise Rejected("truncated", f"its header says {header.duration_s:.2f} s, {missing_s:.2f} s of it are missing")


def _soundfile_header(path: Path) -> Header | None:
    try:
        with _for_decoders(path) as place:
            info = soundfile.info(place)
    except (soundfile.LibsndfileError, RuntimeError, ValueError):
        return None
    if info.frames == 0:
        raise Rejected("empty", "no samples in it")
    known = 0 < info.frames < 2**62
    return Header(info.frames / info.samplerate if known else 0.0, info.samplerate, info.channels, "soundfile")


def _soundfile_blocks(path: Path) -> Iterator[np.ndarray]:
    try:
        with _for_decoders(path) as place, soundfile.SoundFile(place) as stream:
            while len(block := stream.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                yield block
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise Rejected("corrupt", f"{error}".removeprefix("Error opening ")) from error


def _av_header(path: Path) -> Header:
    import av

    try:
        with _for_decoders(path) as place, _av_open(place) as container:
            if not container.streams.audio:
                raise Rejected("not_audio", "a media file without an audio stream")
            stream = container.streams.audio[0]
            if getattr(stream, "codec_context", None) is None:
                raise Rejected("not_audio", "FFmpeg has no decoder for the audio in it")
            return Header(_av_duration_s(container), stream.rate or 0, stream.channels or 0, "av")
    except (av.FFmpegError, OSError, ValueError, UnicodeError) as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("not_audio", f"no decoder knows it ({_said_by(error)})") from error


def _av_duration_s(container) -> float:  # type: ignore[no-untyped-def]
    """What the container says of the audio's length, 0 where FFmpeg would guess it from the bit rate."""
    stream = container.streams.audio[0]
    if container.format.name.startswith("mov") and stream.duration and stream.time_base:
        return max(float(stream.duration * stream.time_base), 0.0)
    if container.format.name.startswith("matroska") and container.duration and len(container.streams) == 1:
        return max(container.duration / 1e6, 0.0)
    return 0.0


def _av_blocks(path: Path) -> Iterator[np.ndarray]:
    import av

    try:
        with _for_decoders(path) as place, _av_open(place) as container:
            resampler = av.AudioResampler(format="fltp")  # the sample format only; rate and layout stay
            for frame in container.decode(audio=0):
                for converted in resampler.resample(frame):
                    yield np.ascontiguousarray(converted.to_ndarray().T)
            for converted in resampler.resample(None):
                yield np.ascontiguousarray(converted.to_ndarray().T)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("corrupt", _said_by(error)) from error


def _for_decoders(path: Path) -> AbstractContextManager[str | BinaryIO]:
    """A file's name, or a tar's member as a stream."""
    return nullcontext(os.fspath(path.resolve())) if tar_above(path) is None else opened(path)


def _av_open(place: str | BinaryIO):  # type: ignore[no-untyped-def]  # av's type is not known everywhere
    try:
        import av
    except ImportError as error:
        raise ImportError("files that libsndfile cannot read need PyAV: run `pip install av`") from error
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    return av.open(place, options=options, metadata_errors="replace")


def _said_by(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _check_whole(stream: BinaryIO, num_bytes: int) -> None:
    """Hold the sizes that the header gives against the file's.

    Raises:
        Rejected: "truncated".
    """
    head = stream.read(12)
    if head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE":
        _check_chunks(stream, num_bytes, "<" if head[:4] == b"RIFF" else ">", b"data")
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        _check_chunks(stream, num_bytes, ">", b"SSND")
    elif head[:4] == b"OggS":
        _check_last_page(stream, num_bytes)


def _check_chunks(stream: BinaryIO, num_bytes: int, order: str, wanted: bytes) -> None:
    offset = 12
    while offset + 8 <= num_bytes:
        stream.seek(offset)
        name, size = struct.unpack(f"{order}4sI", stream.read(8))
        if name == wanted:
            if size not in _STREAMED and offset + 8 + size > num_bytes:
                raise Rejected("truncated", f"its header promises {size} bytes of audio, the file has {num_bytes - offset - 8}")
            return
        offset += 8 + size + size % 2
    raise Rejected("truncated", f"it ends before its {wanted.decode()} chunk")


def _check_last_page(stream: BinaryIO, num_bytes: int) -> None:
    """An Ogg file ends with a page that says so, whole."""
    start = max(0, num_bytes - 2 * 65_307)  # the largest page, twice
    stream.seek(start)
    tail = stream.read()
    place = tail.rfind(b"OggS")
    page = tail[place:] if place >= 0 else b""
    num_segments = page[26] if len(page) > 26 else 0
    size = 27 + num_segments + sum(page[27 : 27 + num_segments])
    if len(page) < 27 or len(page) < size or not page[5] & 4:
        raise Rejected("truncated", "its last page is missing or cut off")
