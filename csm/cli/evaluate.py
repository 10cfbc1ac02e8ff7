"""The recipe of an evaluation: one call, once the command line is known to be right."""

from __future__ import annotations

from csm.cli.hydra_entry import main as hydra_main
from csm.config import EvaluateConfig

_ABOUT = (
    "Speak the held-out lines with a run's checkpoint, let a real speech recogniser and a speaker encoder judge every clip, and write "
    "<run>/evaluation/summary.json, samples.jsonl, clips/ and report.html."
)
_EXAMPLES = (
    "evaluate.py run=runs/demo/2026-01-01_12-00-00",
    "evaluate.py run=runs/demo/mine checkpoint=last temperatures=[0.0,0.9] max_utterances=20 output=/tmp/quick",
)


def main() -> None:
    """`python evaluate.py`."""
    hydra_main("evaluate", EvaluateConfig, _evaluate, about=_ABOUT, examples=_EXAMPLES)


def _evaluate(config: EvaluateConfig) -> None:
    from csm.evaluation.runner import evaluate  # torch and Whisper take seconds to import; --help and a typo do without

    evaluate(config)
