"""The LightningDataModule: opens what the configuration names, checks it against the model, and hands out loaders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningDataModule

from csm.config import DataConfig, ModelConfig
from csm.data.bad_samples import BadSamples
from csm.data.corpora import Corpus, find_corpora
from csm.data.epochs import EpochPlan
from csm.data.lengths import measure_turns
from csm.data.loader import TrainLoader, ValidationLoader
from csm.data.random_rows import NUM_RANDOM_VALIDATION_ROWS, RandomRows
from csm.data.rows import RowSource
from csm.data.shard_rows import ShardRows
from csm.data.shards import ShardReader
from csm.data.storage import is_url
from csm.data.styles import StyleTags
from csm.text import TextTokenizer

QUARANTINE_NAME = "quarantine.jsonl"


class CSMDataModule(LightningDataModule):
    """Packed batches (`csm.frames.Batch`) for training and validation.

    Works without a Trainer too: `setup()`, then the loaders.

    Args:
        tokenizer: reads the turns' text; None only for data.kind=random.
        codec_digest: of the codec the model is to speak with; shards made with another are refused. None: not compared.
        seed: of the order of training rows.
        accumulate: micro-batches of one optimizer step.
        rank, world_size: None takes the Trainer's, or one process without a Trainer.
        codec_name: for the message about a wrong codec.
        has_validation: False looks for no validation split, and there is no `val_dataloader`.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: TextTokenizer | None = None,
        codec_digest: str | None = None,
        seed: int = 0,
        accumulate: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        codec_name: str | None = None,
        has_validation: bool = True,
    ) -> None:
        super().__init__()
        if tokenizer is None and data.kind != "random":
            raise ValueError(f"data.kind={data.kind} needs a tokenizer; only random rows go without")
        if tokenizer is not None and tokenizer.vocab_size > model.text_vocab_size:
            raise ValueError(
                f"model.text_vocab_size={model.text_vocab_size}: the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} ids; "
                f"set model.text_vocab_size={tokenizer.vocab_size} or more"
            )
        self.data, self.model, self.tokenizer = data, model, tokenizer
        self.codec_digest, self.codec_name, self.has_validation = codec_digest, codec_name, has_validation
        self.seed, self.accumulate = seed, accumulate
        self._rank, self._world_size = rank, world_size
        self._readers: dict[str, tuple[ShardReader, list[Corpus]]] = {}
        self._train: RowSource | None = None
        self._validation: RowSource | None = None
        self._loader: TrainLoader | None = None
        self._resume_from: dict | None = None

    def prepare_data(self) -> None:
        """Check the shards and measure the turns, on one process a node; the others find the lengths beside the shards."""
        if self.data.kind == "random":
            return
        for split in (self.data.train_split, self.data.val_split) if self.has_validation else (self.data.train_split,):
            reader, _ = self._open(split)
            tags = StyleTags(self.data.tag_dropout) if self.data.tag_styles else None
            measure_turns(reader, self._tokenizer(), BadSamples(len(reader), self.data.max_bad_share, reader.name_of), tags)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits; doing it again changes nothing."""
        if self._train is not None:
            return
        if self.data.kind == "random":
            self._train = RandomRows(self.data, self.model)
            self._validation = RandomRows(self.data, self.model, NUM_RANDOM_VALIDATION_ROWS, is_validation=True)
            return
        copies = max(1, self.data.num_workers)
        reader, corpora = self._open(self.data.train_split)
        train = ShardRows(reader, self._tokenizer(), self.data, self.model, corpora, copies)
        if self.has_validation:
            reader, corpora = self._open(self.data.val_split)
            self._validation = ShardRows(reader, self._tokenizer(), self.data, self.model, corpora)
        self._train = train

    def keep_bad_samples_in(self, run_dir: Path) -> None:
        """Name every sample that cannot be used in `<run_dir>/quarantine.jsonl`; each rank in a file of its own."""
        self.setup()
        rank, _ = self._place()
        name = QUARANTINE_NAME if rank == 0 else f"quarantine-rank{rank:05d}.jsonl"
        for source in (self._train, self._validation):
            if source is not None and source.bad is not None:
                source.bad.keep_in(run_dir / name)

    @property
    def num_bad_samples(self) -> int:
        """Samples of the training split that this process could not use so far, those of shards left out whole included."""
        return len(self._train.bad.reasons) if self._train is not None and self._train.bad is not None else 0

    def train_dataloader(self) -> TrainLoader:
        """Micro-batches of this rank; the same loader each time, so that it keeps its position."""
        if self._loader is None:
            self.setup()
            assert self._train is not None
            rank, world_size = self._place()
            self._loader = TrainLoader(
                self._train,
                seed=self.seed,
                rows_per_batch=self.data.rows_per_batch,
                accumulate=self.accumulate,
                rank=rank,
                world_size=world_size,
                num_workers=self.data.num_workers,
            )
            if self._resume_from is not None:
                self._resume(self._resume_from)
        return self._loader

    def val_dataloader(self) -> ValidationLoader:
        """The first `data.max_val_batches` batches of a fixed order (over all ranks together), or all."""
        self.setup()
        assert self._validation is not None
        rank, world_size = self._place()
        return ValidationLoader(
            self._validation,
            rows_per_batch=self.data.rows_per_batch,
            max_batches=self.data.max_val_batches,
            rank=rank,
            world_size=world_size,
        )

    def state_dict(self) -> dict[str, object]:
        """Where training is in the data: {epoch, batch, seed, fingerprint}; `batch` counts optimizer steps of the epoch."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on from there.

        Raises:
            ValueError: the position belongs to other data, another seed or other packing.
        """
        self._resume_from = state_dict
        if self._loader is not None:
            self._resume(state_dict)

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers."""
        if self._loader is not None:
            self._loader.close()

    def index_digest(self) -> str:
        """Names the training data: the digest of its shard index, or "random"."""
        self.setup()
        assert self._train is not None
        return str(self._train.fingerprint["index"])

    def stats(self) -> dict[str, float]:
        """Counts of the training split and of its first epoch, for logs and reports."""
        loader = self.train_dataloader()
        plan = loader.plan(0)
        num_steps = loader.steps_of(0)
        stats: dict[str, float] = {
            "rows_per_epoch": plan.num_rows,
            "steps_per_epoch": num_steps,
            "left_out_rows": plan.num_rows - num_steps * loader.rows_per_step,
        }
        if isinstance(self._train, ShardRows) and isinstance(plan, EpochPlan):
            rows, reader, documents = self._train, self._train.reader, self._train.documents
            stats |= {
                "samples": len(reader),
                "hours": float(reader.duration_s.sum()) / 3600,
                "frames": int(reader.num_frames.sum()),
                "documents": len(documents),
                "positions": documents.num_positions,
                "useful_share": plan.useful_share,
                "cut_conversations": documents.num_cut,
                "left_out_turns": documents.num_too_long,
                "left_out_conversations": rows.num_outside,
                "bad_samples": len(rows.bad.reasons),
            }
            for corpus, first, last in zip(rows.corpora, rows.corpus_starts, rows.corpus_starts[1:], strict=False):
                visited = plan.documents[(plan.documents >= first) & (plan.documents < last)]
                stats[f"documents/{corpus.name}"] = last - first
                stats[f"passes/{corpus.name}"] = len(visited) / max(1, last - first)
                stats[f"share/{corpus.name}"] = float(documents.length[visited].sum()) / plan.num_positions
        return stats

    def summary(self) -> list[str]:
        """What training reads, and what it leaves out, in lines for a reader."""
        stats = self.stats()
        told = f"{stats['rows_per_epoch']:,} rows of {self.data.seq_len} an epoch, {stats['steps_per_epoch']:,} steps"
        if not isinstance(self._train, ShardRows):
            return [f"data: made-up rows, {told}"]
        lines = [
            f"data: {stats['samples']:,} conversations, {stats['hours']:,.1f} h; {told}; {stats['useful_share']:.1%} of positions useful"
        ]
        if len(self._train.corpora) > 1:
            names = [corpus.name for corpus in self._train.corpora]
            lines.append(
                "mix: " + "; ".join(f"{name} {stats[f'share/{name}']:.1%}, {stats[f'passes/{name}']:.3g} passes" for name in names)
            )
        limits = f"shorter than {self.data.min_duration_s:g} s or longer than {self.data.max_duration_s:g} s"
        counts = [
            (stats["bad_samples"], "bad samples"),
            (stats["left_out_conversations"], f"conversations {limits}"),
            (stats["left_out_turns"], f"turns longer than a row of {self.data.seq_len}"),
            (stats["left_out_rows"], "rows that fill no step"),
        ]
        told_counts = [f"{count:,} {what}" for count, what in counts if count]
        if told_counts:
            lines.append("left out: " + "; ".join(told_counts))
        if stats["cut_conversations"]:
            lines.append(f"cut between turns, to fit rows: {stats['cut_conversations']:,} conversations")
        return lines

    def _resume(self, state: dict) -> None:
        assert self._loader is not None
        self._loader.load_state_dict(state)
        if isinstance(self._train, ShardRows):
            self._train.bad.resume((state["epoch"], state["batch"]), self._train.reader.find)

    def _open(self, split: str) -> tuple[ShardReader, list[Corpus]]:
        """The reader of a split whose codec is the model's, and what its folders belong to."""
        if split not in self._readers:
            is_training = split == self.data.train_split
            data = self.data if is_training or self.data.val_path is None else replace(self.data, path=self.data.val_path, weights=None)
            corpora = find_corpora(data, split, is_weighted=is_training)
            places = [folder for corpus in corpora for folder in corpus.folders]
            remote = [str(place) for place in places if is_url(place)]
            if remote and self.data.verify == "digest" and self.data.cache_dir is None:
                raise ValueError(
                    f"{remote[0]}: shards behind URLs are compared with their digests when they are copied; set data.cache_dir=<local "
                    "folder>, or data.verify=size to read them by ranges"
                )
            is_compared = self.data.verify == "digest"
            try:
                reader = ShardReader(places, keep_faults=True, compare_digests=is_compared, cache_dir=self.data.cache_dir)
            except FileNotFoundError as error:
                if split != self.data.val_split:
                    raise
                raise FileNotFoundError(f"{error}; or set data.val_split to a split that is there, or trainer.validate_every=0") from error
            for index in reader.indexes:
                index.check_codec(num_codebooks=self.model.num_codebooks, digest=self.codec_digest, name=self.codec_name)
            self._readers[split] = reader, corpora
        return self._readers[split]

    def _tokenizer(self) -> TextTokenizer:
        assert self.tokenizer is not None
        return self.tokenizer

    def _place(self) -> tuple[int, int]:
        """(rank, world size)."""
        trainer = self.trainer
        rank = self._rank if self._rank is not None else trainer.global_rank if trainer is not None else 0
        world_size = self._world_size if self._world_size is not None else trainer.world_size if trainer is not None else 1
        return rank, world_size
