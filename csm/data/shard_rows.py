"""Packed rows of conversations: what shards hold becomes what a model eats."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from csm.config import DataConfig, ModelConfig
from csm.data.bad_samples import BadSamples
from csm.data.corpora import Corpus
from csm.data.epochs import EpochPlan, Part, mix_parts, plan_epoch
from csm.data.lengths import measure_turns, tokenizer_digest
from csm.data.packing import Documents, cut_documents
from csm.data.row_cache import RowCache
from csm.data.rows import Bad, empty_batch
from csm.data.shards import Sample, ShardReader
from csm.data.styles import StyleTags
from csm.frames import Batch, Rows, Turn, rows_from_turns
from csm.text import TextTokenizer

MAX_LOOKED_AT = 1_000  # conversations, spread evenly, that a speaker asked for is looked for in before anything is learnt
CACHE_BYTES = 2**30  # a split whose rows fit in this, all workers together, is decoded once and kept in memory

_log = logging.getLogger(__name__)


class ShardRows:
    """Packed rows of conversations read from shards.

    Args:
        reader: the split; its folders are those of `corpora`, in order.
        corpora: what the folders belong to, and how they are weighed.
        copies: processes that will each hold a cache of their own.

    Attributes:
        documents: what is laid into rows.
        parts: how often each corpus is visited in an epoch; empty when every document comes once.
        num_outside: conversations left out because they are shorter than data.min_duration_s or longer than data.max_duration_s.
    Raises:
        ValueError: too many bad samples, no document that fits a row, or nobody there of the speakers that alone are to be learnt.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: TextTokenizer,
        data: DataConfig,
        model: ModelConfig,
        corpora: Sequence[Corpus],
        copies: int = 1,
    ) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.seq_len, self.num_codebooks, self.audio_vocab_size = data.seq_len, model.num_codebooks, model.audio_vocab_size
        self.learn_speakers = data.learn_speakers
        self.learn_depth_speakers = data.learn_speakers if data.learn_depth_speakers is None else data.learn_depth_speakers
        self.bad = BadSamples(len(reader), data.max_bad_share, reader.name_of)
        self.tags = StyleTags(data.tag_dropout) if data.tag_styles else None
        turns = measure_turns(reader, tokenizer, self.bad, self.tags)
        is_outside = reader.duration_s < data.min_duration_s
        if data.max_duration_s:
            is_outside |= reader.duration_s > data.max_duration_s
        self.num_outside = int(is_outside.sum())
        self.documents: Documents = cut_documents(turns[~is_outside[turns[:, 0]]], data.seq_len)
        folders = ", ".join(str(index.folder) for index in reader.indexes)
        if not len(self.documents):
            raise ValueError(
                f"{folders}: none of {len(reader)} samples can be used: {len(self.bad.reasons)} are bad, {self.num_outside} shorter or "
                f"longer than asked, {self.documents.num_too_long} turns longer than a row; raise data.seq_len={data.seq_len}, or change "
                "data.min_duration_s and data.max_duration_s"
            )
        self._find_speakers({"learn_speakers": data.learn_speakers, "learn_depth_speakers": data.learn_depth_speakers or []}, folders)
        self.fingerprint: dict[str, object] = {
            "index": "+".join(index.digest[:16] for index in reader.indexes),
            "tokenizer": tokenizer_digest(tokenizer),
            "seq_len": data.seq_len,
            "num_documents": len(self.documents),
        }
        if self.num_outside:
            self.fingerprint["durations_s"] = [data.min_duration_s, data.max_duration_s]
        if self.tags is not None:
            self.fingerprint["tag_dropout"] = data.tag_dropout
        self.corpora = list(corpora)
        self.corpus_starts = self._corpus_starts()
        self.parts: list[Part] = []
        weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
        if weights:
            self.parts = mix_parts(self.documents, self.corpus_starts, weights)
            self.fingerprint["mix"] = [[len(corpus.folders), corpus.weight] for corpus in corpora]
        self._cache = RowCache.for_documents(self.documents, model, CACHE_BYTES // copies)

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        return plan_epoch(self.documents, self.reader.shard, self.seq_len, seed, epoch, self.parts)

    def build(self, rows: Sequence[list[int]]) -> tuple[Batch, Bad]:
        samples = {document: int(self.documents.sample[document]) for row in rows for document in row}
        read = self._read(samples)
        packed: list[list[Rows]] = []
        keys: list[str] = []
        bad: Bad = []
        for row in rows:
            packed.append([])
            for document in row:
                sample_index = samples[document]
                if sample_index in self.bad.reasons:
                    continue
                try:
                    packed[-1].append(self._document(document, sample_index, read))
                    keys.append(self.reader.keys[sample_index])
                except ValueError as error:
                    bad.append((sample_index, str(error)))
        if not any(packed):
            return empty_batch(len(rows), self.seq_len, self.num_codebooks), bad
        return Batch.from_documents(packed, self.seq_len, keys), bad

    def _find_speakers(self, wanted: dict[str, list[int | str]], folders: str) -> None:
        """Refuse speakers of whom no conversation has a turn: nothing would be learnt. Where not all are looked at, warn."""
        if not any(wanted.values()):
            return
        looked_at = self.reader.spread(MAX_LOOKED_AT)
        metas = [meta for meta in self.reader.read_metas(looked_at) if isinstance(meta, dict)]
        there = {
            name for meta in metas for turn in meta["turns"] for name in (turn["speaker"], turn.get("speaker_name")) if name is not None
        }
        some = sorted(there, key=lambda name: (isinstance(name, str), name))
        listed = ", ".join(map(repr, some[:10])) + (f" and {len(some) - 10} more" if len(some) > 10 else "")
        num_others = len(self.reader) - len(looked_at)
        for key, speakers in wanted.items():
            if not speakers or not metas or not there.isdisjoint(speakers):
                continue
            found = f"data.{key}={list(speakers)}: in {folders} no turn of {len(looked_at)} conversations is theirs; those have {listed}"
            if not num_others:
                raise ValueError(f"{found}; name one of these, or leave the key out to learn every turn")
            _log.warning("%s. Of %d others it is not known; where none has them, nothing is learnt.", found, num_others)

    def _turns(self, sample: Sample) -> list[Turn]:
        """The turns with their tags, those of speakers that are not to be learnt switched off: they are heard as context."""
        if not self.learn_speakers and not self.learn_depth_speakers and self.tags is None:
            return list(sample.turns)
        return [
            replace(
                turn,
                text=turn.text if self.tags is None else self.tags.text(meta, sample.key, index),
                learn_c0=turn.learn_c0 and _is_named(self.learn_speakers, turn, meta),
                learn_depth=turn.learn_depth and _is_named(self.learn_depth_speakers, turn, meta),
            )
            for index, (turn, meta) in enumerate(zip(sample.turns, sample.meta["turns"], strict=True))
        ]

    def _corpus_starts(self) -> list[int]:
        """[num_corpora + 1]: the documents [i, i + 1) of it are corpus i's."""
        num_samples = [0]
        indexes = iter(self.reader.indexes)
        for corpus in self.corpora:
            num_samples.append(num_samples[-1] + sum(next(indexes).num_samples for _ in corpus.folders))
        return np.searchsorted(self.documents.sample, num_samples).tolist()

    def _read(self, samples: dict[int, int]) -> dict[int, Sample | ValueError]:
        """The conversations of documents that are not in the cache, by sample."""
        wanted = [sample for document, sample in samples.items() if self._cache is None or document not in self._cache]
        wanted = [sample for sample in dict.fromkeys(wanted) if sample not in self.bad.reasons]
        return dict(zip(wanted, self.reader.read_many(wanted), strict=True))

    def _document(self, document: int, sample_index: int, read: dict[int, Sample | ValueError]) -> Rows:
        if self._cache is not None and document in self._cache:
            return self._cache.get(document)
        sample = read[sample_index]
        if isinstance(sample, ValueError):
            raise sample
        turns = self._turns(sample)[self.documents.first_turn[document] : self.documents.last_turn[document]]
        key = self.reader.keys[sample_index]
        try:
            rows = rows_from_turns(turns, self.tokenizer, self.num_codebooks)
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from error
        smallest, largest = (int(code) for code in rows.tokens[:, :-1].aminmax())
        if smallest < 0 or largest >= self.audio_vocab_size:
            raise ValueError(
                f"sample {key}: codes from {smallest} to {largest}, the model takes 0 to {self.audio_vocab_size - 1}; "
                "set model.audio_vocab_size to the codec's"
            )
        if len(rows) != self.documents.length[document]:
            raise ValueError(f"sample {key}: {len(rows)} positions, not {self.documents.length[document]}; remove the old lengths-*.npy")
        if self._cache is not None:
            self._cache.put(document, rows)
        return rows


def _is_named(speakers: Sequence[int | str], turn: Turn, meta: dict) -> bool:
    """Whether a turn's speaker is among them, by number or by name; no names mean everybody."""
    return not speakers or turn.speaker in speakers or meta.get("speaker_name") in speakers
