"""ZeRO through DeepSpeed: optimizer state (1), gradients (2) and weights (3) cut over the processes, on GPUs and on CPUs.

DeepSpeed's engine owns gradients, clipping and the optimizer; `ZeroUpdate` drives it so that it computes what one process
would: nothing is divided by the number of micro-batches (losses are divided by the step's counts already), and the
boundary between steps is ours to say. Checkpoints are not DeepSpeed's pickles but folders like any other, with each
process's part beside the rest (`zero_files`). Checked against deepspeed 0.19.8.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from csm.config import TrainConfig
from csm.model.checkpoint_folder import find_fault, open_part, publish, read_manifest
from csm.model.csm import CSM, CSMOutput
from csm.model.depth_nats import DepthNats
from csm.model.pretrained import resolve_checkpoint, save_model
from csm.model.weights import Source
from csm.training.module import CSMModule
from csm.training.optim import decay_groups
from csm.training.zero_files import FOLDER, PlainFiles, SavedState, ZeroFiles, write_index
from csm.training.zero_state import OwnPart, is_stage_3, restore, write_model, write_own_part

_MAX_BUCKET = 200_000_000  # elements exchanged at once
_MAX_KEPT_WHOLE = 100_000  # elements of parameters that stage 3 does not cut, unless the model is small
_NEVER = 2**31 - 1


def engine_settings(config: TrainConfig, num_parameters: int, *, is_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    bucket = min(_MAX_BUCKET, num_parameters)
    zero: dict[str, Any] = {"stage": int(config.trainer.strategy[4]), "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, num_parameters)
        zero["stage3_param_persistence_threshold"] = min(_MAX_KEPT_WHOLE, num_parameters // 500)
    if config.trainer.strategy == "zero3_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": is_cuda}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.rows_per_batch,  # for its own records only
        "gradient_accumulation_steps": config.trainer.accumulate,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, and nothing has to be compiled
        "steps_per_print": _NEVER,
    }
    if config.trainer.precision == "bf16-mixed":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


class ZeroUpdate:
    """Drives a DeepSpeed engine; see `csm.training.updates.Update`."""

    def __init__(self, engine: Any) -> None:
        self.model = EngineModel(engine)
        self.has_whole_weights = not is_stage_3(engine)
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loss is a share of the step's already

    def clip(self) -> Tensor:
        # The engine computes this again when it steps, and clips then; asked here, so that the guard can say no.
        optimizer = self._engine.optimizer
        norms = torch.stack([norm.float() for norm in (optimizer._get_norm_groups() if is_stage_3(self._engine) else self._norms())])
        return torch.where((norms < 0).any(), torch.inf, norms.square().sum().sqrt())  # -1 stands for not finite

    def step(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate
        self._engine.step()

    def discard(self) -> None:
        # What the engine's step does when it meets an overflow, for gradients that are finite too.
        optimizer = self._engine.optimizer
        if is_stage_3(self._engine):
            optimizer._pre_step()
            optimizer._partition_all_parameters()
            optimizer._overflow_clean_up(1.0)
            return
        optimizer.micro_step_id = -1  # deepspeed.runtime.zero.stage_1_and_2.INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None

    def _norms(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        return [
            optimizer.get_grad_norm_direct(optimizer.averaged_gradients[index], optimizer.params_in_partition[index])
            for index in range(len(optimizer.bit16_groups))
        ]


class EngineModel:
    """Called like a CSM; runs it through the engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def training(self) -> bool:
        return bool(self._engine.module.training)

    def __call__(self, *arguments: Any, **options: Any) -> CSMOutput:
        hidden, c0_logits, depth_logits, *nats = self._engine(*arguments, **options)
        return CSMOutput(hidden, c0_logits, depth_logits, DepthNats(*nats) if nats else None)


class ZeroStrategy(DDPStrategy):
    """Lightning's processes and process group, DeepSpeed's engine around the CSM inside the module.

    Raises:
        ImportError: if DeepSpeed is not installed.
    """

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        if torch.cuda.device_count() == 0:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is first imported
        try:
            import deepspeed
        except ImportError as error:
            raise ImportError(
                f"trainer.strategy={config.trainer.strategy} needs DeepSpeed ({error}): pip install -c constraints/core.txt deepspeed"
            ) from error
        deepspeed.utils.logging.logger.setLevel("WARNING")
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*")  # names that DeepSpeed still calls
        super().__init__(**options)
        self._config = config
        self._engine: Any = None
        self._hook: Any = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the engine must be there

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module
        if self._config.trainer.precision == "bf16-mixed":
            module.model.to(torch.bfloat16)  # before it goes to the device, where it would be float32 for a moment
        self.model_to_device()
        with _surroundings(self.local_rank, self.global_rank, self.world_size, self.num_processes):
            self._engine = self._make_engine(module)
        module.update = ZeroUpdate(self._engine)
        self.barrier()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, all processes together; returns when it is published.

        Raises:
            OSError: on every process, if one of them could not write its part.
        """
        folder = Path(self.broadcast(str(filepath)))
        part = folder.with_name(folder.name + ".tmp")
        errors: list[str] = []
        with _noting(errors):
            if self.is_global_zero:
                part = open_part(folder)
        self.barrier()
        own: OwnPart | None = None
        with _noting(errors):
            if self._config.trainer.save_optimizer:
                own = write_own_part(self._engine, self._module.model, part)
        with _noting(errors):
            write_model(self._engine, self._module.model, lambda sources: self._save_model(part, sources), is_first=self.is_global_zero)
        everyones: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyones, (own, errors))
        with _noting(errors):
            if self.is_global_zero and not any(found for _, found in everyones):
                self._complete(part, folder, checkpoint, [own for own, _ in everyones])
        failed = self.broadcast(errors)  # of the first process, which has to do with every part
        failed = [*failed, *(line for _, found in everyones for line in found if line not in failed)]
        if failed:
            if self.is_global_zero:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"checkpoint {folder} could not be written: {failed[0]}; those before it are as they were")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Put a checkpoint's weights and moments into the engine, whatever number of processes wrote it, and return the rest.

        Raises:
            ValueError: if it is damaged, or of another model or optimizer.
        """
        folder = resolve_checkpoint(checkpoint_path, name="last")
        fault = self._find_fault(folder)
        if fault is not None:
            raise ValueError(f"{folder}: not usable, {fault}; resume=auto takes the newest checkpoint that is whole")
        state = self.checkpoint_io.read_state(folder)
        if "average" in state["csm"]:
            raise ValueError(f"{folder} holds an average of the weights (ema), which ZeRO does not keep; go on with trainer=ddp")
        if (folder / FOLDER).is_dir() or state["optimizer_states"]:
            saved = self._open_saved(folder)
            restore(self._engine, self._module.model, saved)
            state["optimizer_states"] = [{}]
        return {**state, "state_dict": {}}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done by `load_checkpoint`."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # written apart, parameter by parameter

    def copy_model(self) -> CSM | None:
        """A plain CSM of the weights as they are, on the first process, None on the others; every process must call it.

        The one that trains answers the engine. Stages 1 and 2 share its weights, stage 3 puts them together on the device.
        """
        copies: list[CSM] = []

        def take(sources: Mapping[str, Source]) -> None:
            with torch.device("meta"):
                model = CSM(self._module.model.config)
            model.load_state_dict({name: read().to(self.root_device) for name, (_, _, read) in sources.items()}, assign=True)
            copies.append(model.eval())

        write_model(self._engine, self._module.model, take, is_first=self.is_global_zero)
        return copies[0] if copies else None

    def teardown(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._engine = self._hook = None
        super().teardown()

    @property
    def _module(self) -> CSMModule:
        assert isinstance(self.lightning_module, CSMModule)
        return self.lightning_module

    def _make_engine(self, module: CSMModule) -> Any:
        import deepspeed

        # On CPUs it would compile a shared-memory collective that training never calls and that leaks 66 MiB a process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=self._process_group_backend, auto_mpi_discovery=False, verbose=False)
        # Ours first: stage 3 finds tensors in tuples, and hooks them, but not in a dataclass.
        self._hook = module.model.register_forward_hook(lambda _, __, out: _tensors(out))
        num_parameters = sum(parameter.numel() for parameter in module.model.parameters())
        (optimizer,) = module.configure_optimizers()
        engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            model=module.model,
            optimizer=optimizer,
            config=engine_settings(self._config, num_parameters, is_cuda=self.root_device.type == "cuda"),
            dist_init_required=False,
        )
        if is_stage_3(engine):
            # Used by the whole model's forward pass, not by the table's own.
            deepspeed.zero.register_external_parameter(module.model, module.model.audio_embeddings.weight)
        return engine

    def _save_model(self, part: Path, sources: Any) -> None:
        with torch.device("meta"):
            shapes = CSM(self._module.model.config)
        save_model(shapes, part, layout="csm", sources=sources)

    def _complete(self, part: Path, folder: Path, checkpoint: dict[str, Any], parts: list[OwnPart | None]) -> None:
        """What only the first process writes, and the name."""
        step = self._module.step
        self.checkpoint_io.write_companions(part, checkpoint)
        digests: dict[str, str] = {}
        own = [one for one in parts if one is not None]
        if own:
            with torch.device("meta"):
                shapes = {name: tuple(p.shape) for name, p in CSM(self._module.model.config).named_parameters()}
            moments = sorted({kind for one in own for kind in one.moments})
            num_updates = max(one.num_updates for one in own)
            name = self._config.optim.name
            write_index(part, [one.pieces for one in own], shapes, step=step, optimizer=name, moments=moments, num_updates=num_updates)
            digests = {one.file: one.digest for one in own}
        publish(part, folder, step=step, world_size=self.world_size, digests=digests)

    def _find_fault(self, folder: Path) -> str | None:
        """As `find_fault`; each process reads its share of the files."""
        try:
            mine = set(sorted(read_manifest(folder)["files"])[self.global_rank :: self.world_size])
            fault = find_fault(folder, names=mine.__contains__)
        except ValueError as error:
            fault = str(error)
        found: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(found, fault)
        return next((one for one in found if one is not None), None)

    def _open_saved(self, folder: Path) -> SavedState:
        with torch.device("meta"):
            model = CSM(self._module.model.config)
        saved: SavedState
        if (folder / FOLDER).is_dir():
            saved = ZeroFiles(folder)
        else:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            order = [names[id(p)] for group in decay_groups(model.named_parameters(), 0.0) for p in group["params"]]
            saved = PlainFiles(folder, order, json.loads((folder / "state.json").read_text(encoding="utf-8")))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name in sorted({*expected, *saved.shapes}):
            got, wanted = saved.shapes.get(name, "nothing"), expected.get(name, "nothing")
            if got != wanted:
                raise ValueError(f"{folder} is of another model: {name} is {got}, this run's model={model.config.name} has {wanted}")
        if saved.optimizer != self._config.optim.name:
            raise ValueError(f"{folder} was trained with optim={saved.optimizer}, this run has optim={self._config.optim.name}")
        return saved


def _tensors(out: CSMOutput) -> tuple[Tensor | None, ...]:
    nats = () if out.depth_nats is None else (out.depth_nats.total, out.depth_nats.sums)
    return out.hidden, out.c0_logits, out.depth_logits, *nats


@contextmanager
def _noting(errors: list[str]) -> Iterator[None]:
    """Note what the disk refuses instead of leaving the other processes waiting."""
    try:
        yield
    except OSError as error:
        errors.append(error.strerror or str(error))


@contextmanager
def _surroundings(local_rank: int, rank: int, world_size: int, num_local: int) -> Iterator[None]:
    """The environment variables that DeepSpeed's launcher would have set."""
    values = {"LOCAL_RANK": local_rank, "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": num_local}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
