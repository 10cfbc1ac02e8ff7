"""Input from elsewhere: URLs by fsspec, manifests that name URLs, Hugging Face data sets saved to disk and as parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from csm.config import DatasetConfig, PrepConfig
from data_prep.failures import Failure
from data_prep.fetch import fetch, is_elsewhere
from data_prep.hf_dataset import is_dataset
from data_prep.inputs import Candidate, Input, probe
from data_prep.manifest import Recording
from data_prep.turns import prepare_turns


def sound(seed: int, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).standard_normal(12_000) * 0.1, 24_000, format=form)
    return buffer.getvalue()


def recordings_in(folder: Path) -> list[Recording]:
    found = [probe(entry, folder) if isinstance(entry, Candidate) else entry for entry in Input.find(folder).candidates()]
    assert not [entry for entry in found if isinstance(entry, Failure)], found
    return [entry for entry in found if isinstance(entry, Recording)]


@pytest.fixture
def store() -> fsspec.AbstractFileSystem:
    """fsspec's memory://, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return store


def test_a_folder_behind_a_url_is_fetched_once(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "anna/a.wav": sound(0),
        "anna/a.txt": b"one",
        "b.flac": sound(1, "FLAC"),
        "b.txt": b"two",
        "notes.doc": b"x",
    }.items():
        store.pipe_file(f"/talks/{name}", content)
    folder = tmp_path / "input"
    assert fetch("memory://talks", folder, DatasetConfig()) == []
    assert [(r.source, r.turns[0].text, r.turns[0].speaker_name) for r in recordings_in(folder)] == [
        ("anna/a.wav", "one", "anna"),
        ("b.flac", "two", None),
    ]
    got: list[str] = []
    get_file = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, path, *rest, **more: (got.append(path), get_file(self, path, *rest, **more)))
    assert fetch("memory://talks", folder, DatasetConfig()) == [] and got == []
    store.pipe_file("/talks/b.txt", b"three")
    store.rm_file("/talks/anna/a.wav")
    assert fetch("memory://talks", folder, DatasetConfig()) == []
    assert got == ["/talks/b.txt"]
    assert [(r.source, r.turns[0].text) for r in recordings_in(folder)] == [("b.flac", "three")]


def test_a_manifest_names_urls_and_files_beside_it(store, tmp_path: Path) -> None:
    store.pipe_file("/far/a.wav", sound(0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/near.wav").write_bytes(sound(1))
    lines = [
        {"audio": "memory://far/a.wav", "text": "one"},
        {"audio": "near.wav", "text": "two"},
        {"audio": "memory://user:secret@far/gone.wav", "text": "three"},
    ]
    (tmp_path / "in/manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert is_elsewhere(str(tmp_path / "in")) and is_elsewhere(str(tmp_path / "in/manifest.jsonl"))
    folder = tmp_path / "input"
    (failure,) = fetch(str(tmp_path / "in"), folder, DatasetConfig())
    assert (failure.source, failure.reason) == ("memory://far/gone.wav", "missing")
    assert "secret" not in json.dumps(failure.row())
    found = recordings_in(folder)
    assert [(Path(r.source).name, r.turns[0].text) for r in found] == [("a.wav", "one"), ("near.wav", "two")]


def test_a_manifest_behind_a_url_brings_what_it_names(store, tmp_path: Path) -> None:
    store.pipe_file("/far/calls/a.wav", sound(0))
    store.pipe_file("/far/list.jsonl", json.dumps({"audio": "calls/a.wav", "text": "one"}).encode())
    assert fetch("memory://far/list.jsonl", tmp_path / "input", DatasetConfig()) == []
    assert [(r.source, r.turns[0].text) for r in recordings_in(tmp_path / "input")] == [("calls/a.wav", "one")]


def test_what_is_elsewhere_is_told_by_its_name(tmp_path: Path) -> None:
    assert is_dataset("hf:some/set") and is_dataset("hf:folder") and not is_dataset("hf://datasets/some/set/audio")
    assert is_elsewhere("hf://datasets/some/set/audio") and is_elsewhere("s3://bucket/talks")
    assert not is_elsewhere(str(tmp_path)) and not is_elsewhere("recordings")


@pytest.mark.parametrize("url", ["memory://nothing", "nosuchprotocol://x/y"])
def test_a_url_that_gives_nothing_is_an_error(store, tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=url.split("://")[0]):
        fetch(url, tmp_path / "input", DatasetConfig())


def dataset(folder: Path, num: int = 3):
    datasets = pytest.importorskip("datasets")
    sounds = [{"bytes": sound(seed, "FLAC"), "path": f"{seed}.flac"} for seed in range(num)]
    sounds[1]["path"] = None
    columns = {"audio": sounds, "sentence": [f"text {seed}" for seed in range(num)], "speaker_id": list(range(num)), "extra": [0] * num}
    rows = datasets.Dataset.from_dict(columns)
    return rows.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio(sampling_rate=24_000))


@pytest.mark.parametrize("form", ["disk", "splits", "parquet"])
def test_a_data_set_becomes_recordings_with_texts(tmp_path: Path, form: str) -> None:
    rows = dataset(tmp_path)
    place = tmp_path / "set"
    if form == "disk":
        rows.save_to_disk(place)
    elif form == "splits":
        import datasets

        datasets.DatasetDict(train=rows, other=rows.select([0])).save_to_disk(place)
    else:
        place.mkdir()
        rows.to_parquet(place / "0.parquet")
    folder = tmp_path / "input"
    assert fetch(f"hf:{place}", folder, DatasetConfig()) == []
    found = recordings_in(folder)
    assert [r.source for r in found] == [f"train-00000.tar/train-{index:08d}.flac" for index in range(3)]
    assert [(r.turns[0].text, r.turns[0].speaker_name) for r in found] == [(f"text {index}", str(index)) for index in range(3)]
    tar = folder / "train-00000.tar"
    changed_ns = tar.stat().st_mtime_ns
    assert fetch(f"hf:{place}", folder, DatasetConfig()) == []
    assert tar.stat().st_mtime_ns == changed_ns
    content = tar.read_bytes()
    fetch(f"hf:{place}", tmp_path / "again", DatasetConfig())
    assert (tmp_path / "again/train-00000.tar").read_bytes() == content


def test_rows_without_audio_and_wrong_names_are_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"sound": [{"bytes": sound(0), "path": None}, None], "said": ["one", "two"]})
    rows.cast_column("sound", datasets.Audio()).save_to_disk(tmp_path / "set")
    place = f"hf:{tmp_path / 'set'}"
    (failure,) = fetch(place, tmp_path / "input", DatasetConfig(text="said"))
    assert (failure.source, failure.reason) == ("train-00000001", "missing")
    assert [r.turns[0].text for r in recordings_in(tmp_path / "input")] == ["one"]
    assert fetch(place, tmp_path / "input", DatasetConfig(text="said")) == [failure]
    with pytest.raises(ValueError, match=r"dataset.text=words: .* has no such column; it has sound, said"):
        fetch(place, tmp_path / "input", DatasetConfig(text="words"))
    with pytest.raises(ValueError, match="cannot be read"):
        fetch(f"hf:{tmp_path / 'nothing'}", tmp_path / "other", DatasetConfig())


def test_shards_of_a_data_set_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    dataset(tmp_path, 6).save_to_disk(tmp_path / "set")
    config = PrepConfig(name="turns", input=f"hf:{tmp_path / 'set'}", output=str(tmp_path / "out"), num_workers=1, val_share=0.2)
    assert prepare_turns(config) == 0
    plan = (tmp_path / "out/prep/plan.json").stat().st_mtime_ns
    index = json.loads((tmp_path / "out/train/index.json").read_text())
    assert sum(shard["num_samples"] for shard in index["shards"]) + 1 == 6
    assert prepare_turns(config) == 0
    assert (tmp_path / "out/prep/plan.json").stat().st_mtime_ns == plan
