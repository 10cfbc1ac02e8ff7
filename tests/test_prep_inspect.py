"""What a data folder holds: the figures are those of the shards, and the page plays, lights turns and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from data_prep.inspect import main, survey
from tests.browser import DESKTOP, PHONE, ask_page, picture, why_no_browser


@pytest.fixture(scope="module")
def prepared(demo_corpus_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo corpus beside a record of what was dropped."""
    folder = tmp_path_factory.mktemp("prepared") / "<data> & more"
    shutil.copytree(demo_corpus_small, folder)
    rows = [
        {"source": "a.wav", "turn": -1, "stage": "ingest", "reason": "silent", "detail": "x", "duration_s": 36.0},
        {"source": "b.wav", "turn": 1, "stage": "filter", "reason": "dnsmos", "detail": "x", "duration_s": 3.6},
        {"source": "c.wav", "turn": 2, "stage": "filter", "reason": "dnsmos", "detail": "x", "duration_s": 3.6},
    ]
    (folder / "failures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(prepared: Path) -> Path:
    assert main([str(prepared), "--clips", "4"]) == 0
    return prepared / "inspect.html"


def test_figures_are_those_of_the_index_the_samples_and_the_failures(prepared: Path) -> None:
    found = survey(prepared)
    indexes = [json.loads(path.read_text()) for path in sorted(prepared.glob("*/index.json"))]
    shards = [shard for index in indexes for shard in index["shards"]]
    assert found.hours * 3600 == pytest.approx(sum(shard["duration_s"] for shard in shards), rel=1e-3)
    assert [split.num_samples for split in found.splits] == [sum(shard["num_samples"] for shard in index["shards"]) for index in indexes]
    metas = [meta for split in found.splits for _, meta in split.metas]
    turns = [turn for meta in metas for turn in meta["turns"]]
    assert found.counts["turns"] == len(turns) == len(found.measures["turn length, s"])
    assert found.counts["speakers"] == len({turn["speaker_name"] for turn in turns})
    assert len(found.measures["gap between turns, s"]) == len(turns) - len(metas)
    assert found.measures["clipping"] == [turn["quality"]["clipping"] for turn in turns]
    assert found.rejected == {("ingest", "silent"): (1, 36.0), ("filter", "dnsmos"): (2, 7.2)}


def test_fewer_samples_are_spread_over_the_split(prepared: Path) -> None:
    split = next(split for split in survey(prepared, 5).splits if split.name == "train")
    assert len(split.metas) == 5 and split.metas[0][0] == 0 and split.metas[-1][0] == split.num_samples - 1


def test_a_folder_without_shards_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no index.json" in capsys.readouterr().err


def test_the_page_loads_nothing_and_repeats_names_as_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""\b(?:src|href)=["'](?!data:)""", text) and "&lt;data&gt; &amp; more" in text
    assert text.count("data:audio/mpeg;base64,") == 4 and page.stat().st_size < 2**20


def test_without_a_codec_there_is_a_page_without_sound(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "train", tmp_path / "only" / "train")
    assert main([str(tmp_path / "only"), "--clips", "1"]) == 0
    assert "No sound: no codec/" in (tmp_path / "only" / "inspect.html").read_text()


@pytest.fixture(scope="module")
def browser() -> None:
    if reason := why_no_browser():
        pytest.skip(reason)


@pytest.mark.parametrize("width", (PHONE, DESKTOP))
def test_the_page_fits(width: int, page: Path, browser: None, tmp_path: Path) -> None:
    wide = "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > window.innerWidth + 1).length"
    assert ask_page(page, wide, width=width) == 0
    assert ask_page(page, "return document.documentElement.scrollWidth", width=width) == width
    picture(page, tmp_path / "page.png", width=width)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_the_turn_that_is_heard_is_lit(page: Path, browser: None) -> None:
    script = """
        const num = clip => clip.querySelectorAll("li").length;
        const clip = [...document.querySelectorAll(".clip")].sort((a, b) => num(b) - num(a))[0];
        const audio = clip.querySelector("audio"), turns = [...clip.querySelectorAll(".turns button")];
        if (!(audio.readyState > 0)) await new Promise(done => { audio.onloadedmetadata = done; setTimeout(done, 3000); });
        const lit = [];
        for (const turn of turns) {
            audio.currentTime = (+turn.dataset.start + +turn.dataset.end) / 2;
            audio.dispatchEvent(new window.Event("timeupdate"));
            lit.push(turns.map(each => each.classList.contains("on")));
        }
        return [audio.duration, turns.map(turn => +turn.dataset.end), lit];
    """
    duration_s, ends_s, lit = ask_page(page, script)
    assert len(ends_s) >= 2 and duration_s == pytest.approx(max(ends_s), abs=0.2)
    assert lit == [[row == column for column in range(len(ends_s))] for row in range(len(ends_s))]
