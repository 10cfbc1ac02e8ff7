"""Several corpora in one run: shares as asked, passes that run on, an order of (seed, epoch) alone; limits are counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from csm.config import DataConfig, ModelConfig
from csm.data.datamodule import CSMDataModule
from csm.data.epochs import mix_parts, plan_epoch
from csm.data.packing import Documents, cut_documents

SEQ_LEN = 64


def _documents(nums: list[int], seed: int = 0) -> tuple[Documents, np.ndarray, list[int]]:
    """Corpora of so many one-turn documents of 5 to 30 positions, ten a shard."""
    random = np.random.default_rng(seed)
    num = sum(nums)
    turns = np.stack([np.arange(num), np.full(num, 3), random.integers(2, 28, num)], axis=1).astype(np.int32)
    return cut_documents(turns, SEQ_LEN), np.arange(num) // 10, [0, *np.cumsum(nums).tolist()]


def _share(plan, documents: Documents, starts: list[int], rows: slice = slice(None)) -> list[float]:
    """Share of each corpus in the positions of some rows."""
    chosen = np.concatenate([plan.row(row) for row in range(plan.num_rows)[rows]]).astype(int)
    lengths = documents.length[chosen]
    return [float(lengths[(chosen >= a) & (chosen < b)].sum() / lengths.sum()) for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.5], [0.05, 0.95]])
@pytest.mark.parametrize("nums", [[2000, 2000], [3000, 400], [200, 5000]])
def test_share_of_positions_is_the_weights(nums: list[int], weights: list[float]):
    documents, shard, starts = _documents(nums)
    parts = mix_parts(documents, starts, weights)
    for epoch in (0, 3):
        plan = plan_epoch(documents, shard, SEQ_LEN, 0, epoch, parts)
        assert _share(plan, documents, starts) == pytest.approx(weights, abs=0.02)
        quarter = slice(plan.num_rows // 4, plan.num_rows // 2)  # and so is a stretch of it
        assert _share(plan, documents, starts, quarter) == pytest.approx(weights, abs=0.05)
        assert plan.num_positions == documents.length[plan.documents].sum() and plan.useful_share > 0.95


def test_an_epoch_sees_one_corpus_once_and_repeats_the_others_evenly():
    documents, shard, starts = _documents([1000, 90])
    parts = mix_parts(documents, starts, [0.5, 0.5])
    seen: Counter[int] = Counter()
    for epoch in range(4):
        plan = plan_epoch(documents, shard, SEQ_LEN, 0, epoch, parts)
        large = sorted(document for document in plan.documents.tolist() if document < 1000)
        assert large == list(range(1000))
        seen.update(document for document in plan.documents.tolist() if document >= 1000)
    assert len(seen) == 90 and max(seen.values()) - min(seen.values()) <= 1 and min(seen.values()) > 30


def test_a_repeated_corpus_comes_in_another_order_each_pass():
    documents, shard, starts = _documents([1000, 90])
    plan = plan_epoch(documents, shard, SEQ_LEN, 0, 0, mix_parts(documents, starts, [0.5, 0.5]))
    small = [document for document in plan.documents.tolist() if document >= 1000]
    assert small[:90] != small[90:180]


def test_mixed_order_depends_on_seed_and_epoch_alone():
    documents, shard, starts = _documents([300, 90])
    parts = mix_parts(documents, starts, [0.5, 0.5])
    plans = {(seed, epoch): plan_epoch(documents, shard, SEQ_LEN, seed, epoch, parts) for seed in (0, 1) for epoch in (2, 0, 1)}
    for (seed, epoch), plan in plans.items():
        again = plan_epoch(documents, shard, SEQ_LEN, seed, epoch, parts)
        assert np.array_equal(plan.documents, again.documents) and np.array_equal(plan.row_starts, again.row_starts)
    assert len({tuple(plan.documents.tolist()) for plan in plans.values()}) == len(plans)


def test_mixed_order_is_pinned():
    """A checkpoint's place in a mix means something only while this order stays."""
    documents, shard, starts = _documents([6, 3])
    plan = plan_epoch(documents, shard, SEQ_LEN, 0, 0, mix_parts(documents, starts, [0.5, 0.5]))
    assert [plan.row(row) for row in range(plan.num_rows)] == PINNED


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, write_conversations) -> list[str]:
    """Two data folders; in the first only speaker 0 talks, in the second only speaker 1."""
    random = np.random.default_rng(0)
    folders = []
    for speaker, num in enumerate((150, 30)):
        folder = tmp_path_factory.mktemp(f"corpus{speaker}")
        for split in ("train", "validation"):
            talks = [[(speaker, "one two", int(random.integers(3, 20)))] for _ in range(num)]
            write_conversations(folder / split, talks)
        folders.append(str(folder))
    return folders


@pytest.fixture
def make(corpora: list[str], tiny_model_config: ModelConfig, word_tokenizer) -> Callable[..., CSMDataModule]:
    def make(**changes: object) -> CSMDataModule:
        config = DataConfig(kind="shards", path=corpora, seq_len=SEQ_LEN, rows_per_batch=2, max_val_batches=0)
        return CSMDataModule(replace(config, **changes), tiny_model_config, word_tokenizer)

    return make


def test_weights_of_the_configuration_reach_the_batches(make, word_tokenizer):
    module = make(weights=[3.0, 1.0])
    stats = module.stats()
    names = [f"share/{path}" for path in module.data.paths]
    assert [stats[name] for name in names] == pytest.approx([0.75, 0.25], abs=0.03)
    first_speaker = word_tokenizer.encode_turn(0, "one")[1]
    lengths = Counter()
    for batch in module.train_dataloader():
        for row in range(2):
            (first,) = {int(batch.tokens[row][batch.document_ids[row] == i][1, -1]) for i in range(int(batch.document_ids[row].max()) + 1)}
            lengths[first == first_speaker] += int((batch.document_ids[row] >= 0).sum())
    assert lengths[True] / lengths.total() == pytest.approx(0.75, abs=0.04)
    assert "mix: " in "\n".join(module.summary()) and "passes" in "\n".join(module.summary())


def test_without_weights_every_conversation_of_all_folders_comes_once(make, corpora: list[str]):
    keys = Counter(key for batch in make(rows_per_batch=1).train_dataloader() for key in batch.keys)
    assert sum(keys.values()) == 180 and make().stats()["samples"] == 180
    assert make(path=corpora[0]).stats()["samples"] == 150


def test_a_mix_resumes_with_the_next_batch_whatever_the_workers(make):
    expected = []
    module = make(weights=[1.0, 1.0])
    while len(expected) < 90:
        expected += list(module.train_dataloader())
    num_steps = 70
    stopped = make(weights=[1.0, 1.0], num_workers=1)
    seen: list = []
    while len(seen) < num_steps:
        for batch in stopped.train_dataloader():
            seen.append(batch)
            if len(seen) == num_steps:
                break
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.teardown()
    assert state["epoch"] > 0
    assert [batch.keys for batch in seen] == [batch.keys for batch in expected[:num_steps]]
    resumed = make(weights=[1.0, 1.0])
    resumed.load_state_dict(state)
    assert next(iter(resumed.train_dataloader())).keys == expected[num_steps].keys


@pytest.mark.parametrize("weights", [[1.0, 2.0], None])
def test_a_place_in_another_mix_is_refused(make, weights: list[float] | None):
    other = make(weights=weights)
    other.load_state_dict(make(weights=[1.0, 1.0]).state_dict())
    with pytest.raises(ValueError, match="another order: mix"):
        other.train_dataloader()


def test_corpora_of_two_codecs_are_refused_by_name(make, corpora: list[str], tmp_path: Path, write_conversations):
    write_conversations(tmp_path / "train", [[(0, "one", 5)]], digest="e" * 64)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train: shards were made with codec spectral.*eeee.*this run expects.*dddd"):
        make(path=[corpora[0], str(tmp_path)]).setup()


def test_a_corpus_of_a_mix_without_a_usable_conversation_is_refused(make, corpora: list[str], tmp_path: Path, write_conversations):
    for split in ("train", "validation"):
        write_conversations(tmp_path / split, [[(0, "one", SEQ_LEN)]])
    with pytest.raises(ValueError, match="corpus 1 of data.path has no conversation that can be used"):
        make(path=[corpora[0], str(tmp_path)], weights=[1.0, 1.0]).setup()


def test_limits_of_duration_are_counted_and_told(make, corpora: list[str]):
    durations = np.concatenate([_durations(Path(path)) for path in corpora])
    module = make(min_duration_s=0.5, max_duration_s=1.0)
    expected = int(((durations < 0.5) | (durations > 1.0)).sum())
    assert module.stats()["left_out_conversations"] == expected > 0
    assert module.stats()["documents"] == 180 - expected
    assert any(f"{expected} conversations shorter than 0.5 s or longer than 1 s" in line for line in module.summary())
    other = make(min_duration_s=0.5)
    other.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="another order: durations_s"):
        other.train_dataloader()


def test_nothing_within_the_limits_is_refused(make):
    with pytest.raises(ValueError, match="180 shorter or longer than asked.*data.min_duration_s"):
        make(min_duration_s=60.0).setup()


def test_cut_and_left_out_turns_are_told(make, tmp_path: Path, write_conversations):
    talks = [[(0, "one", 20)], [(0, "one", 40), (1, "two", 40)], [(0, "one", 90), (1, "two", 9)]]
    for split in ("train", "validation"):
        write_conversations(tmp_path / split, talks)
    told = "\n".join(make(path=str(tmp_path), rows_per_batch=1).summary())
    assert f"left out: 1 turns longer than a row of {SEQ_LEN}" in told
    assert "cut between turns, to fit rows: 2 conversations" in told


def _durations(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for path in sorted((folder / "train").glob("*.jsonl")) for line in path.open()]
    return np.array([line["duration_s"] for line in lines])


PINNED = [[8, 8, 8, 8, 8, 6, 6, 6], [2, 3, 5], [6, 6, 7, 7, 7, 7, 7], [0, 1, 4]]
