"""Fine-tuning: recordings and shards to a run, mistakes in one line, learning switches, early stopping."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from csm import csm_loss
from csm.cli.finetune import SUMMARY_NAME, finetune, main
from csm.cli.hydra_entry import UsageError, compose
from csm.cli.train import train
from csm.config import AdapterConfig, DataConfig, FinetuneConfig, OptimConfig, TrainConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.data.shards import iter_samples
from csm.frames import Batch
from csm.generation.generator import Generator
from csm.model.pretrained import load_model, resolve_checkpoint
from csm.text import WordTokenizer, tokenizer_from_folder
from data_prep.script import VOICES
from data_prep.synthesis import Synthesizer, random_for
from tests.conftest import tiny_config


@pytest.fixture
def talks(tmp_path: Path, write_conversations: Callable[..., Path], small_codec) -> Path:
    """Two speakers taking turns; validation too."""
    talk = [[(0, "one two", 7), (1, "three", 6), (0, "four", 5)]] * 6
    for split in ("train", "validation"):
        write_conversations(tmp_path / "talks" / split, talk, digest=small_codec.digest)
    return tmp_path / "talks"


@pytest.fixture
def config(talks: Path, speaking_checkpoint: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        run_dir=str(tmp_path / "run"),
        base=str(speaking_checkpoint),
        adapter=AdapterConfig(kind="lora", rank=2, alpha=4.0),
        data=DataConfig(kind="shards", path=str(talks), seq_len=64, rows_per_batch=2, max_val_batches=0),
        optim=OptimConfig(lr=5e-3, warmup_steps=0, schedule="constant"),
        trainer=TrainerConfig(max_steps=4, log_every=1, validate_every=2, checkpoint_every=2, deterministic=True),
    )


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Ten seconds of tones, each half a second long with a text beside it."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for index in range(20):
        tone = np.sin(np.arange(12_000 + 960 * (index % 5)) * (0.02 + 0.004 * index)).astype(np.float32) * 0.3
        soundfile.write(folder / f"{index:02d}.wav", tone, 24_000)
        (folder / f"{index:02d}.txt").write_text(("one two", "three")[index % 2] + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """`run_main("a=1", ...)`: exit status and stderr of finetune.py."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def val_losses(run_dir: Path) -> list[float]:
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


def batch_of(talks: Path, model, tokenizer, **data: object) -> Batch:
    settings = DataConfig(kind="shards", path=str(talks), seq_len=64, rows_per_batch=2, **data)  # type: ignore[arg-type]
    module = CSMDataModule(settings, model.config, tokenizer)
    module.setup()
    return next(iter(module.train_dataloader()))


def grad_of_audio(model, batch: Batch, *, amortization: float = 1.0) -> torch.Tensor:
    """The gradient that reaches the tables, by parameter, flat."""
    model.zero_grad()
    csm_loss(model, batch, amortization=amortization).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def rows_of(batch: Batch, tokenizer, speaker: int) -> torch.Tensor:
    """[B, T] bool: audio and EOS rows of a speaker's turns."""
    token = tokenizer.encode_turn(speaker, "")[1]
    others = {tokenizer.encode_turn(number, "")[1] for number in range(tokenizer.num_speakers)}
    result = torch.zeros(batch.tokens.shape[:2], dtype=torch.bool)
    for row in range(result.shape[0]):
        now = -1
        for position in range(result.shape[1]):
            if bool(batch.mask[row, position, -1]) and int(batch.tokens[row, position, -1]) in others:
                now = int(batch.tokens[row, position, -1])
            result[row, position] = now == token and bool(batch.mask[row, position, 0])
    return result


def test_shards_give_a_run_with_what_was_won_and_lost(config: FinetuneConfig, talks: Path) -> None:
    run_dir = finetune(replace(config, keep=str(talks), export="csm"))
    summary = json.loads((run_dir / SUMMARY_NAME).read_text())
    for scores in (summary["nats"]["new"], summary["nats"]["kept"]):
        assert scores["result"]["c0"] < scores["base"]["c0"]
    assert 0 < summary["adapter_parameters"] < summary["parameters"]
    assert resolve_checkpoint(summary["export"]) == run_dir / "export"
    assert str(resolve_checkpoint(run_dir)) == summary["best"]


@pytest.mark.parametrize("kind", ["none", "dora"])
def test_full_and_dora_runs_differ_in_what_they_learn_only(config: FinetuneConfig, kind: str) -> None:
    run_dir = finetune(replace(config, adapter=replace(config.adapter, kind=kind)))
    summary = json.loads((run_dir / SUMMARY_NAME).read_text())
    assert ("adapter_parameters" in summary) == (kind == "dora")
    assert summary["nats"]["new"]["result"]["c0"] < summary["nats"]["new"]["base"]["c0"]


@pytest.mark.slow
def test_recordings_are_prepared_with_the_bases_tools_for_the_asked_speaker(config: FinetuneConfig, recordings: Path, small_codec) -> None:
    data = replace(config.data, path=str(recordings))
    run_dir = finetune(replace(config, data=data, speaker=1, val_share=0.3))
    index = json.loads((run_dir / "data" / "train" / "index.json").read_text())
    assert index["codec"]["digest"] == small_codec.digest
    train, validation = (list(iter_samples(run_dir / "data" / split)) for split in ("train", "validation"))
    heard, held_back = ({sample.key.split("-")[0] for sample in samples} for samples in (train, validation))
    assert heard and held_back and not heard & held_back, "a recording is in one split"
    assert {turn.speaker for sample in train for turn in sample.turns} == {1}
    written = run_dir / "data" / "prep" / "done"
    done = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    finetune(replace(config, data=data, speaker=1, val_share=0.3, resume="auto", run_dir=str(run_dir)))
    assert done and done == {path: path.stat().st_mtime_ns for path in written.iterdir()}, "nothing is prepared twice"


@pytest.mark.slow
def test_a_hugging_face_data_set_is_prepared_as_recordings_are(config: FinetuneConfig, recordings: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(recordings.glob("**/*.wav"))
    columns = {
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
        "text": [path.with_suffix(".txt").read_text() for path in files],
    }
    datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "set")
    data = replace(config.data, path=f"hf:{tmp_path / 'set'}")
    run_dir = finetune(replace(config, data=data, speaker=1, val_share=0.3))
    found = [sample for split in ("train", "validation") for sample in iter_samples(run_dir / "data" / split)]
    assert len(found) == len(files)
    assert {turn.text for sample in found for turn in sample.turns} == {text.strip() for text in columns["text"]}


@pytest.mark.slow
def test_recordings_without_texts_are_transcribed_into_words_the_base_knows(config: FinetuneConfig, tmp_path: Path) -> None:
    folder, synthesizer = tmp_path / "spoken", Synthesizer()
    folder.mkdir()
    for index, text in enumerate(
        ("seven four two", "nine one zero three", "three eight six", "five two two", "one four nine six", "eight zero five")
    ):
        soundfile.write(folder / f"{index}.wav", synthesizer.speak(text, VOICES[0], random_for(0, "spoken", index)), 24_000)
    data = replace(config.data, path=str(folder))
    run_dir = finetune(replace(config, data=data, speaker=2, val_share=0.3))
    turns = [turn for split in ("train", "validation") for sample in iter_samples(run_dir / "data" / split) for turn in sample.turns]
    assert {turn.speaker for turn in turns} == {2}
    digits = set("zero one two three four five six seven eight nine".split())
    assert len(turns) >= 4 and all(set(turn.text.split()) <= digits for turn in turns), [turn.text for turn in turns]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_voice_gets_a_number_of_its_own_and_old_ones_keep_theirs(
    config: FinetuneConfig, recordings: Path, talks: Path, speaking_checkpoint: Path, word_tokenizer, kind: str
) -> None:
    adapter = replace(config.adapter, kind=kind)
    mixed = replace(config, data=replace(config.data, path=str(recordings)), adapter=adapter, val_share=0.3, keep=str(talks), replay=0.5)
    run_dir = finetune(mixed)
    turns = [turn for sample in iter_samples(run_dir / "data" / "train") for turn in sample.turns]
    assert {turn.speaker for turn in turns} == {word_tokenizer.num_speakers}
    best = resolve_checkpoint(run_dir)
    tokenizer = tokenizer_from_folder(best)
    assert isinstance(tokenizer, WordTokenizer) and tokenizer.encode_turn(1, "one") == word_tokenizer.encode_turn(1, "one")
    before, after = load_model(speaking_checkpoint).text_embeddings.weight, load_model(best).text_embeddings.weight
    new = tokenizer.speaker_id(word_tokenizer.num_speakers)
    old = [tokenizer.speaker_id(number) for number in range(word_tokenizer.num_speakers)]
    learnt, begun = after[new] - before[old].mean(dim=0), before[new] - before[old].mean(dim=0)
    assert 0 < learnt.norm() < begun.norm(), "it begins as the mean of the old ones, and is learnt"
    assert torch.equal(after[new + 1 :], before[new + 1 :])
    settings = json.loads((run_dir / "finetune.json").read_text())
    assert set(settings["nats"]) == {"new", "kept"}
    with pytest.raises(ValueError, match="already holds a run"):
        finetune(mixed)
    finetune(replace(mixed, resume="auto", trainer=replace(config.trainer, max_steps=6)))
    Generator.from_pretrained(run_dir, watermark="off").generate_codes("one two", speaker=4, max_duration_s=0.5)


@pytest.mark.slow
def test_replayed_turns_are_learnt_from_and_never_validated_on(config: FinetuneConfig, recordings: Path, talks: Path) -> None:
    settings = replace(config, data=replace(config.data, path=str(recordings)), val_share=0.3, keep=str(talks), replay=0.25)
    run_dir = finetune(settings)
    written = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]
    assert written["path"] == [str(run_dir / "data"), str(talks)] and written["weights"] == [0.75, 0.25]
    assert written["val_path"] == str(run_dir / "data")
    tokenizer = tokenizer_from_folder(resolve_checkpoint(run_dir))
    assert isinstance(tokenizer, WordTokenizer)
    module = CSMDataModule(DataConfig(**written), tiny_config(), tokenizer)
    tokens = {tokenizer.speaker_id(number): number for number in range(tokenizer.num_speakers)}
    heard = [
        {tokens[int(i)] for batch in batches for i in batch.tokens[..., -1].unique() if int(i) in tokens}
        for batches in (module.train_dataloader(), module.val_dataloader())
    ]
    assert heard == [{0, 1, 4}, {4}]
    assert module.stats()[f"share/{talks}"] == pytest.approx(0.25, abs=0.1)


def test_a_speaker_the_base_does_not_know_is_refused(config: FinetuneConfig, recordings: Path) -> None:
    with pytest.raises(ValueError, match="speaker=9"):
        finetune(replace(config, data=replace(config.data, path=str(recordings)), speaker=9))


def test_shards_keep_their_speakers(config: FinetuneConfig) -> None:
    with pytest.raises(ValueError, match="holds shards"):
        finetune(replace(config, speaker=1))


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("data=x",), 2, "base is required"),
        (("base=x",), 2, "data.path is required"),
        (("base=x", "data=y", "spaeker=1"), 2, "spaeker: no such key"),
        (("base=x", "data=y", "experiment=voice"), 2, "experiment=voice: no such choice"),
        (("base=nowhere", "data=y"), 1, "nowhere: no such folder"),
        (("base=x", "data=y", "val_share=0"), 2, "val_share"),
        (("base=x", "data=y", "trainer.validate_every=0"), 2, "trainer.patience"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], status: int, expected: str, run_main: Callable) -> None:
    got, err = run_main(*arguments)
    lines = [line for line in err.splitlines() if line]
    assert got == status and len(lines) == 1 and expected in lines[0], err


def test_missing_data_is_one_line(speaking_checkpoint: Path, run_main: Callable, tmp_path: Path) -> None:
    status, err = run_main(f"base={speaking_checkpoint}", "data=nowhere", f"run_dir={tmp_path / 'run'}")
    assert status == 1 and "data=nowhere: no such file" in err
    assert not (tmp_path / "run").exists()


def test_every_recipe_composes_with_every_adapter() -> None:
    for recipe in ("voice_5min", "voice_5h", "language", "style"):
        for adapter in ("none", "lora", "dora"):
            config = compose("finetune", ["base=x", "data.path=y", f"experiment=finetune_{recipe}", f"adapter={adapter}"], FinetuneConfig)
            assert config.adapter.kind == adapter and config.trainer.patience > 0
    with pytest.raises(UsageError):
        compose("finetune", ["base=x", "data.path=y", "data.learn_speakers=[1.5]"], FinetuneConfig)


def test_turns_that_are_not_learnt_give_no_gradient_and_are_still_heard(talks: Path, speaking_model, word_tokenizer) -> None:
    batch = batch_of(talks, speaking_model, word_tokenizer, learn_speakers=[1])
    theirs, mine = rows_of(batch, word_tokenizer, 0), rows_of(batch, word_tokenizer, 1)
    assert theirs.any() and mine.any()
    assert not (batch.learn_c0 & theirs).any() and not (batch.learn_depth & theirs).any()
    assert torch.equal(batch.learn_c0, mine) and torch.equal(batch.learn_depth, mine)
    # Their targets alone: no gradient at all. With them beside ours: ours, bit for bit.
    nothing = replace(batch, learn_c0=batch.learn_c0 & theirs, learn_depth=batch.learn_depth & theirs)
    assert not grad_of_audio(speaking_model, nothing).any()
    # Still heard: other codes in a turn that is not learnt move the loss of one that is.
    before = csm_loss(speaking_model, batch, amortization=1.0).loss.detach()
    other = batch.tokens.clone()
    other[..., :-1][theirs & (other[..., 0] > 0)] = 7
    after = csm_loss(speaking_model, replace(batch, tokens=other), amortization=1.0).loss.detach()
    assert abs(float(after - before)) > 1e-3


def test_a_context_turns_own_codes_are_no_target(talks: Path, speaking_model, word_tokenizer) -> None:
    """The codes of the last turn, speaker 0's, come after everything that is learnt: changing them changes no gradient."""
    batch = batch_of(talks, speaking_model, word_tokenizer, learn_speakers=[1])
    theirs, mine = rows_of(batch, word_tokenizer, 0), rows_of(batch, word_tokenizer, 1)
    is_after = torch.zeros_like(mine)
    for row in range(mine.shape[0]):
        for document in batch.document_ids[row].unique().tolist():
            inside = batch.document_ids[row] == document
            if document >= 0 and (mine[row] & inside).any():
                last = int((mine[row] & inside).nonzero().max())
                is_after[row] |= inside & theirs[row] & (torch.arange(mine.shape[1]) > last)
    assert is_after.any()
    other = batch.tokens.clone()
    other[..., :-1][is_after & (other[..., 0] > 0)] = 9
    ours = grad_of_audio(speaking_model, batch)
    assert torch.allclose(ours, grad_of_audio(speaking_model, replace(batch, tokens=other)), atol=1e-6)  # sums in another order
    everything = batch_of(talks, speaking_model, word_tokenizer)
    assert not torch.allclose(ours, grad_of_audio(speaking_model, everything), atol=1e-3)


def test_codebook_0_and_depth_have_switches_of_their_own(talks: Path, speaking_model, word_tokenizer) -> None:
    batch = batch_of(talks, speaking_model, word_tokenizer, learn_speakers=[1], learn_depth_speakers=[0])
    assert torch.equal(batch.learn_c0, rows_of(batch, word_tokenizer, 1))
    assert torch.equal(batch.learn_depth, rows_of(batch, word_tokenizer, 0))
    everyone = batch_of(talks, speaking_model, word_tokenizer, learn_speakers=[1], learn_depth_speakers=[])
    assert torch.equal(everyone.learn_depth, rows_of(everyone, word_tokenizer, 0) | rows_of(everyone, word_tokenizer, 1))


@pytest.mark.parametrize("key", ["learn_speakers", "learn_depth_speakers"])
def test_speakers_that_nobody_is_are_refused(key: str, talks: Path, speaking_model, word_tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}=\[9\]: in .* no turn of \d+ conversations is theirs; those have 0, 1"):
        batch_of(talks, speaking_model, word_tokenizer, **{key: [9]})
    assert batch_of(talks, speaking_model, word_tokenizer, **{key: [9, 1]}).learn_c0.any()  # one of them is there


def test_speakers_that_may_be_further_on_are_warned_of(talks: Path, speaking_model, word_tokenizer, monkeypatch, caplog) -> None:
    monkeypatch.setattr("csm.data.shard_rows.MAX_LOOKED_AT", 1)
    batch_of(talks, speaking_model, word_tokenizer, learn_speakers=[9])
    assert "data.learn_speakers=[9]" in caplog.text and "others it is not known" in caplog.text


def test_a_run_ends_when_validation_gets_no_better(config: FinetuneConfig, tmp_path: Path) -> None:
    worse = TrainConfig(
        run_dir=str(tmp_path / "worse"),
        base=config.base,
        data=config.data,
        optim=replace(config.optim, lr=0.3, weight_decay=0.0),  # nothing gets better at this rate
        trainer=replace(config.trainer, max_steps=40, validate_every=1, checkpoint_every=1, patience=3),
    )
    run_dir = train(worse)
    losses = val_losses(run_dir)
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 40
    assert resolve_checkpoint(run_dir).name == f"step_{best + 1:06d}"


def test_a_run_that_was_stopped_keeps_its_count_of_worse_validations(config: FinetuneConfig, tmp_path: Path) -> None:
    settings = TrainConfig(
        run_dir=str(tmp_path / "whole"),
        base=config.base,
        data=config.data,
        optim=replace(config.optim, lr=0.3, weight_decay=0.0),
        trainer=replace(config.trainer, max_steps=40, validate_every=1, checkpoint_every=1, patience=3),
    )
    whole = val_losses(train(settings))
    parts = replace(settings, run_dir=str(tmp_path / "parts"))
    train(replace(parts, trainer=replace(parts.trainer, max_steps=len(whole) - 1)))
    train(replace(parts, resume="auto"))
    assert val_losses(tmp_path / "parts") == whole
