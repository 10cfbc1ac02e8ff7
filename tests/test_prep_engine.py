"""The same shards whatever the slices, workers and kills; what is done is not done again; the trainer and others read them."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from csm.codec import SpectralCodec, codec_from_folder
from csm.config import CodecConfig, EncodeConfig, PrepConfig, TextConfig
from data_prep.turns import prepare_turns

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("one", "two", "three", "four")


def write_recordings(root: Path, num_speakers: int = 4, num_each: int = 4, duration_s: float = 1.0) -> Path:
    """A folder a speaker, a tone and noise a recording, some words beside each."""
    random = np.random.default_rng(0)
    for speaker in range(num_speakers):
        folder = root / f"speaker {speaker}"
        folder.mkdir(parents=True)
        for index in range(num_each):
            time_s = np.arange(round(24_000 * duration_s * random.uniform(0.8, 1.2))) / 24_000
            audio = 0.3 * np.sin(2 * np.pi * (150 + 50 * speaker) * time_s) + 0.05 * random.standard_normal(len(time_s))
            soundfile.write(folder / f"{index}.wav", audio, 24_000)
            (folder / f"{index}.txt").write_text(" ".join(random.choice(WORDS, 3)))
    return root


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_codec: SpectralCodec, word_tokenizer) -> Path:
    """What recordings are prepared for: a folder with a codec and a tokenizer, as a checkpoint or a corpus has."""
    folder = tmp_path_factory.mktemp("checkpoint")
    small_codec.save(folder / "codec")
    word_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def settings(recordings: Path, checkpoint: Path) -> Callable[..., PrepConfig]:
    """`settings(output, ...)`: units of some five seconds, so that there are several."""

    def make(output: Path, **changed: object) -> PrepConfig:
        values: dict = dict(
            name="turns",
            input=str(recordings),
            output=str(output),
            num_workers=1,
            unit_min=0.08,
            val_share=0.2,
            codec=CodecConfig(source=str(checkpoint), num_codebooks=4),
            text=TextConfig(tokenizer="words", source=str(checkpoint)),
        )
        return PrepConfig(**(values | changed))

    return make


@pytest.fixture(scope="module")
def undisturbed(settings: Callable[..., PrepConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert prepare_turns(settings(output)) == 0
    return output


def content(output: Path) -> dict[str, str]:
    """Digest of every file, locks aside."""
    paths = sorted(path for path in output.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def done_units(output: Path) -> dict[str, tuple[int, int]]:
    """Finished units, and which folder each one has: doing a unit again makes another (numbers of inodes come again, times do not)."""
    folders = {path.stem: (output / "prep/units" / path.stem).stat() for path in (output / "prep/done").glob("*.json")}
    return {unit: (status.st_ino, status.st_mtime_ns) for unit, status in folders.items()}


def as_child(work: Callable[[], object]) -> int:
    """Run something in a forked copy of this warm process; its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with open(os.devnull, "w") as silence:
                os.dup2(silence.fileno(), 1)
            status = int(work() or 0)
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_splits_units_and_index_hold_together(undisturbed: Path, checkpoint: Path, tmp_path: Path) -> None:
    from csm.data.shards import ShardReader

    undisturbed = shutil.copytree(undisturbed, tmp_path / "copy")  # readers leave files of their own

    plan = json.loads((undisturbed / "prep/plan.json").read_text())
    assert plan["num_units"] >= 4 and plan["num_recordings"] == 16
    names: dict[str, set[str]] = {}
    num_samples = 0
    for split in ("train", "validation"):
        reader = ShardReader(undisturbed / split)
        reader.indexes[0].verify()
        assert reader.codec.digest == codec_from_folder(checkpoint / "codec").digest
        num_samples += len(reader)
        metas = reader.read_metas(range(len(reader)))
        names[split] = {turn["speaker_name"] for meta in metas if isinstance(meta, dict) for turn in meta["turns"]}
        assert all(isinstance(meta, dict) and meta["source"].startswith("speaker ") for meta in metas)
    assert num_samples == 16
    if plan["split_by"] == "speaker":
        assert not names["train"] & names["validation"]
    assert (undisturbed / "failures.jsonl").read_bytes() == b""


def test_plain_webdataset_reads_the_shards(undisturbed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((undisturbed / "train").glob("shard-*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({raw["__key__"] for raw in read}) == len(read) > 0
    for raw in read:
        turns = json.loads(raw["json"])["turns"]
        assert np.load(io.BytesIO(raw["codes.npy"]), allow_pickle=False).shape == (4, turns[-1]["frames"][1])


@pytest.mark.parametrize("slice_count", [2, 3])
def test_slices_in_any_order_give_the_same_bytes(slice_count: int, settings: Callable, undisturbed: Path, tmp_path: Path) -> None:
    for slice_index in reversed(range(slice_count)):
        assert prepare_turns(settings(tmp_path, slice_index=slice_index, slice_count=slice_count)) == 0
        assert not (tmp_path / "train").exists()
    assert prepare_turns(settings(tmp_path, stages=["merge"])) == 0
    assert content(tmp_path) == content(undisturbed)


def test_merge_before_all_is_done_lists_what_is_and_says_so(
    settings: Callable, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prepare_turns(settings(tmp_path, slice_index=0, slice_count=2))
    capsys.readouterr()
    assert prepare_turns(settings(tmp_path, stages=["merge"])) == 1
    assert "units are not done and not in it" in capsys.readouterr().out
    listed = [shard["name"] for shard in json.loads((tmp_path / "train/index.json").read_text())["shards"]]
    assert 0 < len(listed) == len(list((tmp_path / "train").glob("*.tar")))
    assert prepare_turns(settings(tmp_path)) == 0
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.slow
def test_two_workers_give_the_same_bytes_and_one_killed_is_replaced(settings: Callable, undisturbed: Path, tmp_path: Path) -> None:
    def kill_one() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        while not (victims := [p for p in multiprocessing.active_children() if p.pid is not None]):
            time.sleep(0.01)
        time.sleep(0.3)  # while it imports
        os.kill(victims[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert prepare_turns(settings(tmp_path, num_workers=2)) == 0
    killer.join()
    assert content(tmp_path) == content(undisturbed)


class _Killed:
    """Counts the calls that change what a crash would leave behind, and kills its own process, for real, before the n-th."""

    NAMES = ("replace", "fsync", "link", "unlink", "rmdir")

    def __init__(self, at: int) -> None:
        self.left = at
        for name in self.NAMES:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable) -> Callable:
        def counted(*args: object, **options: object) -> object:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted


@pytest.mark.slow
def test_killed_before_any_call_and_run_again_gives_the_same_bytes_and_redoes_nothing(settings: Callable, tmp_path: Path) -> None:
    """Killed before the first call that changes the disk, before the second, and so on to the end."""
    recordings = write_recordings(tmp_path / "in", num_each=2)

    def work(output: Path) -> int:
        return prepare_turns(settings(output, input=str(recordings)))

    assert work(tmp_path / "undisturbed") == 0
    expected = content(tmp_path / "undisturbed")
    num_kept = 0
    for point in range(1, 1_000):
        output = tmp_path / f"at_{point}"

        def killed(output: Path = output, point: int = point) -> int:
            _Killed(point)
            return work(output)

        status = as_child(killed)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        before = done_units(output)
        assert as_child(lambda output=output: work(output)) == 0, f"killed before call {point}: the same command fails"
        assert content(output) == expected, f"killed before call {point}"
        after = done_units(output)
        assert {unit: after[unit] for unit in before} == before, f"killed before call {point}: a finished unit was done again"
        num_kept += len(before)
        shutil.rmtree(output)
    assert 50 < point < 999 and num_kept > 50


@pytest.mark.slow
def test_killed_command_run_again_gives_the_same_bytes(recordings: Path, checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    arguments = [
        "prep=turns", f"input={recordings}", f"output={tmp_path / 'out'}", "num_workers=1", "unit_min=0.08", "val_share=0.2",
        f"codec.source={checkpoint}", "codec.num_codebooks=4", "text=words", f"text.source={checkpoint}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "data_prep", *arguments]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out/prep/done").is_dir() or not any((tmp_path / "out/prep/done").iterdir()):
        assert started.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    before = done_units(tmp_path / "out")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "train: python train.py data=shards" in again.stdout
    assert content(tmp_path / "out") == content(undisturbed)
    after = done_units(tmp_path / "out")
    assert {unit: after[unit] for unit in before} == before


def test_finished_work_is_left_alone_and_damaged_work_done_again(settings: Callable, undisturbed: Path, tmp_path: Path) -> None:
    assert prepare_turns(settings(tmp_path)) == 0
    first = done_units(tmp_path)
    folder_inode = (tmp_path / "train").stat().st_ino
    assert prepare_turns(settings(tmp_path)) == 0
    assert done_units(tmp_path) == first and (tmp_path / "train").stat().st_ino == folder_inode
    tar = tmp_path / "prep/units/train-000001/shard-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[600] ^= 1
    tar.unlink()  # it is linked into train/
    tar.write_bytes(damaged)
    assert prepare_turns(settings(tmp_path)) == 0
    changed = [unit for unit, folder in done_units(tmp_path).items() if folder != first[unit]]
    assert changed == ["train-000001"]
    assert content(tmp_path) == content(undisturbed)


def test_other_settings_are_done_again_and_another_codec_is_refused(settings: Callable, undisturbed: Path, tmp_path: Path) -> None:
    assert prepare_turns(settings(tmp_path)) == 0
    assert prepare_turns(settings(tmp_path, encode=EncodeConfig(keep_audio=True))) == 0
    assert content(tmp_path)["train/index.json"] != content(undisturbed)["train/index.json"]
    assert prepare_turns(settings(tmp_path)) == 0
    assert content(tmp_path) == content(undisturbed)
    other = tmp_path.with_name(tmp_path.name + "_codec")
    SpectralCodec.fit([torch.randn(48_000)], num_codebooks=4, codebook_size=16).save(other)
    with pytest.raises(ValueError, match=r"codes of two codecs do not mix, give another output="):
        prepare_turns(settings(tmp_path, codec=CodecConfig(source=str(other), num_codebooks=4)))
    with pytest.raises(ValueError, match=r"was planned with codec="):
        prepare_turns(settings(tmp_path, codec=CodecConfig(source=str(other), num_codebooks=4), stages=["encode"]))


def test_added_recordings_leave_finished_units_alone(settings: Callable, recordings: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(recordings, root)
    changed = settings(tmp_path / "out", input=str(root), val_share=0.0)
    assert prepare_turns(changed) == 0
    before = done_units(tmp_path / "out")
    write_recordings(tmp_path / "more", num_speakers=1, num_each=3)
    shutil.copytree(tmp_path / "more/speaker 0", root / "zoe")
    for index, path in enumerate(sorted((root / "zoe").glob("*.wav"))):
        soundfile.write(path, np.random.default_rng(100 + index).standard_normal(24_000) * 0.1, 24_000)
    assert prepare_turns(changed) == 0
    after = done_units(tmp_path / "out")
    assert len(after) >= len(before)
    same = [unit for unit in before if after[unit] == before[unit]]
    assert len(same) >= len(before) - 1  # the last unit took more in
    assert json.loads((tmp_path / "out/summary.json").read_text())["splits"]["train"]["samples"] == 19


def test_what_is_dropped_is_named_and_told_by_the_exit_status(
    settings: Callable, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "in"
    shutil.copytree(recordings, root)
    shutil.copy(root / "speaker 0/0.wav", root / "again.wav")
    (root / "again.txt").write_text("one")
    assert prepare_turns(settings(tmp_path / "out", input=str(root))) == 0  # a duplicate is no fault
    soundfile.write(root / "silence.wav", np.zeros(24_000), 24_000)
    (root / "silence.txt").write_text("one")
    (root / "cut.wav").write_bytes((root / "speaker 1/0.wav").read_bytes()[:20_000])
    (root / "cut.txt").write_text("one")
    (root / "speaker 2/0.txt").write_text("nobody knows this")
    capsys.readouterr()
    assert prepare_turns(settings(tmp_path / "out", input=str(root))) == 1
    rows = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert [(row["source"], row["stage"], row["reason"]) for row in rows] == [
        ("cut.wav", "manifest", "truncated"),
        ("silence.wav", "ingest", "silent"),
        ("speaker 0/0.wav", "manifest", "duplicate"),  # again.wav came first
        ("speaker 2/0.wav", "encode", "unknown_text"),
    ]
    out = capsys.readouterr().out
    assert "ingest: silent" in out and "encode: unknown_text" in out
    assert json.loads((tmp_path / "out/summary.json").read_text())["dropped"]["manifest: duplicate"]["count"] == 1


def test_a_file_changed_behind_the_manifest_is_dropped(settings: Callable, recordings: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(recordings, root)
    changed = settings(tmp_path / "out", input=str(root), stages=["manifest"])
    assert prepare_turns(changed) == 0
    soundfile.write(root / "speaker 0/1.wav", np.random.default_rng(1).standard_normal(24_000) * 0.1, 24_000)
    assert prepare_turns(settings(tmp_path / "out", input=str(root), stages=["encode", "merge"])) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert (row["source"], row["reason"]) == ("speaker 0/1.wav", "changed")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda out: {"input": str(out / "nowhere")}, "nothing there; expected a folder"),
        (lambda out: {"input": None}, "prep=turns needs input="),
        (lambda out: {"stages": ["encode"]}, r"no plan there; run stages=\[manifest\] first"),
        (lambda out: (out.mkdir(), (out / "thesis.tex").touch(), {})[-1], "holds something that is not a preparation"),
        (lambda out: {"input": str(out.parent)}, "lie in one another"),
        (lambda out: {"codec": CodecConfig(source=str(out / "none"))}, "has no codec.json"),
    ],
    ids=["no_input", "input_not_given", "no_plan", "foreign_output", "output_in_input", "no_codec"],
)
def test_mistake_is_told_before_any_work(prepare: Callable, words: str, settings: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=words):
        prepare_turns(settings(output, **prepare(output)))


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        ("ray", r"Ray is not installed here; run `pip install -e \"\.\[ray\]\"`"),
        ("slurm", "there is no sbatch here; run it on a login node"),
    ],
)
def test_executor_that_is_not_there_is_told(
    executor: str, words: str, settings: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        prepare_turns(settings(tmp_path / "out", executor=executor))


def test_worker_that_outlives_its_driver_is_waited_for_and_its_unit_not_done_again(settings: Callable, tmp_path: Path) -> None:
    """Somebody holds a unit's lock and does it; who was given the same unit meanwhile takes it as it is."""
    from data_prep.engine import locked

    whole = tmp_path / "whole"
    assert prepare_turns(settings(whole)) == 0
    unit = "train-000000"
    note = whole / f"prep/done/{unit}.json"
    away = note.rename(tmp_path / "note.json")
    before = (whole / "prep/units" / unit).stat()
    second = threading.Thread(target=prepare_turns, args=(settings(whole),))
    with locked(whole / f"prep/locks/{unit}.lock", what="the unit"):
        second.start()
        time.sleep(0.5)
        assert second.is_alive()
        away.rename(note)  # the first one's last act
    second.join(60)
    after = (whole / "prep/units" / unit).stat()
    assert not second.is_alive() and (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_error_that_nobody_foresaw_names_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csm.config import DiarizeConfig, FilterConfig, IngestConfig, SegmentConfig, TranscribeConfig
    from data_prep import stages
    from data_prep.manifest import Recording

    def fails(*_: object) -> dict:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(stages, "_transcribe", fails)
    listening = stages.Listening(IngestConfig(), TranscribeConfig(), DiarizeConfig(), SegmentConfig(), FilterConfig(), {"whisper": "none"})
    recordings = [Recording("0" * 16, "calls/a.wav", 1, 1.0)]
    with pytest.raises(RuntimeError, match="calls/a.wav: RuntimeError: no kernel image"):
        stages.run_stages(listening, stages.NAMES, stages.FILTER, tmp_path, "train-000000", "", lambda: iter(recordings), tmp_path)


def test_a_slice_that_is_being_done_is_refused(settings: Callable, tmp_path: Path) -> None:
    from data_prep.engine import locked

    with locked(tmp_path / "prep/slice-0-of-1.lock", what="it"):
        with pytest.raises(FileExistsError, match="slice 0 of 1 of .* is being done by another process"):
            prepare_turns(settings(tmp_path))


def test_command_line_answers_help_and_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from csm.cli.hydra_entry import main
    from data_prep.__main__ import ABOUT, EXAMPLES, prepare

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["data_prep", *arguments])
        status = 0
        try:
            main("prep", PrepConfig, prepare, about=ABOUT, examples=EXAMPLES)
        except SystemExit as left:
            status = int(left.code or 0)
        return (status, *capsys.readouterr())

    status, out, _ = run("prep=turns", "--help")
    assert status == 0 and "slice_count=" in out and "ingest.loudness_lufs=-23" in out
    for override, words, expected in [
        ("slice_indx=1", "slice_indx: no such key (did you mean slice_index", 2),
        ("slice_index=1", "slice_index=1: expected 0 to 0", 2),
        ("encode.max_turn_s=0.1", "encode.min_turn_s=0.16: expected", 2),
        ("stages=[transcribe]", "prep=turns has no stage 'transcribe'; there are: manifest, encode, merge", 2),
        ("input=nowhere", "input=nowhere: nothing there", 2),
        ("executor=dask", "executor='dask': expected one of local, ray, slurm", 2),
        ("executor=ray slice_count=2", "slice_count=2: expected 1: executor=ray shares all units itself", 2),
        ("ray.workers=2", "expected nothing, or executor=ray: executor=local does not read it", 2),
        ("executor=slurm slurm.options=[partition]", "slurm.options=['partition']: expected options of sbatch", 2),
    ]:
        status, out, err = run("prep=turns", *override.split())
        assert status == expected and not out and words in err and len(err.splitlines()) == 1, err
    status, _, err = run("prep=demo", "executor=ray")
    assert status == 2 and "prep=demo has no units to share" in err
    status, _, err = run("prep=demo", "input=somewhere")
    assert status == 2 and "add prep=offline" in err


def test_recordings_to_shards_to_training_steps(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing given but recordings: the codec is fitted on them, the tokenizer knows their words."""
    from csm.cli.train import main as train

    codec = CodecConfig(num_codebooks=4)
    config = PrepConfig(
        name="turns", input=str(recordings), output=str(tmp_path / "data"), num_workers=1, codec=codec, text=TextConfig(), val_share=0.2
    )
    assert prepare_turns(config) == 0
    monkeypatch.chdir(tmp_path)
    tiny = [
        "model.num_codebooks=4", "codec.num_codebooks=4", "model.backbone.num_layers=1", "model.backbone.width=32",
        "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1", "model.depth_decoder.width=16",
        "model.depth_decoder.ffn_width=24", "data.seq_len=64", "data.rows_per_batch=1",
        "trainer.max_steps=4", "trainer.log_every=1", "trainer.validate_every=4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", "data=shards", "data.path=data", "run_dir=run", *tiny])
    try:
        train()
    except SystemExit as left:
        assert not left.code
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len(lines) == 5 and "train/loss" in lines[0]
    assert (tmp_path / "run/checkpoints/last.txt").exists() or any((tmp_path / "run/checkpoints").iterdir())


def test_phases_are_copies_of_training_samples_cut_a_part_of_a_frame_later(settings: Callable, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert prepare_turns(settings(output, encode=EncodeConfig(num_phases=4))) == 0

    def keys(folder: Path, split: str) -> list[str]:
        lines = [line for path in sorted((folder / split).glob("*.samples.jsonl")) for line in path.read_text().splitlines()]
        return [json.loads(line)["key"] for line in lines]

    assert keys(output, "validation") == keys(undisturbed, "validation")
    digests = [key.split("-")[0] for key in keys(undisturbed, "train")]
    assert sorted(keys(output, "train")) == sorted(f"{digest}-{start_ms}" for digest in digests for start_ms in (0, 20, 40, 60))
