"""What the members of a sample hold: its place in the tar, its JSON, its codes. Everything read is checked here.

A member is read with the tar header in front of it: a header that names another member means shards that were swapped, or a
table that belongs to another shard. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import tokenize
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from csm.frames import Turn

MEMBERS = ("json", "codes.npy", "flac")
HEADER_BYTES = 512  # of a tar member
_CHECKSUM = slice(148, 156)  # of a tar header
_LONGEST_NAME = 100  # bytes that the header has for it


def check_header(header: bytes, name: str, size: int) -> None:
    """Refuse a tar header that is damaged, or is not that of the member expected.

    Args:
        header: [512] bytes.
        name: `<key>.<ending>`; folders in front of it do not count.
        size: bytes of the member.
    Raises:
        ValueError: says what was found.
    """
    # the sum over all bytes, those of the sum itself taken as blanks
    total = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
    if _octal(header[_CHECKSUM]) != total:
        raise ValueError(f"damaged tar header in front of {name}")
    found = header[:_LONGEST_NAME].split(b"\0", 1)[0].decode("utf-8", "replace")
    is_cut = len(found) >= _LONGEST_NAME  # the whole name stands elsewhere
    if not is_cut and found.rsplit("/", 1)[-1] != name:
        raise ValueError(f"the tar has {found!r} where the index has {name}: a shard or table of another place")
    if _octal(header[124:136]) != size:
        raise ValueError(f"the tar has {_octal(header[124:136])} bytes of {name}, the index {size}")


def _octal(digits: bytes) -> int:
    """A number of a tar header; -1 when it is none."""
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def parse_meta(data: bytes, num_frames: int) -> dict[str, Any]:
    """A sample's JSON, its turns checked.

    Raises:
        ValueError: it is no JSON, or its turns are not what the format says.
    """
    try:
        meta = json.loads(data)
        for turn in meta["turns"]:
            first, last = turn["frames"]
            is_whole = type(first) is int and type(last) is int
            if not (is_whole and 0 <= first < last <= num_frames and isinstance(turn["text"], str)):
                raise ValueError(f"a turn has frames {turn['frames']} of {num_frames}, text {turn['text']!r}")
            turn["speaker"] = int(turn["speaker"])
        if not meta["turns"]:
            raise ValueError("no turns")
    except KeyError as error:
        raise ValueError(f"missing {error}") from error
    except TypeError as error:
        raise ValueError(str(error)) from error
    return meta


def parse_turn(raw: dict, codes: np.ndarray) -> Turn:
    """A turn of the JSON with its slice of the conversation's codes [K, F]."""
    first, last = raw["frames"]
    if last > codes.shape[1]:
        raise ValueError(f"a turn has frames {first}-{last}, the codes end at {codes.shape[1]}")
    learn = raw.get("learn") or {}
    return Turn(
        speaker=raw["speaker"],
        text=raw["text"],
        codes=torch.from_numpy(codes[:, first:last].astype(np.int64)),
        learn_c0=bool(learn.get("c0", True)),
        learn_depth=bool(learn.get("depth", True)),
    )


def parse_codes(data: bytes, num_codebooks: int) -> np.ndarray:
    """A codes member as int16 [K, F]; never unpickles.

    Raises:
        ValueError: another type, shape or size than expected.
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("codes.npy does not start like a .npy file")
    size = 10 + int.from_bytes(data[8:10], "little") if data[6] == 1 else 12 + int.from_bytes(data[8:12], "little")
    shape, is_fortran, dtype = _parse_npy_header(data[:size])
    if dtype != "<i2" or len(shape) != 2 or is_fortran:
        raise ValueError(f"codes are {dtype} {shape}{' in Fortran order' if is_fortran else ''}, expected int16 [K, F]; re-run data_prep")
    if shape[0] != num_codebooks:
        raise ValueError(f"{shape[0]} codebooks, the index says {num_codebooks}; re-run data_prep")
    if len(data) - size != 2 * shape[0] * shape[1]:
        raise ValueError(f"codes {shape} need {2 * shape[0] * shape[1]} bytes, the member has {len(data) - size}")
    return np.frombuffer(data, dtype="<i2", offset=size).reshape(shape)


@lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, str]:
    """(shape, fortran order, dtype) of a .npy header. Cached: clips of one length share their header, and parsing is slow."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"codes.npy of version {version}, expected 1.0 or 2.0")
    try:
        shape, is_fortran, dtype = read(file)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:  # the header is Python source to numpy
        raise ValueError(f"codes.npy has a damaged header ({error})") from error
    return shape, is_fortran, dtype.str
