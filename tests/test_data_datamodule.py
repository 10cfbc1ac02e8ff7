"""The data module: what a batch holds, who sees which rows, and going on where a run stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from csm.config import DataConfig, ModelConfig
from csm.data import epochs as epochs_module
from csm.data import shard_rows
from csm.data.datamodule import CSMDataModule
from csm.data.shards import ShardReader
from csm.frames import Batch, codes_from_rows, is_eos_row, rows_from_turns

WORDS = "one two three four five six seven eight nine".split()
SEQ_LEN = 32


def _conversations(num: int) -> list:
    """Conversations of 9 to 22 positions, or now and then more than a row."""
    random = np.random.default_rng(3)
    nums_turns = [3 if i % 10 == 0 else 1 + i % 2 for i in range(num)]
    return [
        [(int(random.integers(4)), " ".join(random.choice(WORDS, 2)), int(random.integers(3, 9))) for _ in range(num_turns)]
        for num_turns in nums_turns
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_conversations) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    write_conversations(folder / "train", _conversations(90))
    write_conversations(folder / "validation", _conversations(13))
    return DataConfig(kind="shards", path=str(folder), seq_len=SEQ_LEN, rows_per_batch=2, max_val_batches=0)


@pytest.fixture
def make(data: DataConfig, tiny_model_config: ModelConfig, word_tokenizer):
    def make(*, seed: int = 0, accumulate: int = 1, rank: int = 0, world_size: int = 1, **changes: object) -> CSMDataModule:
        return CSMDataModule(
            replace(data, **changes), tiny_model_config, word_tokenizer, "d" * 64, seed, accumulate, rank=rank, world_size=world_size
        )

    return make


def _same(a: Batch, b: Batch) -> bool:
    names = ("tokens", "mask", "document_ids", "learn_c0", "learn_depth")
    return a.keys == b.keys and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def _epochs(module: CSMDataModule, num: int = 1) -> list[list[Batch]]:
    return [list(module.train_dataloader()) for _ in range(num)]


def _forever(module: CSMDataModule) -> Iterator[Batch]:
    while True:
        yield from module.train_dataloader()


def _documents(batches: list[Batch]) -> list[bytes]:
    """Every document of batches, as bytes, sorted: what was seen, whatever its place."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            for document in range(int(batch.document_ids[row].max()) + 1):
                found.append(batch.tokens[row][batch.document_ids[row] == document].numpy().tobytes())
    return sorted(found)


def test_batch_holds_the_conversations_it_names(make, data: DataConfig, word_tokenizer):
    reader = ShardReader(Path(data.path) / "train")
    by_key = {key: rows_from_turns(reader.read(i).turns, word_tokenizer, 4) for i, key in enumerate(reader.keys)}
    for batch in _epochs(make())[0]:
        assert batch.tokens.shape == batch.mask.shape == (2, SEQ_LEN, 5)
        assert (batch.tokens.dtype, batch.mask.dtype, batch.document_ids.dtype) == (torch.int64, torch.bool, torch.int64)
        keys = iter(batch.keys)
        for row in range(2):
            for document in range(int(batch.document_ids[row].max()) + 1):
                at, whole = batch.document_ids[row] == document, by_key[next(keys)]
                if len(whole) > SEQ_LEN:
                    continue  # cut: covered below
                assert torch.equal(batch.tokens[row][at], whole.tokens) and torch.equal(batch.mask[row][at], whole.mask)
                assert torch.equal(batch.learn_c0[row][at], whole.learn_c0) and torch.equal(batch.learn_depth[row][at], whole.learn_depth)
            padding = batch.document_ids[row] == -1
            assert not batch.mask[row][padding].any() and not batch.learn_c0[row][padding].any()
        assert next(keys, None) is None


def test_epoch_sees_every_turn_once_apart_from_the_rows_left_out(make, data: DataConfig):
    module = make(rows_per_batch=1)
    assert module.stats()["left_out_rows"] == 0 and module.stats()["cut_conversations"] > 0
    codes = [turn for batch in _epochs(module)[0] for turn in codes_from_rows(batch.tokens.flatten(0, 1), batch.mask.flatten(0, 1))]
    reader = ShardReader(Path(data.path) / "train")
    expected = [turn.codes for i in range(len(reader)) for turn in reader.read(i).turns]
    assert sorted(turn.numpy().tobytes() for turn in codes) == sorted(turn.contiguous().numpy().tobytes() for turn in expected)


def test_second_visit_from_memory_equals_the_first_from_disk(make, monkeypatch: pytest.MonkeyPatch):
    kept = make()
    first, second = _epochs(kept, 2)
    monkeypatch.setattr(shard_rows, "CACHE_BYTES", 0)
    read = make()
    assert kept._train._cache is not None
    assert all(_same(a, b) for a, b in zip(first + second, sum(_epochs(read, 2), []), strict=True))
    assert read._train._cache is None


def test_order_differs_between_epochs_and_seeds(make):
    first, second = _epochs(make(), 2)
    assert first[0].keys != second[0].keys != _epochs(make(seed=1))[0][0].keys


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(make, num_workers: int):
    torch.manual_seed(0)
    expected = sum(_epochs(make(), 2), [])
    state = torch.get_rng_state()
    module = make(num_workers=num_workers)
    got = sum(_epochs(module, 2), [])
    module.teardown()
    assert all(_same(a, b) for a, b in zip(expected, got, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_sees_the_same_rows_on_any_number_of_ranks(make, world_size: int, accumulate: int):
    expected = _epochs(make(rows_per_batch=8))[0]
    ranks = [_epochs(make(accumulate=accumulate, rank=rank, world_size=world_size))[0] for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(expected) * accumulate}
    for step, whole in enumerate(expected):
        parts = [batch for batches in ranks for batch in batches[step * accumulate : (step + 1) * accumulate]]
        assert _documents(parts) == _documents([whole])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_two_ranks_with_workers_see_the_steps_of_one_process(make, num_workers: int):
    expected = sum(_epochs(make(rows_per_batch=4), 2), [])
    modules = [make(rank=rank, world_size=2, num_workers=num_workers) for rank in range(2)]
    ranks = [sum(_epochs(module, 2), []) for module in modules]
    for module in modules:
        module.teardown()
    for whole, first, second in zip(expected, *ranks, strict=True):
        for row in range(4):  # rank r has every second row, from its own on, in order
            part = (first, second)[row % 2]
            assert torch.equal(part.tokens[row // 2], whole.tokens[row]) and torch.equal(part.mask[row // 2], whole.mask[row])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 7, "last", "past"])
def test_resume_goes_on_with_the_next_batch(make, at: int | str, num_workers: int):
    reference = make()
    num = len(reference.train_dataloader())
    at = {"last": num - 1, "past": num + 3}.get(at, at)
    expected = sum(_epochs(reference, 3), [])[at : at + 5]
    stopped = make(num_workers=num_workers)
    batches = _forever(stopped)
    for _ in range(at):
        next(batches)
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.teardown()
    resumed = make(num_workers=num_workers)
    resumed.load_state_dict(state)
    got = _forever(resumed)
    assert all(_same(a, next(got)) for a in expected)
    resumed.teardown()


def test_epoch_rolls_over_before_its_last_batch_is_handed_out(make):
    module = make()
    loader = module.train_dataloader()
    for count, _ in enumerate(loader, start=1):
        position = (module.state_dict()["epoch"], module.state_dict()["batch"])
        assert position == ((1, 0) if count == len(make().train_dataloader()) else (0, count))


def test_resume_on_other_ranks_goes_on_with_the_same_rows(make):
    expected = sum(_epochs(make(rows_per_batch=4), 2), [])
    position = None
    seen: list[Batch] = []
    for rows_per_batch, accumulate, world_size, num_steps in [(2, 1, 2, 3), (1, 1, 4, 6), (4, 1, 1, 2), (2, 2, 1, 4)]:
        ranks = [make(rows_per_batch=rows_per_batch, accumulate=accumulate, rank=r, world_size=world_size) for r in range(world_size)]
        for rank in ranks:
            if position is not None:
                rank.load_state_dict(position)
        streams = [_forever(rank) for rank in ranks]
        for step in range(num_steps):
            parts = [next(stream) for stream in streams for _ in range(accumulate)]
            assert _documents(parts) == _documents([expected[len(seen) + step]])
        seen += expected[len(seen) : len(seen) + num_steps]
        positions = [rank.state_dict() for rank in ranks]
        assert all(other == positions[0] for other in positions)
        position = positions[0]


def test_resume_inside_a_step_repeats_the_whole_step(make):
    module = make(accumulate=3)
    expected = _epochs(make(accumulate=3))[0]
    batches = iter(module.train_dataloader())
    for _ in range(4):
        next(batches)
    assert module.state_dict()["batch"] == 1
    resumed = make(accumulate=3)
    resumed.load_state_dict(module.state_dict())
    assert _same(next(iter(resumed.train_dataloader())), expected[3])


def test_resume_with_another_step_size_loses_no_row(make):
    module = make(rows_per_batch=4)
    batches = iter(module.train_dataloader())
    for _ in range(3):
        next(batches)
    resumed = make(rows_per_batch=2, accumulate=1)
    resumed.load_state_dict(module.state_dict())
    assert resumed.state_dict()["batch"] == 6
    coarse = make(rows_per_batch=5)
    coarse.load_state_dict(module.state_dict())
    assert coarse.state_dict()["batch"] == 2  # 12 rows: two whole steps of 5, two rows again


@pytest.mark.parametrize(("changes", "message"), [({"seed": 1}, "seed 0, now 1"), ({"seq_len": 64}, "seq_len 32, now 64")])
def test_position_of_another_order_is_refused(make, changes: dict, message: str):
    other = make(**changes)
    other.load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match=f"another order: .*{message}"):
        other.train_dataloader()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_takes_every_row_once_on_any_number_of_ranks(make, world_size: int):
    expected = list(make(seed=5).val_dataloader())
    ranks = [list(make(rank=rank, world_size=world_size).val_dataloader()) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {-(-len(expected) // world_size)}
    assert _documents(sum(ranks, [])) == _documents(expected)


def test_validation_is_capped_over_all_ranks_together(make):
    expected = list(make(max_val_batches=3).val_dataloader())
    assert len(expected) == 3
    ranks = [list(make(rank=rank, world_size=2, max_val_batches=3).val_dataloader()) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert _documents(sum(ranks, [])) == _documents(expected)
    assert not ranks[1][1].learn_c0.any() and (ranks[1][1].document_ids == -1).all()


def test_wrong_codec_is_refused_naming_both(data: DataConfig, tiny_model_config: ModelConfig, word_tokenizer):
    with pytest.raises(ValueError, match="digest dddddddddddd; this run expects mimi with 4 codebooks digest eeee"):
        CSMDataModule(data, tiny_model_config, word_tokenizer, "e" * 64, codec_name="mimi").setup()
    with pytest.raises(ValueError, match="spectral with 4 codebooks.*this run expects a codec with 8 codebooks"):
        CSMDataModule(data, replace(tiny_model_config, num_codebooks=8), word_tokenizer).setup()


def test_missing_data_says_what_to_run(make, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder.*python -m data_prep prep=demo"):
        make(path=str(tmp_path / "nothing")).setup()
    with pytest.raises(FileNotFoundError, match="dev: no such folder.*set data.val_split to a split that is there"):
        make(val_split="dev").setup()


def test_step_larger_than_the_data_is_refused(make):
    with pytest.raises(ValueError, match="one step takes 2000 .*lower one of them"):
        make(rows_per_batch=1000, accumulate=2).train_dataloader()


def test_tokenizer_larger_than_the_models_table_is_refused(data: DataConfig, tiny_model_config: ModelConfig, word_tokenizer):
    with pytest.raises(ValueError, match="set model.text_vocab_size=20 or more"):
        CSMDataModule(data, replace(tiny_model_config, text_vocab_size=10), word_tokenizer)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_left_out_counted_and_capped(
    tmp_path: Path, write_conversations, tiny_model_config: ModelConfig, word_tokenizer, num_workers: int, caplog
):
    for split in ("train", "validation"):
        write_conversations(tmp_path / split, _conversations(90))
    reader = ShardReader(tmp_path / "train")
    for sample_index in (4, 40):
        offset = int(reader._members[sample_index, 1, 0])
        with reader.paths[reader.shard[sample_index]].open("r+b") as file:
            file.seek(offset)
            file.write(b"torn codes")
    config = DataConfig(
        kind="shards", path=str(tmp_path), seq_len=SEQ_LEN, rows_per_batch=2, max_bad_share=0.03, num_workers=num_workers, verify="size"
    )
    module = CSMDataModule(config, tiny_model_config, word_tokenizer)
    seen = [key for batch in _epochs(module, 2)[0] for key in batch.keys]
    assert set(module._train.bad.reasons) == {4, 40} and not {reader.keys[4], reader.keys[40]} & set(seen)
    assert f"{reader.keys[4]}: codes.npy does not start like a .npy file" in caplog.text
    assert module.stats()["bad_samples"] == 2
    module.teardown()
    strict = CSMDataModule(replace(config, max_bad_share=0.01), tiny_model_config, word_tokenizer)
    with pytest.raises(ValueError, match="1 of 90|2 of 90 samples are bad, more than data.max_bad_share=0.01"):
        _epochs(strict, 2)
    strict.teardown()


def test_codes_outside_the_models_vocabulary_are_refused(data: DataConfig, tiny_model_config: ModelConfig, word_tokenizer):
    module = CSMDataModule(data, replace(tiny_model_config, audio_vocab_size=20), word_tokenizer)
    with pytest.raises(ValueError, match="the model takes 0 to 19; set model.audio_vocab_size"):
        _epochs(module)


def test_random_validation_rows_are_not_those_of_training(tiny_model_config: ModelConfig):
    data = CSMDataModule(DataConfig(kind="random", seq_len=100, rows_per_batch=1), tiny_model_config, seed=0)
    data.setup()
    seen, held_back = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert not torch.equal(seen.tokens, held_back.tokens)


def test_random_rows_need_no_files_and_repeat(tiny_model_config: ModelConfig):
    config = DataConfig(kind="random", seq_len=100, rows_per_batch=3, path="/nowhere")
    first, again, other = (CSMDataModule(config, tiny_model_config, seed=seed) for seed in (0, 0, 1))
    for module in (first, again, other):
        module.prepare_data()
        module.setup()
    batches = [list(itertools.islice(module.train_dataloader(), 4)) for module in (first, again, other)]
    assert all(_same(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not _same(batches[0][0], batches[2][0]) and not _same(batches[0][0], batches[0][1])
    batch = batches[0][0]
    assert batch.tokens.shape == (3, 100, 5) and (batch.document_ids >= 0).all()
    is_eos = is_eos_row(batch.tokens, batch.mask)
    assert is_eos.any(dim=1).all() and (batch.tokens[batch.mask & ~is_eos[..., None]] > 0).all()
    assert int(batch.tokens[..., :-1].max()) < 33 and int(batch.tokens[..., -1].max()) < 32
    resumed = CSMDataModule(config, tiny_model_config, seed=0)
    resumed.load_state_dict({**first.state_dict(), "batch": 2})
    assert _same(next(iter(resumed.train_dataloader())), batches[0][2])


@pytest.mark.parametrize("stop_before_end", [-20, -1, 0, 1])
def test_lightning_sees_the_same_batches_across_epochs_and_a_resume(make, stop_before_end: int, tmp_path: Path, monkeypatch):
    """Lightning takes the loader's length once, saves while it holds the last batch, and asks for a new iterator each epoch."""
    import lightning.pytorch as pl

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: list[list[str]] = []

        def training_step(self, batch: Batch) -> torch.Tensor:
            self.seen.append(batch.keys)
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(module: CSMDataModule, num_steps: int, checkpoint: Path | None = None) -> tuple[Recorder, pl.Trainer]:
        recorder = Recorder()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=num_steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
        )
        trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint, weights_only=False)
        return recorder, trainer

    def module() -> CSMDataModule:
        return make(rows_per_batch=1, accumulate=2)

    monkeypatch.setattr(epochs_module, "GROUP_DOCUMENTS", 10)  # packed in many groups, epochs differ in length
    epochs = _epochs(module(), 5)
    lengths = [len(epoch) // 2 for epoch in epochs]
    stop = stop_before_end + lengths[0]
    assert len(set(lengths)) > 1, "epochs of one length prove nothing here"
    expected = [batch.keys for epoch in epochs for batch in epoch]
    first, trainer = fit(module(), stop)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert first.seen == expected[: 2 * stop]
    second, _ = fit(module(), stop + 80, tmp_path / "stopped.ckpt")
    assert second.seen == expected[2 * stop : 2 * (stop + 80)]
