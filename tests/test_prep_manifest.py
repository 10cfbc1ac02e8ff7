"""Which recordings there are and who says what: four input forms, what is refused and why, splits and units."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.config import IngestConfig
from data_prep.failures import Failure
from data_prep.ingest import ingest
from data_prep.inputs import Candidate, Input, probe
from data_prep.manifest import ManifestTurn, Recording, file_digest, manifest_line, read_manifest
from data_prep.planning import plan_units, split_recordings
from tests.test_prep_ingest import speechlike, write_with_av


def wav(path: Path, seed: int = 0, duration_s: float = 0.5, num_channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.random.default_rng(seed).standard_normal((round(duration_s * 24_000), num_channels)) * 0.1
    soundfile.write(path, audio, 24_000)
    return path


def spoken(root: Path, name: str, text: str | bytes = "one two", seed: int = 0) -> None:
    path = wav(root / name, seed)
    path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def found_in(path: Path) -> tuple[list[Recording], list[Failure]]:
    """What the manifest stage would take and drop, duplicates aside."""
    form = Input.find(path)
    outcomes = [probe(entry, form.root) if isinstance(entry, Candidate) else entry for entry in form.candidates()]
    return [o for o in outcomes if isinstance(o, Recording)], [o for o in outcomes if isinstance(o, Failure)]


def manifest(root: Path, *rows: object) -> Path:
    path = root / "manifest.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_folder_of_recordings_with_texts(tmp_path: Path) -> None:
    spoken(tmp_path, "b.wav", "  one\n two ")
    spoken(tmp_path, "anna/a.wav", "\ufefféa", seed=1)
    recordings, failures = found_in(tmp_path)
    assert not failures
    assert [r.source for r in recordings] == ["anna/a.wav", "b.wav"]
    assert recordings[0].turns == [ManifestTurn("éa", speaker_name="anna")]
    assert recordings[1].turns == [ManifestTurn("one two")]
    assert len(recordings[0].digest) == 16 and recordings[0].duration_s == 0.5


def test_ljspeech_table(tmp_path: Path) -> None:
    wav(tmp_path / "wavs/LJ001.wav")
    wav(tmp_path / "wavs/LJ002.wav", 1)
    (tmp_path / "metadata.csv").write_text(
        'LJ001|It was "1455".|It was fourteen fifty-five.\nLJ002|Plain\nLJ003|gone\n../x|out\nno bar\nLJ001|\n'
    )
    recordings, failures = found_in(tmp_path)
    assert [(r.source, r.turns[0].text) for r in recordings] == [
        ("wavs/LJ001.wav", "It was fourteen fifty-five."), ("wavs/LJ002.wav", "Plain"),
    ]  # fmt: skip
    assert [(f.source, f.reason) for f in failures] == [
        ("metadata.csv:3", "missing"), ("metadata.csv:4", "outside"), ("metadata.csv:5", "schema"), ("metadata.csv:6", "no_text"),
    ]  # fmt: skip


def test_manifest_of_conversations(tmp_path: Path) -> None:
    wav(tmp_path / "a/call.wav", num_channels=2, duration_s=2.0)
    wav(tmp_path / "b.wav", 1)
    turns = [
        {"channel": 1, "text": "two", "start_s": 1.0, "end_s": 2.0, "speaker_name": "bo"},
        {"channel": 0, "text": "one", "start_s": 0, "end_s": 1.0},
    ]
    path = manifest(
        tmp_path, {"audio": "a/call.wav", "turns": turns, "license": "CC0-1.0"}, {"audio": "./b.wav", "text": "hi", "speaker": 3}
    )
    recordings, failures = found_in(path)
    assert not failures
    assert recordings[0].license == "CC0-1.0"
    assert [(t.text, t.speaker, t.channel) for t in recordings[0].turns] == [("one", 0, 0), ("two", 1, 1)]
    assert (recordings[1].source, recordings[1].turns) == ("b.wav", [ManifestTurn("hi", speaker=3)])
    assert found_in(tmp_path) == (recordings, failures)  # the folder finds its manifest


TWO = [{"text": "a", "start_s": 0, "end_s": 0.2}, {"text": "b", "start_s": 0.2, "end_s": 0.4}]
BAD_LINES: dict[str, tuple[object, str, str]] = {
    "not_json": ("{audio: a.wav}", "schema", "is not JSON"),
    "nested_a_lot": ("[" * 100_000, "schema", "is not JSON"),
    "a_list": ([], "schema", "is a list, expected an object"),
    "no_audio": ({"text": "a"}, "schema", "no 'audio'"),
    "unknown_key": ({"audio": "a.wav", "txt": "a"}, "schema", "unknown key 'txt' (did you mean text?)"),
    "wrong_type": ({"audio": "a.wav", "text": 3}, "schema", "text is 3, expected str"),
    "bool_for_a_number": ({"audio": "a.wav", "text": "a", "speaker": True}, "schema", "speaker is True, expected int"),
    "not_a_number": ('{"audio": "a.wav", "text": "a", "end_s": NaN}', "schema", "expected a finite number"),
    "text_and_turns": ({"audio": "a.wav", "text": "a", "turns": TWO}, "schema", "either turns, or the text"),
    "neither": ({"audio": "a.wav"}, "schema", "either turns, or the text"),
    "no_turns": ({"audio": "a.wav", "turns": []}, "schema", "at least one turn"),
    "turn_without_times": ({"audio": "a.wav", "turns": [*TWO, {"text": "c"}]}, "schema", "turn 2 has no start_s and end_s"),
    "backwards": ({"audio": "a.wav", "text": "a", "start_s": 2, "end_s": 1}, "schema", "expected 0 <= start_s < end_s"),
    "negative_speaker": ({"audio": "a.wav", "text": "a", "speaker": -1}, "schema", "speaker is -1"),
    "some_channels": ({"audio": "a.wav", "turns": [{**TWO[0], "channel": 0}, TWO[1]]}, "schema", "some turns name a channel"),
    "channel_not_there": ({"audio": "a.wav", "text": "a", "channel": 1}, "schema", "on channel 1, the file has 1 channel"),
    "empty_text": ({"audio": "a.wav", "text": " \n"}, "no_text", "its text is empty"),
    "control_character": ({"audio": "a.wav", "text": "a\u0007b"}, "bad_text", "U+0007"),
    "half_a_character": ('{"audio": "a.wav", "text": "a\\ud800"}', "schema", "not Unicode"),
    "climbs_out": ({"audio": "../a.wav", "text": "a"}, "outside", "leads out of the manifest's folder"),
    "absolute": ({"audio": "/etc/passwd", "text": "a"}, "outside", "leads out of the manifest's folder"),
    "zero_byte_in_name": ({"audio": "a\0.wav", "text": "a"}, "outside", "leads out of the manifest's folder"),
    "not_there": ({"audio": "b.wav", "text": "a"}, "unreadable", "No such file"),
}


@pytest.mark.parametrize("name", sorted(BAD_LINES))
def test_bad_line_is_dropped_with_its_number_and_the_others_are_kept(name: str, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    line, reason, words = BAD_LINES[name]
    good = {"audio": "a.wav", "text": "fine"}
    recordings, failures = found_in(manifest(tmp_path, good, line, good))
    assert [r.turns[0].text for r in recordings] == ["fine", "fine"]
    assert [f.reason for f in failures] == [reason]
    assert words in failures[0].detail
    assert failures[0].detail.startswith("manifest.jsonl:2")


def _no_text(root: Path) -> None:
    wav(root / "a.wav")


def _not_utf8_name(root: Path) -> None:
    os.rename(wav(root / "c.wav"), os.fsencode(root) + b"/\xff.wav")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_text": (_no_text, "no_text"),
    "empty_text": (lambda root: spoken(root, "a.wav", b" \n"), "no_text"),
    "latin1_text": (lambda root: spoken(root, "a.wav", "é".encode("latin-1")), "bad_text"),
    "text_with_zero_bytes": (lambda root: spoken(root, "a.wav", b"a\0b"), "bad_text"),
    "huge_text": (lambda root: spoken(root, "a.wav", b"a" * (2**20 + 1)), "bad_text"),
    "name_that_is_not_utf8": (_not_utf8_name, "bad_name"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_bad_neighbour_is_dropped_with_its_reason_and_the_others_are_kept(name: str, tmp_path: Path) -> None:
    spoken(tmp_path, "b.wav")
    make, reason = BAD_FILES[name]
    make(tmp_path)
    recordings, failures = found_in(tmp_path)
    assert [r.source for r in recordings] == ["b.wav"]
    assert [f.reason for f in failures] == [reason]


def test_two_recordings_of_one_text_are_not_both_taken(tmp_path: Path) -> None:
    spoken(tmp_path, "a.flac")
    wav(tmp_path / "a.wav", seed=1)
    recordings, failures = found_in(tmp_path)
    assert [r.source for r in recordings] == ["a.flac"]
    assert [(f.source, f.reason) for f in failures] == [("a.wav", "same_name")]


def test_links_in_a_circle_are_walked_once_and_odd_names_survive(tmp_path: Path) -> None:
    odd = "line\nbreak \u2028 'quote\".wav"
    spoken(tmp_path, f"deep/{odd}")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    recordings, failures = found_in(tmp_path)
    assert [r.source for r in recordings] == [f"deep/{odd}"] and not failures
    lines = "".join(manifest_line(recording) for recording in recordings)
    assert list(read_manifest(lines.split("\n")[:-1], "m")) == recordings


def test_folders_and_files_without_permission_are_named() -> None:
    """As another user, for root may read everything; in a folder of /tmp, for pytest's is closed to others."""
    import shutil
    import tempfile

    root = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        root.chmod(0o755)
        spoken(root, "open.wav")
        spoken(root, "closed.wav", seed=1)
        (root / "closed.wav").chmod(0)
        spoken(root, "secret/a.wav", seed=2)
        (root / "secret").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65_534)
        try:
            recordings, failures = found_in(root)
        finally:
            if is_root:
                os.seteuid(0)
        assert [r.source for r in recordings] == ["open.wav"]
        assert [(f.source, f.reason) for f in failures] == [("closed.wav", "unreadable"), ("secret", "unreadable")]
    finally:
        (root / "secret").chmod(0o755)
        shutil.rmtree(root)


def test_broken_line_of_our_own_manifest_names_file_and_line() -> None:
    good = manifest_line(Recording("0" * 16, "a.wav", 1, 1.0, [ManifestTurn("a")]))
    with pytest.raises(ValueError, match=r"m\.jsonl:2: schema: the line has no 'source'.*stages=\[manifest\]"):
        list(read_manifest([good, '{"digest": "0"}'], "m.jsonl"))


def _recordings(num: int, speakers: Callable[[int], tuple[str | None, ...]] = lambda i: (None,)) -> list[Recording]:
    return [
        Recording(f"{i:016x}", f"{i}.wav", 1, 60.0, [ManifestTurn("a", n, name) for n, name in enumerate(speakers(i))]) for i in range(num)
    ]


def test_validation_is_about_its_share_and_recordings_added_later_move_no_other() -> None:
    few, _ = split_recordings(_recordings(400), 0.1, "auto", seed=0)
    many, _ = split_recordings(_recordings(800), 0.1, "auto", seed=0)
    assert 25 <= len(few) <= 55
    assert few == [recording for recording in many if int(recording.digest, 16) < 400]


def test_speakers_stay_in_one_split_also_through_others() -> None:
    """Speakers 2i and 2i + 1 talk in one recording, 2i + 1 alone in another: the two recordings hang together."""
    recordings = _recordings(400, lambda i: (f"s{i}", f"s{i + 1}") if i % 2 == 0 else (f"s{i}",))
    validation, picked_by = split_recordings(recordings, 0.1, "auto", seed=0)
    assert picked_by == "speaker" and validation
    names = {turn.speaker_name for recording in validation for turn in recording.turns}
    others = {turn.speaker_name for r in recordings if r not in validation for turn in r.turns}
    assert not names & others


def test_one_speaker_is_split_by_recording_or_refused() -> None:
    recordings = _recordings(50, lambda i: ("anna",))
    validation, picked_by = split_recordings(recordings, 0.1, "auto", seed=0)
    assert picked_by == "recording" and 0 < len(validation) < 15
    with pytest.raises(ValueError, match="split_by=recording"):
        split_recordings(recordings, 0.1, "speaker", seed=0)


@pytest.mark.parametrize("num", [2, 3, 10])
def test_few_recordings_still_give_both_splits(num: int) -> None:
    validation, _ = split_recordings(_recordings(num), 0.05, "auto", seed=0)
    assert 0 < len(validation) < num


def test_no_share_no_validation() -> None:
    assert split_recordings(_recordings(50), 0.0, "auto", seed=0) == ([], "recording")


def test_units_cover_the_manifest_and_keep_splits_apart() -> None:
    lines = [
        (split, r, manifest_line(r)) for split, r in [("train", r) for r in _recordings(7)] + [("validation", r) for r in _recordings(2)]
    ]
    units = plan_units(lines, unit_min=3)
    assert [(u.name, u.num_recordings) for u in units] == [
        ("train-000000", 3), ("train-000001", 3), ("train-000002", 1), ("validation-000000", 2),
    ]  # fmt: skip
    assert [u.first_byte for u in units] == [0, *(u.last_byte for u in units[:-1])]
    assert units[-1].last_byte == sum(len(line.encode()) for _, _, line in lines)


def test_tars_are_read_in_place_alone_and_in_a_folder(tmp_path: Path) -> None:
    """What is in a shard decodes to the samples of the file outside, by either decoder, with or without texts."""
    audio = speechlike()
    soundfile.write(tmp_path / "a.flac", audio, 24_000)
    write_with_av(tmp_path / "b.m4a", "aac", audio, container="mp4")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "calls.tar", "w") as tar:
        for name, source in (("x/a.flac", "a.flac"), ("x/b.m4a", "b.m4a")):
            tar.add(tmp_path / source, name)
        told = json.dumps({"text": "hello", "speaker_name": "anna", "license": "CC0-1.0", "their_own": [1]}).encode()
        for name, content in (("x/a.json", told), ("x/b.txt", b"well\n")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for place, prefix in ((tmp_path / "in", "calls.tar"), (tmp_path / "in" / "calls.tar", "calls.tar")):
        found = Input.find(place)
        recordings = [probe(candidate, found.root) for candidate in found.candidates()]
        assert [(r.source, r.turns[0].text, r.license) for r in recordings] == [
            (f"{prefix}/x/a.flac", "hello", "CC0-1.0"),
            (f"{prefix}/x/b.m4a", "well", None),
        ]
        for recording, outside in zip(recordings, ("a.flac", "b.m4a"), strict=True):
            assert recording.digest == file_digest(tmp_path / outside) and recording.num_bytes == (tmp_path / outside).stat().st_size
            inside = ingest(found.root / recording.source, IngestConfig()).audio
            np.testing.assert_array_equal(inside, ingest(tmp_path / outside, IngestConfig()).audio)
        assert [candidate.turns for candidate in Input.find(place, with_texts=False).candidates()] == [[], []]
