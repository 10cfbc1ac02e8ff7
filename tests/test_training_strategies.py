"""Many processes: DDP and ZeRO give one process's losses, and ZeRO checkpoints load anywhere. On CPU, over gloo."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm import CSM
from csm.cli.commands import main as csm_command
from csm.cli.hydra_entry import UsageError, compose
from csm.config import ModelConfig, TrainConfig
from csm.model.checkpoint_folder import find_fault, open_part, publish
from csm.model.pretrained import save_model
from csm.model.weights import stream_tensors
from csm.training.zero_files import ZeroFiles, rank_file, write_index
from tests.isolation import SECOND_ADDRESS, run_isolated

ROOT = Path(__file__).resolve().parents[1]
# Every frame's depth is learnt, nothing is hidden: what a rank draws does not depend on how many there are. At this rate and
# bound every step is clipped.
TINY = [
    "data=random", "data.seq_len=32", "data.max_val_batches=0", "loss.amortization=1.0", "loss.frame_dropout=0",
    "loss.depth_frames_at_once=5", "trainer.precision=32",
    "trainer.max_steps=20", "trainer.log_every=1", "trainer.validate_every=10", "trainer.checkpoint_every=10", "trainer.keep_checkpoints=9",
    "trainer.accumulate=2", "trainer.num_threads=1", "trainer.deterministic=true", "optim.lr=0.01", "optim.warmup_steps=3",
    "optim.clip_norm=0.4", "model.num_codebooks=4", "codec.num_codebooks=4", "model.audio_vocab_size=33", "model.backbone.width=32",
    "model.backbone.num_layers=2", "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1", "model.depth_decoder.width=16",
    "model.depth_decoder.ffn_width=24",
]  # fmt: skip
SKIPPING = ["spikes.action=skip", "spikes.window=4", "spikes.norm_ratio=1.05", "spikes.loss_sigmas=0"]
STAGES = ("zero1", "zero2", "zero3", "zero3_offload")


def _rows(run_dir: Path) -> dict[int, dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def _weights(run_dir: Path, step: int = 20) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step_{step:06d}/model.safetensors")


def _largest_difference(run_dir: Path, other: Path, column: str) -> float:
    """Over the steps that both runs have, all of `run_dir`'s."""
    rows, others = _rows(run_dir), _rows(other)
    measured = [step for step in rows if rows[step][column]]
    assert measured
    return max(abs(float(rows[step][column]) - float(others[step][column])) for step in measured)


def _run_all(num_processes: int, out: Path, jobs: dict[str, list[str]], before: str = "true") -> None:
    """Train every job in `num_processes` processes, eight rows a step."""
    common = [*TINY, f"trainer.devices={num_processes}", f"data.rows_per_batch={4 // num_processes}"]
    overrides = [[*common, f"run_dir={out / name}", *special] for name, special in jobs.items()]
    script = [sys.executable, str(ROOT / "tests/many_processes.py"), str(num_processes), json.dumps(overrides)]
    done = run_isolated(["sh", "-c", f'{before} && exec "$@"', "sh", *script], timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a run, named for its strategy: two starts of Python for all of them; read only."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("strategies")
    tenth = f"resume={out}/{{}}/checkpoints/step_000010"
    bf16 = "trainer.precision=bf16-mixed"
    jobs = {f"{name}_sgd": [f"trainer={name}", "optim=sgd"] for name in ("ddp", "zero1", "zero2", "zero3")}
    jobs |= {name: [f"trainer={name}"] for name in ("ddp", *STAGES)}
    jobs |= {f"{name}_skipping": [f"trainer={name}", *SKIPPING] for name in ("zero1", "zero3", "zero3_offload")}
    jobs["zero3_recomputing"] = ["trainer=zero3", "trainer.activation_checkpointing=true"]
    jobs["zero2_bf16"] = ["trainer=zero2", bf16]
    jobs["zero3_bf16"] = ["trainer=zero3", bf16]
    jobs["zero3_bf16_resumed"] = ["trainer=zero3", bf16, tenth.format("zero3_bf16")]
    jobs["zero3_resumed"] = ["trainer=zero3", tenth.format("zero3")]
    jobs["zero3_to_zero1"] = ["trainer=zero1", tenth.format("zero3")]
    jobs["zero1_to_zero3"] = ["trainer=zero3", tenth.format("zero1")]
    jobs["ddp_to_zero3"] = ["trainer=zero3", tenth.format("ddp")]
    jobs["sgd_to_adamw"] = ["trainer=zero3", tenth.format("zero3_sgd")]
    jobs["full_disk"] = ["trainer=zero3", "logger=none"]  # last: it ends with an error
    (out / "full_disk").mkdir()
    _run_all(2, out, jobs, before=f"mount -t tmpfs -o size=300k tmpfs {out / 'full_disk'}")
    jobs = {"one_sgd": ["optim=sgd"], "one": [], "one_skipping": SKIPPING, "zero3_to_one": [tenth.format("zero3")]}
    jobs["zero3_to_zero3_of_one"] = ["trainer=zero3", tenth.format("zero3")]
    _run_all(1, out, jobs)
    return out


# ---- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp_sgd", "zero1_sgd", "zero2_sgd", "zero3_sgd", "ddp", *STAGES])
def test_two_processes_lose_what_one_does(name: str, runs: Path) -> None:
    one = runs / ("one_sgd" if name.endswith("_sgd") else "one")
    assert sorted(_rows(runs / name)) == list(range(1, 21))
    assert min(float(row["grad_norm"]) for row in _rows(one).values()) > 0.4  # every step is clipped
    assert _largest_difference(runs / name, one, "train/loss") < 1e-5  # measured: 1e-6, the file's last digit
    assert _largest_difference(runs / name, one, "grad_norm") < 1e-5  # measured: 2.5e-6
    assert _largest_difference(runs / name, one, "val/loss") < 1e-5


@pytest.mark.slow
def test_weights_agree_with_ddps(runs: Path) -> None:
    # SGD: sums in another order. AdamW divides by the root of squares, where gradients near 0 count as much as others.
    for suffix, stages, tolerance in (("_sgd", STAGES[:3], 1e-7), ("", STAGES, 1e-4)):  # measured: 4e-9 and 8e-6
        expected = _weights(runs / f"ddp{suffix}")
        for stage in stages:
            for name, weight in _weights(runs / f"{stage}{suffix}").items():
                assert torch.allclose(weight, expected[name], rtol=0, atol=tolerance), f"{stage}{suffix} {name}"


@pytest.mark.slow
def test_recomputed_activations_change_nothing_under_zero3(runs: Path) -> None:
    assert (runs / "zero3_recomputing/metrics.csv").read_bytes() == (runs / "zero3/metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero3", "zero3_offload"])
def test_a_dropped_step_leaves_no_gradient_behind(name: str, runs: Path) -> None:
    assert int(_rows(runs / "one_skipping")[20]["skipped"]) > 2
    assert [row["skipped"] for row in _rows(runs / f"{name}_skipping").values()] == [
        row["skipped"] for row in _rows(runs / "one_skipping").values()
    ]
    assert _largest_difference(runs / f"{name}_skipping", runs / "one_skipping", "train/loss") < 1e-5


@pytest.mark.slow
def test_bfloat16_weights_have_float32_ones_beside_them(runs: Path) -> None:
    for name in ("zero2_bf16", "zero3_bf16"):
        assert _largest_difference(runs / name, runs / "one", "train/loss") < 0.02  # bfloat16 has 8 bits; measured: 0.002
        assert {weight.dtype for weight in _weights(runs / name).values()} == {torch.bfloat16}
        master = ZeroFiles(runs / name / "checkpoints/step_000020")
        for parameter, weight in _weights(runs / name).items():
            whole = master.read("weight", parameter, 0, weight.numel()).view(weight.shape)
            assert torch.equal(whole.bfloat16(), weight)
        assert any(not torch.equal(master.sources()[p][2](), w.float()) for p, w in _weights(runs / name).items())


# ---- going on


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3_resumed", "zero3_bf16_resumed"])
def test_run_resumed_at_two_processes_is_the_uninterrupted_one_bit_for_bit(name: str, runs: Path) -> None:
    whole = runs / name.removesuffix("_resumed")
    assert [*_rows(runs / name).values()] == [row for step, row in _rows(whole).items() if step > 10]
    for file in ("model.safetensors", rank_file(0, 2), rank_file(1, 2)):
        path = f"checkpoints/step_000020/{file}"
        assert (runs / name / path).read_bytes() == (whole / path).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("zero3_to_one", "zero3"),
        ("zero3_to_zero3_of_one", "zero3"),
        ("zero3_to_zero1", "zero3"),
        ("zero1_to_zero3", "zero1"),
        ("ddp_to_zero3", "ddp"),
    ],
)
def test_any_number_of_processes_and_any_strategy_goes_on(name: str, whole: str, runs: Path) -> None:
    assert sorted(_rows(runs / name)) == list(range(11, 21))
    for column in ("train/loss", "grad_norm", "val/loss"):
        assert _largest_difference(runs / name, runs / whole, column) < 1e-5  # measured: 1e-6


@pytest.mark.slow
def test_checkpoint_of_another_optimizer_is_refused(runs: Path) -> None:
    stopped = (runs / "sgd_to_adamw.stopped").read_text()
    assert "was trained with optim=sgd, this run has optim=adamw" in stopped


@pytest.mark.slow
def test_full_disk_stops_all_processes_with_one_message(runs: Path) -> None:
    stopped = (runs / "full_disk.stopped").read_text()
    assert "step_000010 could not be written: No space left on device" in stopped and "\n" not in stopped


# ---- what lies on disk


@pytest.mark.slow
def test_checkpoint_holds_each_number_once_and_a_model_to_load(runs: Path) -> None:
    for name in STAGES:
        folder = runs / name / "checkpoints/step_000020"
        assert find_fault(folder) is None
        pieces = [load_file(folder / rank_file(rank, 2)) for rank in range(2)]
        model = CSM.from_pretrained(runs / name)
        assert sum(tensor.numel() for piece in pieces for tensor in piece.values()) == 3 * model.num_parameters
        assert 0.4 < sum(tensor.numel() for tensor in pieces[0].values()) / (3 * model.num_parameters) < 0.6
        assert json.loads((folder / "manifest.json").read_text())["world_size"] == 2
        assert ZeroFiles(folder).num_updates == 20


@pytest.mark.slow
def test_torn_and_mixed_checkpoints_are_named(runs: Path, tmp_path: Path) -> None:
    source = runs / "zero3/checkpoints"
    mixed = tmp_path / "step_000020"
    shutil.copytree(source / "step_000020", mixed)
    shutil.copyfile(source / "step_000010" / rank_file(1, 2), mixed / rank_file(1, 2))
    assert find_fault(mixed) == f"{rank_file(1, 2)} differs from the manifest's sha256"
    (mixed / rank_file(1, 2)).unlink()
    assert find_fault(mixed) == f"{rank_file(1, 2)} is missing"
    part = open_part(tmp_path / "step_000030")
    shutil.copytree(source / "step_000020/zero", part / "zero")
    publish(part, tmp_path / "step_000030", step=30, world_size=2)
    with pytest.raises(ValueError, match="index.json is of step=20, the manifest of 30"):
        ZeroFiles(tmp_path / "step_000030")


def test_pieces_with_a_gap_are_refused(tmp_path: Path) -> None:
    part = open_part(tmp_path / "step_000001")
    (part / "zero").mkdir()
    write_index(part, [[("w", 0, 3)], [("w", 4, 2)]], {"w": (2, 3)}, step=1, optimizer="sgd", moments=[], num_updates=0)
    publish(part, tmp_path / "step_000001", step=1, world_size=2)
    with pytest.raises(ValueError, match=r"the pieces of w do not make up \[2, 3\]"):
        ZeroFiles(tmp_path / "step_000001")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csm", "sesame", "transformers"])
def test_export_puts_the_float32_weights_together(layout: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert csm_command(["export", str(runs / "zero3_bf16"), str(tmp_path / "out"), "--layout", layout]) == 0
    assert "put together from zero/" in capsys.readouterr().out
    exported = CSM.from_pretrained(tmp_path / "out", dtype=None).state_dict()
    master = ZeroFiles(runs / "zero3_bf16/checkpoints/step_000020").sources()
    assert all(torch.equal(exported[name], master[name][2]()) for name in exported)


@pytest.mark.slow
def test_export_of_a_float32_run_is_the_checkpoints_own_file(runs: Path, tmp_path: Path) -> None:
    for name in STAGES:
        csm_command(["export", str(runs / name), str(tmp_path / name), "--layout", "csm"])
        own = runs / name / "checkpoints/step_000020/model.safetensors"
        assert (tmp_path / name / "model.safetensors").read_bytes() == own.read_bytes()


@pytest.mark.slow
def test_export_needs_memory_for_a_few_tensors_only(tmp_path: Path) -> None:
    shape = {"num_layers": 24, "width": 512, "num_heads": 8, "num_kv_heads": 4, "ffn_width": 1536}
    config = ModelConfig(name="larger", num_codebooks=4, audio_vocab_size=33)
    config.backbone = type(config.backbone)(**shape)
    with torch.device("meta"):
        model = CSM(config)
    folder = tmp_path / "step_000001"
    part = open_part(folder)
    (part / "zero").mkdir()
    owned: list[list[tuple[str, int, int]]] = [[], []]
    for rank in range(2):
        sources = {}
        for name, parameter in model.named_parameters():
            half = parameter.numel() // 2
            owned[rank].append((name, rank * half, parameter.numel() - half if rank else half))
            sources[f"weight/{name}"] = ((owned[rank][-1][2],), torch.float32, _filled(owned[rank][-1][2], rank))
        stream_tensors(part / rank_file(rank, 2), sources, {})
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write_index(part, owned, shapes, step=1, optimizer="sgd", moments=[], num_updates=0)
    save_model(model, part, sources={name: (shape, torch.bfloat16, _zeros(shape)) for name, shape in shapes.items()})
    publish(part, folder, step=1, world_size=2)

    size = 4 * model.num_parameters
    assert size > 300e6
    # The files are mapped privately, which counts as data though it takes no memory; all the rest has to fit into 64 MiB.
    script = (
        "import re, resource, sys\n"
        "from csm.cli.commands import main\n"
        "import csm.model.pretrained, csm.training.zero_files, csm.model.csm\n"
        "now = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read()).group(1)) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[1]), -1))\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )

    def export(limit: int, target: Path) -> subprocess.CompletedProcess[str]:
        arguments = [str(limit), "export", str(folder), str(target), "--layout", "transformers"]
        return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = export(size + 64 * 2**20, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out/model.safetensors")["backbone_model.layers.0.mlp.gate_proj.weight"]
    assert written.flatten()[[0, -1]].tolist() == [0.0, 1.0]
    assert export(size - 64 * 2**20, tmp_path / "less").returncode != 0  # the limit is one


def _zeros(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(shape, dtype=torch.bfloat16)


def _filled(numel: int, value: float) -> Callable[[], torch.Tensor]:
    return lambda: torch.full((numel,), float(value))


# ---- as a user types it


@pytest.mark.slow
def test_train_py_runs_zero2_in_two_processes_it_starts_itself(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    overrides = [*TINY, "trainer=zero2", "trainer.devices=2", "data.rows_per_batch=2", "trainer.max_steps=2", f"run_dir={tmp_path / 'out'}"]
    done = run_isolated([sys.executable, "train.py", *overrides], timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best checkpoint" in done.stdout and done.stdout.count("run folder") == 2  # once at the start, once in the summary
    # gloo grumbles that nobody has a name on this network.
    assert not [line for line in done.stderr.splitlines() if line.strip() and "hostname of the client socket" not in line], done.stderr
    assert len(list((tmp_path / "out/checkpoints/step_000002/zero").glob("rank_*"))) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer=zero9"], "trainer=zero9: no such choice (did you mean zero"),
        (["trainer.strategy=zero9"], "trainer.strategy='zero9': expected one of auto, ddp, zero1"),
        (["trainer=zero2", "optim=adafactor"], "optim.name='adafactor': expected adamw or sgd with trainer.strategy=zero2"),
        (["trainer=zero1", "optim=muon"], "optim.name='muon': expected adamw or sgd"),
        (["trainer=zero1", "trainer.precision=bf16-true"], "trainer.precision='bf16-true': expected 32 or bf16-mixed"),
        (["trainer=zero3", "trainer.compile=true"], "trainer.compile=True: expected false"),
        (["trainer=zero1", "ema.decay=0.9"], "ema.decay=0.9: expected 0 with trainer.strategy=zero1"),
    ],
)
def test_what_zero_cannot_do_is_refused_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        compose("train", overrides, TrainConfig)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_missing_deepspeed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm.training.zero import ZeroStrategy

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"trainer\.strategy=zero1 needs DeepSpeed .*pip install -c constraints/core\.txt deepspeed"):
        ZeroStrategy(compose("train", ["trainer=zero1"], TrainConfig))


# ---- the fixture itself


def test_isolated_command_sees_loopback_only_and_a_shared_memory_of_its_own() -> None:
    script = (
        "import os, socket; print(sorted(name for _, name in socket.if_nameindex())); print(os.listdir('/dev/shm'));"
        f"s = socket.create_server(('{SECOND_ADDRESS}', 0)); print(socket.create_connection(s.getsockname()).getpeername()[0]);"
        "print(os.environ['WORD']); os.kill(os.getpid(), 15)"
    )
    done = run_isolated([sys.executable, "-u", "-c", script], env={"WORD": "given"}, timeout=60)
    assert done.stdout.split("\n")[:4] == ["['lo']", "[]", SECOND_ADDRESS, "given"], done.stdout + done.stderr
    assert done.returncode == 128 + 15


def test_isolated_command_that_takes_too_long_is_killed_with_its_children() -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '987.654']); print('started', flush=True); time.sleep(100)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_isolated([sys.executable, "-c", script], timeout=2)
    assert "started" in caught.value.stdout
    time.sleep(0.2)
    assert "987.654" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


# ---- tensors written one at a time


def test_streamed_file_is_safetensors_own_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c.é": torch.arange(5), "e": torch.zeros(0, 3)}
    tensors |= {"s": torch.tensor(2.5), "m": torch.tensor([True, False]), "i": torch.arange(3).short(), "h": torch.randn(2).half()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    stream_tensors(tmp_path / "ours", {name: (tuple(t.shape), t.dtype, t.detach) for name, t in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
