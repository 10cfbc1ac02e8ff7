"""The LightningModule: one optimizer step, and validation over every frame.

Optimisation is manual, one `training_step` an optimizer step: micro-batches, clipping and the check for non-finite
gradients are all here to read. Losses are divided by the target counts of the whole step (all ranks, all micro-batches),
so that accumulation and ranks change neither the loss nor the gradient. What is logged, saved or spoken, and when, is in
`callbacks`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from csm.config import TrainConfig
from csm.frames import Batch
from csm.loss import csm_loss
from csm.model.csm import CSM
from csm.training.optim import build_optimizers, learning_rate
from csm.training.steps import Step

MAX_CONSECUTIVE_SKIPS = 5  # with trainer.on_non_finite=skip


class CSMModule(LightningModule):
    """Trains a CSM.

    Attributes:
        step: optimizer steps done; a skipped one counts, its data are gone.
        num_frames_heard: audio frames learnt from so far, all ranks.
        num_skipped: steps dropped for non-finite gradients.
        window: float64 [4], sums of loss, c0, depth, and steps since the last logged row (this rank's share).
        grad_norm: of the last step, before clipping.
        should_stop: set by a signal; the ranks agree on it at the next step.
    """

    def __init__(self, model: CSM, config: TrainConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.config = config
        self.step = 0
        self.num_frames_heard = 0
        self.num_skipped = 0
        self.window = torch.zeros(4, dtype=torch.float64)
        self.grad_norm = float("nan")
        self.should_stop = False
        self._consecutive_skips = 0
        self._hyperparameters: list[list[dict[str, Any]]] = []

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = build_optimizers(self.model, self.config.optim)
        self._hyperparameters = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
        return optimizers

    def on_train_start(self) -> None:
        # A checkpoint restores its own betas and decay; this run's configuration wins.
        for optimizer, groups in zip(self._optimizers(), self._hyperparameters, strict=True):
            for group, wanted in zip(optimizer.param_groups, groups, strict=True):
                group.update(wanted)
        self.window = self.window.to(self.device)
        self.train()  # Lightning leaves the mode as it finds it

    def transfer_batch_to_device(self, batch: Step | Batch, device: torch.device, dataloader_idx: int) -> Step | Batch:
        return batch.to(device)

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return learning_rate(self.config.optim, max(0, self.step - 1), self.config.trainer.max_steps)

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """One optimizer step.

        Raises:
            ValueError: when the gradient is not finite; names the samples.
        """
        num_c0, num_depth, num_frames, stop = self._sum_over_ranks(
            torch.tensor([batch.num_c0_targets, batch.num_depth_targets, batch.num_frames, int(self.should_stop)], device=self.device)
        ).tolist()
        self.should_stop = stop > 0
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for micro_batch, rows in enumerate(batch.batches):
            is_last = micro_batch == len(batch.batches) - 1
            with nullcontext() if is_last else self._without_sync():
                losses = self._loss(rows, micro_batch, num_c0, num_depth)
                self.manual_backward(losses.loss * self.trainer.world_size)  # DDP averages; the counts are global: sum
            totals += torch.stack((losses.loss.detach(), losses.c0, losses.depth)).double()
        optimizers = self._optimizers()
        norm = self._clip()
        self.grad_norm = float(norm)  # the step's one wait for the device
        is_finite = self.grad_norm < float("inf")
        if is_finite:
            rate = learning_rate(self.config.optim, self.step, self.config.trainer.max_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self.window[:3] += totals
            self.window[3] += 1
            self._consecutive_skips = 0
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_frames_heard += num_frames
        if not is_finite:
            self._answer_non_finite(batch, totals)

    def take_window(self) -> dict[str, float]:
        """Mean loss, c0 and depth since the last call, over all ranks; empties the window. Every rank must call it."""
        window = self.window.clone()
        window[:3] = self._sum_over_ranks(window[:3])
        self.window.zero_()
        loss, c0, depth, count = window.tolist()
        return {"train/loss": loss / count, "train/c0": c0 / count, "train/depth": depth / count} if count else {}

    @torch.no_grad()
    def measure_batch(self, batch: Batch) -> Tensor:
        """Sums over a batch, float64 [2 + K + 4]: nats of codebook 0 and its targets, nats of codebooks 1..K-1, their
        rows, and `Losses.stop_counts`. Every frame counts; nothing is drawn."""
        losses = csm_loss(self.model, batch, amortization=1.0)
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
            "num_skipped": self.num_skipped,
            "window": self._sum_over_ranks(self.window[:3].clone()).tolist() + [self.window[3].item()],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint["optimizer_states"]:
            raise ValueError(
                "this checkpoint has no optimizer state (trainer.save_optimizer=false), so no run can go on from it; start a new one"
            )
        state = checkpoint["csm"]
        self.step, self.num_frames_heard, self.num_skipped = state["step"], state["num_frames_heard"], state["num_skipped"]
        self.window = torch.tensor(state["window"], dtype=torch.float64)
        if self.trainer.global_rank != 0:
            self.window[:3] = 0.0  # the saved sums are those of all ranks

    def _loss(self, rows: Batch, micro_batch: int, num_c0_targets: int, num_depth_targets: int):
        config = self.config.loss
        return csm_loss(
            self.model,
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
        )

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.config.optim.clip_norm > 0:
            return torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm)
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _answer_non_finite(self, step: Step, totals: Tensor) -> None:
        loss, c0, depth = totals.tolist()
        keys = step.keys
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") if keys else "not known"
        found = f"step {self.step}: gradient norm {self.grad_norm} (loss {loss:.4g}, c0 {c0:.4g}, depth {depth:.4g}); samples: {shown}"
        self.num_skipped += 1
        self._consecutive_skips += 1
        if self.config.trainer.on_non_finite == "skip" and self._consecutive_skips <= MAX_CONSECUTIVE_SKIPS:
            self.print(f"skipped {found}")
            return
        repeated = f", {self._consecutive_skips} steps in a row" if self._consecutive_skips > 1 else ""
        advice = "lower optim.lr, look at these samples, or resume with trainer.on_non_finite=skip"
        raise ValueError(f"not finite{repeated}: {found}; {advice}")

    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _without_sync(self):
        """Keep DDP from exchanging gradients that are not complete yet."""
        return self.trainer.strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
