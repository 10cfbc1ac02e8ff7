"""The blind listening test: nothing on the page tells whose clip is whose, votes are unblinded right, a browser can vote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.cli.commands import main
from csm.evaluation.blind import find_pairs, score, write_page
from tests.browser import DESKTOP, PHONE, ask_page, why_no_browser


def evaluated(folder: Path, pitch_hz: float, lines: int = 6) -> Path:
    """What evaluate.py leaves of a run, as far as listening goes: tones of one pitch."""
    clips = folder / "evaluation" / "clips" / "model"
    clips.mkdir(parents=True)
    rows = []
    for index in range(lines):
        soundfile.write(clips / f"line{index}.flac", 0.3 * np.sin(np.arange(12_000 + 100 * index) * pitch_hz * 2 * np.pi / 24_000), 24_000)
        rows.append({"key": f"line{index}", "row": "model", "text": f"text {index}", "wav": f"clips/model/line{index}.flac"})
    rows.append({"key": "empty", "row": "model", "text": "nothing", "wav": ""})
    (folder / "evaluation" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return evaluated(tmp_path / "secret_alpha", 220), evaluated(tmp_path / "secret_beta", 330)


@pytest.fixture
def page(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "test.html"
    assert main(["listen", "page", str(runs[0]), str(runs[1]), "--out", str(path), "--pairs", "5", "--seed", "3"]) == 0
    return path


def votes_for_b(key: dict, strength: int) -> dict[str, int]:
    return {str(pair["number"]): strength if pair["first"] == "a" else -strength for pair in key["pairs"]}


def test_the_page_tells_nothing_and_the_key_tells_all(page: Path, runs: tuple[Path, Path]) -> None:
    text = page.read_text()
    assert "alpha" not in text and "beta" not in text and len(re.findall(r"<audio ", text)) == 10
    key = json.loads((page.parent / "test.html.key.json").read_text())
    assert {pair["first"] for pair in key["pairs"]} == {"a", "b"} and len({pair["line"] for pair in key["pairs"]}) == 5
    assert "http" not in re.sub(r"data:audio/flac;base64,[A-Za-z0-9+/=]+", "", text), "self-contained"


def test_the_same_seed_gives_the_same_page_and_another_another(runs: tuple[Path, Path], page: Path, tmp_path: Path) -> None:
    pairs = find_pairs(*runs)
    names = (str(runs[0]), str(runs[1]))
    write_page(pairs, tmp_path / "again.html", names=names, num_pairs=5, seed=3)
    write_page(pairs, tmp_path / "other.html", names=names, num_pairs=5, seed=4)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes() != (tmp_path / "other.html").read_bytes()


def test_votes_are_unblinded_whichever_side_a_clip_was_on(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    key_path = page.parent / "test.html.key.json"
    key = json.loads(key_path.read_text())
    files = []
    for listener, strength in (("ann", 2), ("bo", 1)):
        files.append(tmp_path / f"{listener}.json")
        files[-1].write_text(json.dumps({"test": key["test"], "listener": listener, "votes": votes_for_b(key, strength)}))
    found = score(key_path, files)
    assert found["cmos_b_over_a"]["value"] == pytest.approx(1.5) and found["b_preferred"] == 1.0 and found["num_listeners"] == 2
    assert 1.0 <= found["cmos_b_over_a"]["low"] <= 1.5 <= found["cmos_b_over_a"]["high"] <= 2.0
    assert main(["listen", "score", str(key_path), *map(str, files)]) == 0
    assert "+1.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": "another"}, "votes of another page"),
        ({"votes": {"0": 4}}, "expected -3 to 3"),
        ({"votes": {"99": 1}}, "expected -3 to 3"),
        ({"votes": {}}, "no vote in any file"),
    ],
)
def test_votes_that_mean_nothing_are_refused(change: dict, words: str, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    key_path = page.parent / "test.html.key.json"
    told = {"test": json.loads(key_path.read_text())["test"], "listener": "ann", "votes": {"0": 1}} | change
    (tmp_path / "votes.json").write_text(json.dumps(told))
    assert main(["listen", "score", str(key_path), str(tmp_path / "votes.json")]) == 2
    assert words in capsys.readouterr().err


def test_what_was_not_evaluated_or_shares_nothing_is_told(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bare").mkdir()
    assert main(["listen", "page", str(runs[0]), str(tmp_path / "bare"), "--out", str(tmp_path / "x.html")]) == 2
    assert "evaluate.py" in capsys.readouterr().err
    assert main(["listen", "page", str(runs[0]), str(runs[1]), "--row", "model_t9", "--out", str(tmp_path / "x.html")]) == 2
    assert "there are: model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_browser_votes_on_the_page(width: int, page: Path) -> None:
    if reason := why_no_browser():
        pytest.skip(reason)
    script = """
        const wide = document.documentElement.scrollWidth <= window.innerWidth;
        const audio = [...document.querySelectorAll("audio")];
        await Promise.all(audio.map(one => one.readyState >= 1 ? 0 : new Promise(done => one.onloadedmetadata = done)));
        const before = document.getElementById("save").disabled;
        document.getElementById("listener").value = "ann";
        document.getElementById("listener").dispatchEvent(new Event("input", {bubbles: true}));
        document.querySelector('input[name="2"][value="-1"]').click();
        return {wide, before, after: document.getElementById("save").disabled, durations: audio.map(one => one.duration),
                voted: document.querySelectorAll("section.voted").length, votes: window.eval("votes")};
    """
    told = ask_page(page, script, width=width)
    assert told["wide"] and told["before"] is True and told["after"] is False and told["voted"] == 1 and told["votes"] == {"2": -1}
    assert all(0.49 < duration < 0.6 for duration in told["durations"])
