"""The documentation names commands that compose and files that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from csm.cli.hydra_entry import compose
from csm.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "slurm/README.md", "benchmarks/README.md")] + sorted((ROOT / "docs").glob("*.md"))


def _training_commands() -> list[str]:
    """Overrides of every `train.py` and train.sbatch line in a code block, without what stands for something else."""
    found = []
    for page in PAGES:
        for block in re.findall(r"(?ms)^```(?:bash|sh)?\n(.*?)^```", page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"(?:python |sbatch .*slurm/)train\.(?:py|sbatch)\b(.*)", line)
                if command and "--" not in command[1] and "<" not in command[1]:
                    found.append(" ".join(command[1].split("#")[0].split()))
    return sorted(set(found))


@pytest.mark.parametrize("overrides", _training_commands())
def test_training_command_of_the_docs_composes(overrides: str) -> None:
    compose("train", shlex.split(overrides), TrainConfig)


def test_docs_have_training_commands_of_both_kinds() -> None:
    assert len(_training_commands()) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            assert heading in [re.sub(r"[^a-z0-9 _-]", "", text.lower()).replace(" ", "-") for text in headings], link
