"""Twenty losses of a tiny run, in one JSON file that every path of training must reproduce.

`full` learns every frame, so it does not depend on how rows are split or packed; `amortized` learns a picked quarter and so
also pins the picks. Written anew only by `pytest --update-golden`, in a commit that says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from csm import CSM, ModelConfig, csm_loss
from csm.frames import Batch, Rows, audio_rows, text_rows
from csm.loss import count_targets
from csm.training.checkpoint import FolderCheckpointIO

GOLDEN = Path(__file__).with_name("tiny_losses.json")
NUM_STEPS = 20
TOLERANCE = 2e-4  # of a loss near 7, after 20 steps of AdamW: float32 sums in another order, on another CPU
Loss = Callable[[CSM, list[list[Rows]], int, float], float]


def documents_of_step(config: ModelConfig, step: int) -> list[list[Rows]]:
    """Two rows of two documents; the codes of a document follow from its first, so there is something to learn."""
    generator = torch.Generator().manual_seed(step)

    def document(num_frames: int) -> Rows:
        text = torch.randint(config.text_vocab_size, (3,), generator=generator)
        start = torch.randint(1, config.audio_vocab_size, (config.num_codebooks, 1), generator=generator)
        codes = (start + 3 * torch.arange(num_frames)) % (config.audio_vocab_size - 1) + 1
        return Rows.concatenate([text_rows(text.tolist(), config.num_codebooks), audio_rows(codes)])

    return [[document(6), document(9)], [document(12), document(3)]]


def backward_packed(model: CSM, documents: list[list[Rows]], step: int, amortization: float) -> float:
    loss = csm_loss(model, Batch.from_documents(documents, seq_len=32), amortization, seed=0, step=step).loss
    loss.backward()
    return loss.item()


def backward_unpacked(model: CSM, documents: list[list[Rows]], step: int, amortization: float) -> float:
    loss = csm_loss(model, Batch.from_documents([[d] for row in documents for d in row]), amortization, seed=0, step=step).loss
    loss.backward()
    return loss.item()


def backward_micro_batches(model: CSM, documents: list[list[Rows]], step: int, amortization: float) -> float:
    parts = [Batch.from_documents([row], seq_len=32) for row in documents]
    num_c0, num_depth = (sum(counts) for counts in zip(*(count_targets(part, amortization) for part in parts), strict=True))
    total = 0.0
    for index, part in enumerate(parts):
        loss = csm_loss(
            model, part, amortization, seed=0, step=step, micro_batch=index, num_c0_targets=num_c0, num_depth_targets=num_depth
        ).loss
        loss.backward()
        total += loss.item()
    return total


def backward_static(model: CSM, documents: list[list[Rows]], step: int, amortization: float) -> float:
    loss = csm_loss(model, Batch.from_documents(documents, seq_len=32), amortization, seed=0, step=step, static_shapes=True).loss
    loss.backward()
    return loss.item()


def backward_groups(model: CSM, documents: list[list[Rows]], step: int, amortization: float) -> float:
    batch = Batch.from_documents(documents, seq_len=32)
    loss = csm_loss(model, batch, amortization, seed=0, step=step, depth_frames_at_once=3).loss
    loss.backward()
    return loss.item()


def train(
    config: ModelConfig, amortization: float, backward: Loss, *, prepare: Callable[[CSM], object] = lambda model: None
) -> list[float]:
    model = CSM(config, seed=0)
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for step in range(NUM_STEPS):
        losses.append(backward(model, documents_of_step(config, step), step, amortization))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_resumed(config: ModelConfig, amortization: float, folder: Path, *, stop_at: int = 9) -> list[float]:
    """Two runs: one stops after `stop_at` steps and saves a checkpoint, another reads it into a new model and goes on."""
    losses: list[float] = []
    for steps in (range(stop_at), range(stop_at, NUM_STEPS)):
        model = CSM(config, seed=steps.start)  # the second one's own weights are others
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
        if steps.start:
            saved = FolderCheckpointIO(model).load_checkpoint(folder)
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()})
            optimizer.load_state_dict(saved["optimizer_states"][0])
            assert saved["step"] == steps.start
        for step in steps:
            losses.append(backward_packed(model, documents_of_step(config, step), step, amortization))
            optimizer.step()
            optimizer.zero_grad()
        if not steps.start:
            FolderCheckpointIO(model).save_checkpoint({"optimizer_states": [optimizer.state_dict()], "step": stop_at}, folder)
    return losses


def expected(name: str) -> list[float]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


def assert_golden(losses: list[float], name: str) -> None:
    assert losses == pytest.approx(expected(name), abs=TOLERANCE)


@pytest.fixture(scope="module", autouse=True)
def _golden(update_golden: bool) -> None:
    if not update_golden:
        return
    from tests.conftest import tiny_config

    config = tiny_config()
    runs = {"full": train(config, 1.0, backward_packed), "amortized": train(config, 1 / 4, backward_packed)}
    part = GOLDEN.with_suffix(".tmp")
    part.write_text(
        json.dumps({name: [round(loss, 7) for loss in losses] for name, losses in runs.items()}, indent=1) + "\n", encoding="utf-8"
    )
    part.replace(GOLDEN)


@pytest.mark.parametrize(("name", "amortization"), [("full", 1.0), ("amortized", 1 / 4)])
def test_eager_run_gives_the_golden_losses(tiny_model_config, name, amortization):
    losses = train(tiny_model_config, amortization, backward_packed)
    assert_golden(losses, name)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("backward", [backward_unpacked, backward_micro_batches], ids=["unpacked", "micro_batches"])
def test_other_splits_of_the_rows_give_the_golden_losses(tiny_model_config, backward):
    assert_golden(train(tiny_model_config, 1.0, backward), "full")


def test_activation_checkpointing_gives_the_golden_losses(tiny_model_config):
    def prepare(model: CSM) -> None:
        model.activation_checkpointing = True

    assert_golden(train(tiny_model_config, 1 / 4, backward_packed, prepare=prepare), "amortized")


@pytest.mark.parametrize(("name", "amortization"), [("full", 1.0), ("amortized", 1 / 4)])
def test_resumed_run_gives_the_golden_losses_and_equals_an_uninterrupted_one(tiny_model_config, name, amortization, tmp_path):
    losses = train_resumed(tiny_model_config, amortization, tmp_path / "step_000009")
    assert_golden(losses, name)
    assert losses == train(tiny_model_config, amortization, backward_packed)  # bit for bit: nothing is lost on disk


@pytest.mark.parametrize(("name", "amortization"), [("full", 1.0), ("amortized", 1 / 4)])
def test_depth_decoder_a_few_frames_at_a_time_gives_the_golden_losses(tiny_model_config, name, amortization):
    assert_golden(train(tiny_model_config, amortization, backward_groups), name)


def test_static_shapes_give_the_golden_losses(tiny_model_config):
    assert_golden(train(tiny_model_config, 1 / 4, backward_static), "amortized")


@pytest.mark.slow
def test_compiled_run_gives_the_golden_losses_without_a_graph_break(tiny_model_config):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process compile, too
    assert_golden(train(tiny_model_config, 1 / 4, backward_static, prepare=lambda model: model.compile(fullgraph=True)), "amortized")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1  # one shape, one graph: no recompilation in 20 steps
