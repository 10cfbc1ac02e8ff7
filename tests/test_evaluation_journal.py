"""What was judged is kept, whatever a kill leaves of the file, and only for the same evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from csm.evaluation.journal import Journal
from tests.test_evaluation_report import verdict


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in "ab":
        (tmp_path / f"clips/{name}.flac").touch()
    journal = Journal(tmp_path, "one")
    for name in "ab":
        journal.add(replace(verdict(key=name), wav=f"clips/{name}.flac", mel_distance=1 / 3, mos={"dnsmos": 2 / 3}))
    journal.close(is_done=False)
    return tmp_path


def test_verdicts_come_back_to_the_last_bit(folder: Path) -> None:
    journal = Journal(folder, "one")
    assert list(journal.found) == [("model", "a"), ("model", "b")]
    assert journal.found["model", "a"] == replace(verdict(key="a"), wav="clips/a.flac", mel_distance=1 / 3, mos={"dnsmos": 2 / 3})
    journal.close(is_done=True)
    assert not journal.path.exists()


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_cut_short_is_cut_off_and_written_anew(folder: Path, cut: int) -> None:
    path = folder / "verdicts.partial.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(folder, "one")
    assert list(journal.found) == [("model", "a")]
    journal.add(replace(verdict(key="b"), wav="clips/b.flac"))
    journal.close(is_done=False)
    assert list(Journal(folder, "one").found) == [("model", "a"), ("model", "b")]


def test_a_journal_of_something_else_or_of_a_lost_clip_is_not_believed(folder: Path) -> None:
    (folder / "clips/b.flac").unlink()
    assert list(Journal(folder, "one").found) == [("model", "a")]
    assert Journal(folder, "other weights").found == {}
    assert Journal(folder, "one").found == {}, "it was started anew for the others"
