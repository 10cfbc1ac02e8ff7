"""Packing: every document once, nothing cut that fits, and an order that (seed, epoch) decides alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from csm.data import epochs, packing, storage
from csm.data.bad_samples import BadSamples
from csm.data.epochs import plan_epoch
from csm.data.lengths import measure_turns
from csm.data.packing import BAD, cut_documents, pack_best_fit
from csm.data.shards import ShardReader


def _turns(*conversations: list[int]) -> np.ndarray:
    """A lengths table in which every turn has 3 text ids and the rest audio."""
    return np.array([(sample, 3, length - 3) for sample, turns in enumerate(conversations) for length in turns], dtype=np.int32)


def _pieces(documents: packing.Documents) -> list[tuple[int, int, int, int]]:
    columns = (documents.sample, documents.first_turn, documents.last_turn, documents.length)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_conversations_that_fit_stay_whole():
    documents = cut_documents(_turns([40, 50], [100], [10, 10, 10]), seq_len=100)
    assert _pieces(documents) == [(0, 0, 2, 90), (1, 0, 1, 100), (2, 0, 3, 30)]
    assert (documents.num_cut, documents.num_too_long) == (0, 0)


def test_long_conversation_is_cut_at_turn_boundaries():
    documents = cut_documents(_turns([40, 50, 20, 80], [5]), seq_len=100)
    assert _pieces(documents) == [(0, 0, 2, 90), (0, 2, 4, 100), (1, 0, 1, 5)]
    assert (documents.num_cut, documents.num_too_long) == (1, 0)


def test_turn_longer_than_a_row_is_left_out_and_counted():
    documents = cut_documents(_turns([40, 101, 20, 20], [102]), seq_len=100)
    assert _pieces(documents) == [(0, 0, 1, 40), (0, 2, 4, 40)]
    assert documents.num_too_long == 2


def test_bad_sample_gives_no_document():
    turns = np.array([(0, 3, 7), (1, BAD, BAD), (2, 3, 7)], dtype=np.int32)
    assert cut_documents(turns, 100).sample.tolist() == [0, 2]
    assert len(cut_documents(turns[1:2], 100)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_document_once_and_never_overflow(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 65, 500)
    rows = pack_best_fit(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 64


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(20, 129, 5000)  # turns and short conversations in rows of 256
    assert lengths.sum() / (len(pack_best_fit(lengths, 256)) * 256) > 0.98


def test_documents_of_a_rows_length_fill_rows_alone():
    assert pack_best_fit(np.array([8, 8, 8]), 8) == [[0], [1], [2]]
    assert pack_best_fit(np.array([5, 8, 3]), 8) == [[1], [0, 2]]


@pytest.fixture
def corpus() -> tuple[packing.Documents, np.ndarray]:
    random = np.random.default_rng(1)
    turns = _turns(*(random.integers(5, 30, random.integers(1, 4)).tolist() for _ in range(300)))
    return cut_documents(turns, 64), np.repeat(np.arange(6), 50)


def test_plan_depends_on_seed_and_epoch_alone(corpus):
    documents, shard = corpus
    plans = {(seed, epoch): plan_epoch(documents, shard, 64, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)}
    for (seed, epoch), plan in plans.items():
        again = plan_epoch(documents, shard, 64, seed, epoch)
        assert np.array_equal(plan.documents, again.documents) and np.array_equal(plan.row_starts, again.row_starts)
        assert sorted(plan.documents.tolist()) == list(range(len(documents)))
        assert plan.useful_share == documents.num_positions / (plan.num_rows * 64) > 0.9
    assert len({tuple(plan.documents.tolist()) for plan in plans.values()}) == len(plans)


def test_order_is_pinned():
    """A checkpoint's place in the data means something only while this order stays: change it and old runs cannot resume."""
    plan = plan_epoch(cut_documents(_turns(*[[4 + i % 5] for i in range(8)]), 16), np.repeat([0, 1], 4), 16, seed=0, epoch=0)
    assert [plan.row(row) for row in range(plan.num_rows)] == PINNED_ROWS


def test_groups_hold_whole_shards(corpus, monkeypatch: pytest.MonkeyPatch):
    documents, shard = corpus
    monkeypatch.setattr(epochs, "GROUP_DOCUMENTS", 90)
    plan = plan_epoch(documents, shard, 64, 0, 0)
    assert sorted(plan.documents.tolist()) == list(range(len(documents)))
    order = shard[documents.sample[plan.documents]]
    sizes = np.bincount(shard[documents.sample], minlength=6)
    first_group = set(order[:60].tolist())
    assert len(first_group) == 2  # two shards of about 50 documents reach the size of a group
    assert set(order[: sum(sizes[s] for s in first_group)].tolist()) == first_group
    assert [plan_epoch(documents, shard, 64, 0, e).documents[0] for e in range(3)] != [plan.documents[0]] * 3


def test_lengths_are_the_rows_and_are_kept(tmp_path: Path, write_conversations, word_tokenizer):
    from csm.frames import rows_from_turns

    reader = ShardReader(write_conversations(tmp_path / "train", [[(0, "one two", 3), (1, "three", 4)], [(2, "six", 9)]]))
    bad = BadSamples(2, 0.0)
    turns = measure_turns(reader, word_tokenizer, bad)
    expected = [len(rows_from_turns(reader.read(i).turns, word_tokenizer, 4)) for i in range(2)]
    assert np.bincount(turns[:, 0], weights=turns[:, 1:].sum(axis=1)).tolist() == expected
    (kept,) = (tmp_path / "train").glob("lengths-*")
    assert np.array_equal(np.load(kept), turns)
    kept.write_bytes(b"torn")
    assert np.array_equal(measure_turns(reader, word_tokenizer, bad), turns)


def test_another_tokenizer_measures_anew(tmp_path: Path, write_conversations, word_tokenizer):
    from csm.text import ByteTokenizer

    reader = ShardReader(write_conversations(tmp_path / "train", [[(0, "one two", 3)]]))
    bad = BadSamples(1, 0.0)
    assert measure_turns(reader, word_tokenizer, bad).tolist() == [[0, 5, 4]]
    assert measure_turns(reader, ByteTokenizer(), bad).tolist() == [[0, 12, 4]]


def test_lengths_do_not_need_a_folder_that_can_be_written(tmp_path: Path, write_conversations, word_tokenizer, monkeypatch):
    reader = ShardReader(write_conversations(tmp_path / "train", [[(0, "one two", 3)]]))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(storage.os, "replace", refuse)
    assert measure_turns(reader, word_tokenizer, BadSamples(1, 0.0)).tolist() == [[0, 5, 4]]
    assert not list((tmp_path / "train").glob("lengths-*"))


def test_unknown_words_are_bad_samples_now_and_from_the_kept_lengths(tmp_path: Path, write_conversations, word_tokenizer):
    reader = ShardReader(write_conversations(tmp_path / "train", [[(0, "one", 3)], [(0, "hello", 3)], [(0, "two", 3)]]))
    for _ in range(2):
        bad = BadSamples(3, 0.5)
        assert measure_turns(reader, word_tokenizer, bad).tolist() == [[0, 4, 4], [1, BAD, BAD], [2, 4, 4]]
        assert list(bad.reasons) == [1]
    with pytest.raises(ValueError, match="1 of 3 samples are bad"):
        measure_turns(reader, word_tokenizer, BadSamples(3, 0.1))


PINNED_ROWS = [[6, 1, 5], [7, 2, 0], [4, 3]]
