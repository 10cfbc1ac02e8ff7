"""Hostile recordings through the real command, all in one folder: each ends in a row of failures.jsonl or is used, as stated here."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.test_prep_ingest import HOSTILE as HOSTILE_FILES
from tests.test_prep_ingest import KINDS, speechlike

ROOT = Path(__file__).resolve().parents[2]
USED = "used"
Case = tuple[str, Callable[[Path], object], set[str]]  # name of the file, what makes it, reasons (or USED) that are right
_seeds = iter(range(10, 1000))


def wav_bytes(duration_s: float = 1.0, **options: str) -> bytes:
    """A recording like no other in the folder."""
    written = io.BytesIO()
    soundfile.write(written, speechlike(duration_s, seed=next(_seeds)), 24_000, format="WAV", **options)
    return written.getvalue()


def patched(place: int, layout: str, value: int) -> Callable[[Path], object]:
    """A wav with one field of its header changed."""

    def make(path: Path) -> None:
        content = bytearray(wav_bytes())
        struct.pack_into(layout, content, place, value)
        path.write_bytes(content)

    return make


def long_silence(hours: float) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC") as stream:
            minute = np.zeros(60 * 8_000, np.int16)
            for _ in range(round(hours * 60)):
                stream.write(minute)

    return make


def not_finite(path: Path) -> None:
    audio = speechlike(seed=next(_seeds))
    audio[500] = np.inf
    soundfile.write(path, audio, 24_000, subtype="FLOAT")


def flac_that_promises_days(path: Path) -> None:
    soundfile.write(path, speechlike(seed=next(_seeds)), 24_000, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the top of STREAMINFO's 36 bits of samples
    path.write_bytes(content)


def ogg_with_a_changed_byte(path: Path) -> None:
    soundfile.write(path, speechlike(4.0, seed=next(_seeds)), 24_000, format="OGG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def video_only(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.wav", wav_bytes())


def a_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's whole path has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def with_text(content: bytes | None) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.write_bytes(wav_bytes())
        if content is not None:
            path.with_suffix(".txt").write_bytes(content)

    return make


def text_is_a_folder(path: Path) -> None:
    path.write_bytes(wav_bytes())
    path.with_suffix(".txt").mkdir()


def good(path: Path) -> object:
    return path.write_bytes(wav_bytes())


CASES: dict[str, Case] = {
    **{name: case for name, case in HOSTILE_FILES.items() if name not in ("too_long", "folder_named_wav")},
    **{
        name: (file, KINDS[file], {USED, "duplicate"})  # some hold the same sound
        for name, file in {
            "eight_bits": "8bit.wav",
            "192_khz": "192k.wav",
            "seven_one": "eight_channels.wav",
            "raw_aac": "a.aac",
            "webm": "a.webm",
            "newline_in_name": "with space\nand newline.wav",
        }.items()
    },
    "folder_named_wav": ("a.wav/inside.wav", good, {USED}),  # a folder is a folder, whatever its name
    "24_bits": ("a.wav", lambda path: path.write_bytes(wav_bytes(subtype="PCM_24")), {USED}),
    "64_bit_floats": ("a.wav", lambda path: path.write_bytes(wav_bytes(subtype="DOUBLE")), {USED}),
    "infinite": ("a.wav", not_finite, {"not_finite"}),
    "ten_milliseconds": ("a.wav", lambda path: path.write_bytes(wav_bytes(0.01)), {"short_turn"}),
    "three_hours_of_silence": ("a.flac", long_silence(2.99), {"silent"}),
    "four_hours_in_few_bytes": ("a.flac", long_silence(4), {"too_long"}),
    "flac_that_promises_days": ("a.flac", flac_that_promises_days, {"too_long", "truncated"}),
    # libsndfile skips a page whose checksum is wrong, and tells nobody
    "ogg_with_a_changed_byte": ("a.ogg", ogg_with_a_changed_byte, {"corrupt", USED}),
    "no_channels": ("a.wav", patched(22, "<H", 0), {"not_audio", "bad_format"}),
    "65535_channels": ("a.wav", patched(22, "<H", 65_535), {"not_audio", "bad_format", "truncated"}),
    "rate_of_nothing": ("a.wav", patched(24, "<I", 0), {"not_audio", "bad_format"}),
    "rate_of_gigahertz": ("a.wav", patched(24, "<I", 4_000_000_000), {"not_audio", "bad_format"}),
    "unknown_sample_format": ("a.wav", patched(20, "<H", 0x7777), {"not_audio", "bad_format", "corrupt"}),
    "more_data_than_file": ("a.wav", patched(40, "<I", 2_000_000_000), {"truncated"}),
    "web_page": ("a.flac", lambda path: path.write_text("<html><body>404 not found</body></html>"), {"not_audio", "bad_format"}),
    "zip": ("a.wav", a_zip, {"not_audio"}),
    "gzip": ("a.wav", lambda path: path.write_bytes(gzip.compress(wav_bytes())), {"not_audio"}),
    "video_without_sound": ("a.mp4", video_only, {"not_audio"}),
    "socket": ("a.wav", a_socket, {"not_a_file"}),
    "device": ("a.wav", lambda path: path.symlink_to("/dev/zero"), {"not_a_file"}),
    "file_of_the_kernel": ("a.wav", lambda path: path.symlink_to("/proc/self/mem"), {"empty", "unreadable"}),
    "link_with_an_endless_name": ("a.wav", lambda path: path.symlink_to("x" * 300 + ".wav"), {"unreadable"}),
    "backslashes": ("..\\..\\a.wav", good, {USED}),
    "starts_with_a_dash": ("-rf.wav", good, {USED}),
    "emoji": ("\N{SPEAKER WITH THREE SOUND WAVES} a.wav", good, {USED}),
    "no_text": ("a.wav", with_text(None), {"no_text"}),
    "empty_text": ("a.wav", with_text(b" \n"), {"no_text"}),
    "text_of_bytes": ("a.wav", with_text(b"\xff\xfe\x00"), {"bad_text"}),
    "text_with_a_bell": ("a.wav", with_text(b"one \x07 two"), {"bad_text"}),
    "text_of_megabytes": ("a.wav", with_text(b"one " * 2**19), {"bad_text"}),
    "text_is_a_folder": ("a.wav", text_is_a_folder, {"no_text"}),
    "tar_of_nothing": ("a.tar", lambda path: path.write_bytes(b""), {"empty"}),
    "text_named_tar": ("a.tar", lambda path: path.write_text("no tar\n" * 200), {"not_audio"}),
    "zipped_tar": ("a.tar", lambda path: path.write_bytes(gzip.compress(b"x" * 10_240)), {"not_audio"}),
    "pipe_named_tar": ("a.tar", lambda path: os.mkfifo(path), {"not_a_file"}),
}
NO_TEXT = {"no_text", "text_is_a_folder"}
MEMBERS: dict[str, set[str]] = {  # of one tar
    "good.wav": {USED},
    "told.flac": {USED},
    "/etc/absolute.wav": {"outside"},
    "../above.wav": {"outside"},
    "inside/../../above.wav": {"outside"},
    "link.wav": {"not_a_file"},
    "hardlink.wav": {"not_a_file"},
    "device.wav": {"not_a_file"},
    "pipe.wav": {"not_a_file"},
    "code.pkl": {"pickle"},
    "code.pt": {"pickle"},
    "text.wav": {"not_audio"},
    "empty.wav": {"empty"},
    "silent.wav": {"no_text"},
    "broken.wav": {"schema"},
    "twice.wav": {"same_name", USED},
    "cut.wav": {"truncated"},
}


def write_tar(path: Path) -> None:
    flac = io.BytesIO()
    soundfile.write(flac, speechlike(seed=next(_seeds)), 24_000, format="FLAC")
    files = [
        ("good.wav", wav_bytes()),
        ("good.txt", b"one two"),
        ("told.flac", flac.getvalue()),
        ("told.json", b'{"text": "one", "mine": 1}'),
    ]
    files += [(name, wav_bytes()) for name in ("/etc/absolute.wav", "../above.wav", "inside/../../above.wav", "silent.wav", "broken.wav")]
    files += [("code.pkl", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."), ("code.pt", b"PK"), ("broken.json", b"{")]
    files += [("text.wav", b"no samples " * 50), ("text.txt", b"one"), ("empty.wav", b""), ("empty.txt", b"one")]
    files += [("twice.wav", wav_bytes()), ("twice.wav", wav_bytes()), ("twice.txt", b"two"), ("cut.txt", b"one")]
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("link", tarfile.SYMTYPE),
            ("hardlink", tarfile.LNKTYPE),
            ("device", tarfile.CHRTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ):
            entry = tarfile.TarInfo(f"{name}.wav")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        for name, content in [*files, ("cut.wav", wav_bytes(8.0))]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    path.write_bytes(path.read_bytes()[:-200_000])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, small_codec) -> tuple[int, dict[str, set[str]], set[str], int]:
    """(exit status, reasons by source, sources in the shards, peak bytes) of one run over everything."""
    work = tmp_path_factory.mktemp("hostile")
    small_codec.save(work / "made" / "codec")
    root = work / "in"
    for name, (file, make, _) in CASES.items():
        path = root / name / file
        path.parent.mkdir(parents=True)
        make(path)
        if name not in NO_TEXT and not path.with_suffix(".txt").exists():
            path.with_suffix(".txt").write_text("one two three")
    (root / "tars").mkdir()
    write_tar(root / "tars" / "hostile.tar")
    (root / "circle").symlink_to(root)
    odd = os.fsencode(root) + b"/caf\xe9.wav"
    Path(os.fsdecode(odd)).write_bytes(wav_bytes())
    for name in ("first.wav", "second.wav", "pair.wav", "pair.flac"):  # equal bytes; one text for two
        (root / name).write_bytes(
            wav_bytes() if name == "first.wav" else (root / "first.wav").read_bytes() + b"\0" * (name != "second.wav")
        )
        (root / name).with_suffix(".txt").write_text("one")
    command = [sys.executable, "-m", "data_prep", "prep=turns", f"input={root}", f"output={work / 'out'}", "num_workers=1", "val_share=0"]
    command += [f"codec.source={work / 'made'}", f"codec.num_codebooks={small_codec.num_codebooks}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (work / "out" / "failures.jsonl").is_file(), done.stderr[-2000:]
    reasons: dict[str, set[str]] = {}
    for line in (work / "out" / "failures.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        assert row["detail"] and "\n" not in row["reason"]
        reasons.setdefault(row["source"], set()).add(row["reason"])
    used: set[str] = set()
    for path in (work / "out" / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            used |= {json.load(tar.extractfile(entry))["source"] for entry in tar if entry.name.endswith(".json")}  # type: ignore[arg-type]
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return done.returncode, reasons, used, peak_bytes


def check(source: str, expected: set[str], reasons: dict[str, set[str]], used: set[str]) -> None:
    got = reasons.get(source, set()) | ({USED} if source in used else set())
    assert got and got <= expected, f"{source!r}: {got or 'nothing was said of it'}, expected {expected}"


@pytest.mark.parametrize("name", sorted(CASES))
def test_hostile_recording_is_named_with_its_reason_or_used(name: str, outcome) -> None:
    _, reasons, used, _ = outcome
    check(f"{name}/{CASES[name][0]}", CASES[name][2], reasons, used)


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_hostile_member_of_a_tar_is_named_with_its_reason_or_used(name: str, outcome) -> None:
    _, reasons, used, _ = outcome
    check(f"tars/hostile.tar/{name}", MEMBERS[name], reasons, used)


def test_odd_names_doubles_and_circles_are_told(outcome) -> None:
    status, reasons, used, _ = outcome
    assert status == 1
    assert reasons["caf\\xe9.wav"] == {"bad_name"} and reasons["second.wav"] == {"duplicate"} and reasons["pair.wav"] == {"same_name"}
    assert "first.wav" in used and not any("circle" in source for source in used | reasons.keys())


def test_hours_of_silence_take_less_than_four_gigabytes(outcome) -> None:
    assert outcome[3] < 4 * 2**30
