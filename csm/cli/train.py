"""The recipe of a training run: data, model, callbacks, Trainer, summary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm.cli.base import open_base
from csm.cli.hydra_entry import main as hydra_main
from csm.cli.run_parts import build_missing_demo_data, build_model, build_speaker, build_transcriber, find_codec, load_run_tokenizer
from csm.config import TrainConfig

if TYPE_CHECKING:  # torch and Lightning take seconds to import; --help and a typo are answered without them
    from rich.console import Console

    from csm.model.csm import CSM
    from csm.text import TextTokenizer
    from csm.training.module import CSMModule
    from csm.training.stop_request import StopRequest

_ABOUT = (
    "Train a CSM. Without arguments: build the offline corpus if it is missing, and learn to speak digits on a CPU. "
    "The run lands in runs/<experiment_name>/<date_time>."
)
_EXAMPLES = (
    "train.py",
    "train.py data=shards data.path=/data/speech model=csm_1b trainer=ddp trainer.devices=8 trainer.precision=bf16-mixed",
    "train.py model=csm_1b data=random trainer.max_steps=2 trainer.precision=bf16-true",
    "train.py run_dir=runs/demo/mine resume=auto optim.lr=1e-4",
)


def main() -> None:
    """`python train.py`."""
    hydra_main("train", TrainConfig, _train_until_done_or_told, about=_ABOUT, examples=_EXAMPLES)


def _train_until_done_or_told(config: TrainConfig) -> float | None:
    """Train, leave with the exit status that `csm.training.stop_request` explains, and tell a sweep how good it became."""
    from csm.training.run_folder import lowest_validation_loss
    from csm.training.stop_request import StopRequest

    with StopRequest() as request:
        run_dir = train(config, request)
        if request.answered:
            from csm.training.signals import answer

            sys.exit(answer(request, partial(print, flush=True)))
    return lowest_validation_loss(run_dir)


def train(config: TrainConfig, request: StopRequest | None = None) -> Path:
    """Run training as configured, or until `request` is made, and return the run folder.

    Raises:
        ValueError, FileNotFoundError: for input that cannot be used; one line that says what to do.
    """
    from rich.console import Console

    from csm.data.datamodule import CSMDataModule
    from csm.model.checkpoint_folder import checkpoint_step, remove_leftovers, set_aside_newer
    from csm.training import run_folder
    from csm.training.background import BackgroundWriter
    from csm.training.callbacks import Clock, DataPosition, EarlyStop, Validation
    from csm.training.checkpoint import FolderCheckpointIO
    from csm.training.device import settle_precision
    from csm.training.loggers import build_loggers
    from csm.training.metrics import Metrics
    from csm.training.module import CSMModule
    from csm.training.progress import ProgressLine
    from csm.training.samples import SpokenSamples
    from csm.training.saving import Checkpoints, finish_save
    from csm.training.signals import StopOnSignal
    from csm.training.steps import StepLoader
    from csm.training.stop_request import is_first_process
    from csm.training.trainer import build_trainer, set_up_torch

    console = Console(quiet=not is_first_process())
    say = _say_on(console)
    config = settle_precision(config, say)
    set_up_torch(config)
    run_dir = run_folder.choose_run_dir(config)
    resume_from = run_folder.find_resume_point(config, run_dir, say)
    if resume_from is not None and checkpoint_step(resume_from) >= config.trainer.max_steps:
        if is_first_process() and config.resume == "auto":
            finish_save(resume_from)
        say(f"{run_dir} is already at step {checkpoint_step(resume_from)} of {config.trainer.max_steps}; raise trainer.max_steps to go on")
        return run_dir

    build_missing_demo_data(config)
    base = open_base(config.base, config.text.added) if config.base is not None else None
    if base is not None:
        config, codec_folder, codec_digest = base.configure(config), base.codec_folder, base.codec_digest
        tokenizer: TextTokenizer | None = base.tokenizer
    else:
        tokenizer = load_run_tokenizer(config)
        codec_folder, codec_digest = find_codec(config)
    data = CSMDataModule(
        config.data,
        config.model,
        tokenizer,
        codec_digest,
        config.seed,
        config.trainer.accumulate,
        codec_name=config.codec.name,
        has_validation=config.trainer.validate_every > 0,
    )
    data.prepare_data()
    data.setup()

    model = build_model(config, base)
    module = CSMModule(model, config)
    if base is not None and config.adapter.kind != "none":
        module.base_digest = base.weights_digest()
    clock = Clock()
    validation = Validation(data.val_dataloader, config, clock)
    metrics = Metrics(run_dir, config, validation, clock, config.model.num_codebooks, lambda: data.num_bad_samples)
    callbacks: list[Any] = [DataPosition(data), validation]
    if config.trainer.sample_every:
        speak = build_speaker(config, tokenizer, codec_folder)
        callbacks.append(SpokenSamples(run_dir, config, speak, clock, build_transcriber(config)))
    callbacks.append(metrics)  # behind the samples: it closes the row of the step
    early_stop = EarlyStop(validation, config)
    if config.trainer.patience:
        callbacks.append(early_stop)  # before the checkpoints, which keep its count
    writer = BackgroundWriter(config.trainer.async_checkpoint)
    checkpoints = Checkpoints(run_dir, config, validation, clock, writer)
    callbacks += [checkpoints, ProgressLine(config, metrics, validation, console), StopOnSignal(request)]
    loggers = build_loggers(config.logger, run_dir, config)
    trainer = build_trainer(
        config,
        run_dir,
        callbacks=callbacks,
        loggers=loggers,
        checkpoint_io=FolderCheckpointIO(model, tokenizer, codec_folder, writer, config.adapter, config.base),
    )
    data.trainer = trainer  # for its rank and the number of ranks
    steps = StepLoader(
        data.train_dataloader(),
        accumulate=config.trainer.accumulate,
        amortization=config.loss.amortization,
        num_steps=lambda: config.trainer.max_steps - module.step,
    )
    if trainer.is_global_zero:
        run_folder.write_run_files(run_dir, config, {config.data.train_split: data.index_digest()}, say)
        run_folder.publish_run_dir(run_dir)
        remove_leftovers(run_dir / "checkpoints", say)
        if resume_from is not None and config.resume != "auto":
            set_aside_newer(run_dir / "checkpoints", checkpoint_step(resume_from), say)
    data.keep_bad_samples_in(run_dir)
    say(f"{'resuming ' + str(resume_from) if resume_from else 'run folder ' + str(run_dir)}  ({_in_words(config, model)})")
    for line in data.summary():
        say(line)
    trainer.fit(module, train_dataloaders=steps, ckpt_path=resume_from)
    data.teardown()
    if trainer.is_global_zero:
        records = [logger.where for logger in loggers]
        is_done = module.step >= config.trainer.max_steps or early_stop.stopped_at is not None
        _summarise(console, config, run_dir, module, metrics.row, validation.latest, clock.elapsed_s, records, is_done=is_done)
    return run_dir


def _say_on(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)


def _in_words(config: TrainConfig, model: CSM) -> str:
    settings = config.trainer
    rows = config.data.rows_per_batch * settings.accumulate * settings.devices * settings.num_nodes
    step = f"{rows} rows of {config.data.seq_len} a step"
    return f"{model.num_parameters / 1e6:,.1f}M parameters, {step}, {settings.max_steps} steps, precision {settings.precision}"


def _summarise(
    console: Console,
    config: TrainConfig,
    run_dir: Path,
    module: CSMModule,
    row: dict[str, float],
    validation: dict[str, float],
    elapsed_s: float,
    records: list[str],
    *,
    is_done: bool,
) -> None:
    from csm.training.progress import duration, print_summary

    checkpoints = run_dir / "checkpoints"
    best = (checkpoints / "best.txt").read_text(encoding="utf-8").strip()
    lines = [("steps", f"{module.step} of {config.trainer.max_steps} in {duration(elapsed_s)}")]
    lines.append(("audio heard", f"{row.get('hours_heard', 0.0):.2f} h at {row.get('frames_per_s', 0.0):,.0f} frames/s"))
    if module.num_skipped:
        lines.append(("steps skipped", f"{module.num_skipped}, not finite or spikes"))
    if row.get("bad_samples"):
        lines.append(("bad samples", f"{row['bad_samples']:,}, left out"))
    if "train/loss" in row:
        lines.append(("training loss", f"{row['train/loss']:.3f} (c0 {row['train/c0']:.3f}, depth {row['train/depth']:.3f})"))
    if validation:
        lines.append(
            ("validation loss", f"{validation['val/loss']:.3f} (c0 {validation['val/c0']:.3f}, depth {validation['val/depth']:.3f})")
        )
    lines += [("run folder", str(run_dir)), ("best checkpoint", str(checkpoints / best))]
    if config.logger.name != "none":
        lines.append(("metrics", f"{run_dir / 'metrics.csv'}, speed in timings.csv"))
    lines += [("W&B", where) for where in records]
    if config.trainer.sample_every and config.trainer.sample_texts:
        lines.append(("spoken samples", str(run_dir / "samples" / "index.html")))
    if not is_done:
        lines.append(("go on", f"python train.py <the same overrides> run_dir={run_dir} resume=auto"))
    elif config.data.kind != "random":
        lines.append(("next", f"python evaluate.py run={run_dir}"))
    print_summary(console, lines)
