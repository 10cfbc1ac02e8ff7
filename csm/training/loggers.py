"""Where metrics go besides metrics.csv: a Weights & Biases record that a resumed run goes on with.

Of the surroundings W&B is told nothing (no host, program, command line, repository, packages): environment.json has what a
reader needs, and a command line may hold a key. What it stores without a network lies under the run folder.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from csm.config import LoggerConfig, TrainConfig
from csm.redaction import without_secrets
from csm.training.run_folder import run_id

_STAGING_VARIABLE = "WANDB_DATA_DIR"
_FINISH_TIMEOUT_S = 300.0  # a network that is gone must not hold a job's GPUs; `wandb sync` sends what is left


@dataclass
class SpokenSample:
    """One clip of `trainer.sample_texts`, on disk.

    Attributes:
        heard: what a recogniser heard; None when nobody asked one.
    """

    step: int
    speaker: int
    text: str
    audio: Path
    spectrogram: Path
    heard: str | None = None


def build_loggers(config: LoggerConfig, run_dir: Path, run_config: TrainConfig) -> list[WandbRecord]:
    """Loggers besides metrics.csv; none for logger.mode=disabled, which leaves nothing on disk.

    Raises:
        ValueError: if W&B is to be online and nobody is logged in, or it cannot be reached.
    """
    if config.name != "wandb" or config.mode == "disabled":
        return []
    import wandb

    if config.mode == "online":
        try:
            is_logged_in = wandb.login(prompt=False)  # False: no credentials anywhere; asks nobody
        except wandb.Error as error:  # it asks the server about the key
            raise _unreachable(error) from error
        if not is_logged_in:
            raise ValueError("logger=wandb: not logged in; run `wandb login`, or set logger.mode=offline, or logger=csv")
    return [WandbRecord(config, run_dir, run_config)]


class WandbRecord(Logger):
    """The run's record, on rank 0. Its id is the run folder's, so that a resumed run goes on in its own record.

    Every step stands there once: what a killed run had sent already is not sent again, and rows of metrics.csv that died
    with it before they were sent are sent when the run goes on.

    Attributes:
        where: what a reader opens, or types, to see the record.
    """

    def __init__(self, config: LoggerConfig, run_dir: Path, run_config: TrainConfig) -> None:
        super().__init__()
        self._config, self._folder = config, run_dir / "wandb"
        self._settings = without_secrets(asdict(run_config))
        self._title = f"{self._settings['experiment_name']}-{run_dir.name}"
        self.where = f"wandb sync {self._folder}/offline-run-*"
        self._run: Any = None
        self._first_step = 0
        self._best_loss = float("inf")
        self._owns_staging = False

    @property
    def name(self) -> str:
        return self._config.project

    @property
    def version(self) -> str:
        """The id of the record, the run folder's own."""
        return run_id(self._folder.parent)

    def begin(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Open the record.

        Args:
            rows: what metrics.csv holds of steps already done; those the record lacks are sent.
        Raises:
            ValueError: if W&B cannot be reached.
        """
        import wandb

        sent = max((last_recorded_step(path) for path in self._folder.glob(f"*run-*-{self.version}/run-{self.version}.wandb")), default=-1)
        settings = wandb.Settings(
            console="off",
            silent=True,
            symlink=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            host="",
            finish_timeout=_FINISH_TIMEOUT_S,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        if _STAGING_VARIABLE not in os.environ:  # there is no setting: tables keep their media there until they are uploaded
            os.environ[_STAGING_VARIABLE], self._owns_staging = str(self._folder.resolve()), True
        try:
            self._run = wandb.init(
                project=self._config.project,
                name=self._title,
                id=self.version,
                dir=str(self._folder.parent),
                mode=self._config.mode,  # type: ignore[arg-type]  # checked where it is configured
                resume="allow",
                config=self._settings,
                settings=settings,
            )
        except wandb.Error as error:
            raise _unreachable(error) from error
        if self._config.mode == "online":
            self.where = str(self._run.url)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        # W&B's server knows what it has; without it, the files of the run so far do.
        self._first_step = self._run.starting_step if self._config.mode == "online" else sent + 1
        for row in rows:
            self.log_metrics({key: float(value) for key, value in row.items() if value and key != "step"}, int(row["step"]))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None and self._run is not None, "rows have a step, and come after begin()"
        if metrics.get("val/loss", self._best_loss) < self._best_loss:
            self._best_loss = metrics["val/loss"]
            self._run.summary.update({"best/val_loss": self._best_loss, "best/step": step})
        if step >= self._first_step:
            self._run.log({"step": step, **metrics}, step=step, commit=True)

    def log_samples(self, samples: Sequence[SpokenSample]) -> None:
        """Add a table of clips to their step's row, which `log_metrics` then closes."""
        import wandb

        step = samples[0].step
        if step < self._first_step:
            return
        columns = ["step", "speaker", "text", "audio", "spectrogram"]
        rows: list[list[Any]] = [
            [step, sample.speaker, sample.text, wandb.Audio(str(sample.audio)), wandb.Image(str(sample.spectrogram))] for sample in samples
        ]
        if all(sample.heard is not None for sample in samples):
            columns.append("heard")
            rows = [[*row, sample.heard] for row, sample in zip(rows, samples, strict=True)]
        self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=rows)}, step=step, commit=False)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the configuration is given when the record opens."""

    def finalize(self, status: str) -> None:
        """Close the record and end W&B's process."""
        if self._run is None:
            return
        import wandb

        self._run.finish(exit_code=0 if status == "success" else 1)
        wandb.teardown()
        self._run = None
        if self._owns_staging:
            os.environ.pop(_STAGING_VARIABLE, None)


def _unreachable(error: Exception) -> ValueError:
    return ValueError(f"logger=wandb: {error}; set logger.mode=offline to record without W&B's server, or logger=csv")


def last_recorded_step(path: Path) -> int:
    """The last step in a `.wandb` file; -1 when there is none. A torn end, as a killed process leaves it, is where it ends."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    last = -1
    for data in _read_log(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(data)
        except DecodeError:
            break
        if record.WhichOneof("record_type") == "history":
            last = max(last, record.history.step.num)
    return last


def _read_log(data: bytes) -> Iterator[bytes]:
    """Records of W&B's transaction log: LevelDB's log format behind seven bytes of its own.

    Source: github.com/google/leveldb, doc/log_format.md; blocks of 32 KiB, in them chunks of checksum, length, kind.
    """
    block, header = 32768, struct.Struct("<IHB")
    whole, last = 1, 4  # kinds of chunk; 2 and 3 begin and continue a record
    position, record = 7, b""
    while position + header.size <= len(data):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        if position + length > len(data):  # torn
            break
        record += data[position : position + length]
        position += length
        if kind in (whole, last):
            yield record
            record = b""
