"""The LightningModule: one optimizer step, and validation over every frame.

Optimisation is manual, one `training_step` an optimizer step: micro-batches, clipping and the update are all here to
read. Losses are divided by the target counts of the whole step (all ranks, all micro-batches), so that accumulation and
ranks change neither the loss nor the gradient. How gradients become a step is in `updates`, which steps are dropped in
`guards`, the average of the weights in `ema`, what is logged, saved or spoken, and when, in `callbacks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from csm.config import TrainConfig
from csm.frames import Batch
from csm.loss import csm_loss
from csm.model.csm import CSM
from csm.model.lora import merged_adapter
from csm.training.ema import WeightAverage, put_back_trained_weights
from csm.training.guards import StepGuard, StepNumbers, describe_samples
from csm.training.optim import build_optimizers, learning_rate
from csm.training.steps import Step
from csm.training.updates import PlainUpdate, Update


class CSMModule(LightningModule):
    """Trains a CSM.

    Attributes:
        step: optimizer steps done; a skipped one counts, its data are gone.
        num_frames_heard: audio frames learnt from so far, all ranks.
        guard: judges each step, and counts those it dropped.
        average: of the weights; None when `ema.decay` is 0.
        update: turns gradients into a step; a strategy may put its own in place.
        window: float64 [K + 6], sums over all ranks since the last logged row: loss, c0, depth, nats of each codebook, useful
            positions, all positions; last the steps.
        grad_norm: of the last step, before clipping.
        should_stop: set by a signal; the ranks agree on it at the next step.
        base_digest: of the weights that the run's adapter stands beside; None without one.
    """

    def __init__(self, model: CSM, config: TrainConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.config = config
        self.step = 0
        self.num_frames_heard = 0
        self.guard = StepGuard(config.spikes, config.trainer.on_non_finite, self.print)
        self.average = WeightAverage(model, config.ema) if config.ema.decay > 0 else None
        self.update: Update = PlainUpdate(self, model, config.optim.clip_norm)
        self.window = torch.zeros(model.config.num_codebooks + 6, dtype=torch.float64)
        self.grad_norm = float("nan")
        self.should_stop = False
        self.base_digest: str | None = None
        self._hyperparameters: list[dict[str, Any]] = []

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = build_optimizers(self.model, self.config.optim)
        self._hyperparameters = [{k: v for k, v in group.items() if k != "params"} for o in optimizers for group in o.param_groups]
        return optimizers

    def on_train_start(self) -> None:
        # A checkpoint restores its own betas and decay; this run's configuration wins.
        for group, wanted in zip(self.update.param_groups, self._hyperparameters, strict=True):
            group.update(wanted)
        if self.average is not None:
            self.average.to(self.device)
        self.train()  # Lightning leaves the mode as it finds it

    def transfer_batch_to_device(self, batch: Step | Batch, device: torch.device, dataloader_idx: int) -> Step | Batch:
        return batch.to(device)

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return learning_rate(self.config.optim, max(0, self.step - 1), self.config.trainer.max_steps)

    @property
    def num_skipped(self) -> int:
        """Steps dropped so far."""
        return self.guard.num_skipped

    @contextmanager
    def weights_for_use(self) -> Iterator[None]:
        """Inside, the model has the weights to validate, to speak with and to hand to users: the average where there is one,
        the adapter merged."""
        with self.average.applied() if self.average is not None else nullcontext(), merged_adapter(self.model):
            yield

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """One optimizer step.

        Raises:
            ValueError: when the guard stops the run; names the samples.
        """
        counts = [batch.num_c0_targets, batch.num_depth_targets, batch.num_frames, int(self.should_stop)]
        counts += [batch.num_useful, batch.num_positions]
        if self.trainer.world_size > 1:
            counts = self._sum_over_ranks(torch.tensor(counts, device=self.device)).tolist()
        num_c0, num_depth, num_frames, stop, *num_positions = counts
        self.should_stop = stop > 0
        parts: list[Tensor] = []  # of each micro-batch: loss, c0, depth, nats of each codebook
        for micro_batch, rows in enumerate(batch.batches):
            is_last = micro_batch == len(batch.batches) - 1
            with self.update.micro_batch(is_last=is_last):
                losses = self._loss(rows, micro_batch, num_c0, num_depth)
                self.update.backward(losses.loss * self.trainer.world_size)  # ranks are averaged; the counts are global: sum
            parts.append(torch.cat((torch.stack((losses.loss.detach(), losses.c0, losses.depth)), losses.per_codebook)).double())
        norm = self.update.clip()
        totals = self._sum_over_ranks(torch.stack(parts).sum(dim=0))
        *sums, self.grad_norm = torch.cat((totals, norm.double()[None])).tolist()  # the step's one wait for the device
        numbers = StepNumbers(self.step + 1, sums[0], sums[1], sums[2], self.grad_norm)
        if self.guard.lets_pass(numbers, lambda: self._name_samples(batch, parts)):
            self.update.step(learning_rate(self.config.optim, self.step, self.config.trainer.max_steps))
            self.window += torch.tensor([*sums, *num_positions, 1.0], dtype=torch.float64)
            if self.average is not None:
                self.average.update(self.step + 1)
        else:
            self.update.discard()
        self.step += 1
        self.num_frames_heard += num_frames

    def take_window(self) -> dict[str, float]:
        """Mean losses and the share of useful positions since the last call; empties the window.

        Codebooks 1..K-1 are those of the picked frames.
        """
        *sums, num_useful, num_positions, count = self.window.tolist()
        self.window.zero_()
        if not count:
            return {}
        loss, c0, depth, *codebooks = (value / count for value in sums)
        means = {"train/loss": loss, "train/c0": c0, "train/depth": depth, "useful_share": _ratio(num_useful, num_positions)}
        return means | {f"train/codebook_{k:02d}": nats for k, nats in enumerate(codebooks)}

    @torch.no_grad()
    def measure_batch(self, batch: Batch) -> Tensor:
        """Sums over a batch, float64 [2 + K + 4]: nats of codebook 0 and its targets, nats of codebooks 1..K-1, their
        rows, and `Losses.stop_counts`. Every frame counts; nothing is drawn."""
        losses = csm_loss(self.update.model, batch, amortization=1.0, depth_frames_at_once=self._depth_frames_at_once)
        num_depth_codebooks = losses.per_codebook.numel() - 1
        num_rows = losses.depth_count // num_depth_codebooks
        assert losses.stop_counts is not None, "validation runs in eval mode"
        return torch.cat((
            (losses.c0.double() * losses.c0_count)[None],
            losses.c0_count[None].double(),
            losses.per_codebook[1:].double() * num_rows,
            num_rows[None].double(),
            losses.stop_counts.double(),
        ))  # fmt: skip

    def summarise_validation(self, sums: Tensor) -> dict[str, float]:
        """Metrics of summed `measure_batch` results, this rank's; every rank must call it."""
        values = self._sum_over_ranks(sums).tolist()
        c0_nats, c0_count, *codebook_nats = values[:-5]
        num_rows, eos_heard, num_eos, false_stops, num_frames = values[-5:]
        per_codebook = [_ratio(c0_nats, c0_count), *(_ratio(nats, num_rows) for nats in codebook_nats)]
        c0, depth = per_codebook[0], sum(per_codebook[1:]) / len(per_codebook[1:])
        metrics = {"val/loss": c0 + depth, "val/c0": c0, "val/depth": depth}
        metrics |= {"val/eos_recall": _ratio(eos_heard, num_eos), "val/false_stop": _ratio(false_stops, num_frames)}
        return metrics | {f"val/codebook_{k:02d}": nats for k, nats in enumerate(per_codebook)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's own counters are left out: each fit is one epoch of the steps that remain, and `step` is the truth.
        checkpoint.pop("loops", None)
        if not self.config.trainer.save_optimizer:
            checkpoint["optimizer_states"] = []
        checkpoint["global_step"] = self.step
        checkpoint["csm"] = {
            "step": self.step,
            "num_frames_heard": self.num_frames_heard,
            "window": self.window.tolist(),
            "guard": self.guard.state_dict(),
            "base_digest": self.base_digest,
        }
        if self.average is not None and self.config.trainer.save_optimizer:
            checkpoint["csm"]["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint["optimizer_states"]:
            raise ValueError(
                "this checkpoint has no optimizer state (trainer.save_optimizer=false), so no run can go on from it; start a new one"
            )
        state = checkpoint["csm"]
        if state.get("base_digest") != self.base_digest:
            raise ValueError(
                f"this checkpoint's adapter was trained beside other weights than base={self.config.base} has now; give the base it had"
            )
        self.step, self.num_frames_heard = state["step"], state["num_frames_heard"]
        window = torch.tensor(state["window"], dtype=torch.float64)
        if window.shape == self.window.shape:  # else of a version that measured less: the next row begins at this step
            self.window = window
        self.guard.load_state_dict(state["guard"])
        if "average" in state:
            averages = put_back_trained_weights(state["average"], checkpoint["state_dict"], prefix="model.")
            if self.average is not None:
                self.average.load_state_dict(state["average"], averages)
            else:
                self.print("ema.decay=0: this run goes on from the weights as trained and drops the checkpoint's average")

    def _loss(self, rows: Batch, micro_batch: int, num_c0_targets: int, num_depth_targets: int):
        config = self.config.loss
        return csm_loss(
            self.update.model,
            rows,
            amortization=config.amortization,
            seed=self.config.seed,
            step=self.step,
            rank=self.trainer.global_rank,
            micro_batch=micro_batch,
            c0_weight=config.c0_weight,
            depth_weight=config.depth_weight,
            codebook_weights=config.codebook_weights,
            z_loss=config.z_loss,
            frame_dropout=config.frame_dropout,
            num_c0_targets=num_c0_targets,
            num_depth_targets=num_depth_targets,
            static_shapes=self.config.trainer.compile,
            depth_frames_at_once=self._depth_frames_at_once,
        )

    @property
    def _depth_frames_at_once(self) -> int | None:
        can_group = self.update.has_whole_weights and not self.config.trainer.compile
        return self.config.loss.depth_frames_at_once if can_group else None

    def _name_samples(self, step: Step, parts: list[Tensor]) -> str:
        """The samples to look at after a bad step, those of the worst micro-batch of all ranks; every rank must call it."""
        losses = [float("inf") if loss != loss else loss for loss in torch.stack(parts)[:, 0].tolist()]
        worst = max(range(len(losses)), key=losses.__getitem__)
        place = f"rank {self.trainer.global_rank}, micro-batch {worst + 1} of {len(losses)}"
        mine = (losses[worst], place, describe_samples(step.batches[worst].keys or []))
        found = [mine]
        if self.trainer.world_size > 1:
            found = [mine] * self.trainer.world_size
            torch.distributed.all_gather_object(found, mine)
        _, place, samples = max(found, key=lambda one: one[0])
        return samples if len(found) == len(losses) == 1 else f"worst in {place}, {samples}"

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
