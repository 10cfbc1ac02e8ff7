"""The `csm` command: generate, watermark, export, voices, plan, listen.

Each subcommand declares its options and runs them; the long ones have files of their own. Mistakes of the user end with one
line on stderr and status 2; CSM_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from csm.cli import export, generate, listen, voices, watermark
from csm.cli.subcommand import add_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of --out - went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("CSM_DEBUG") == "1":
            traceback.print_exception(error)
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="csm",
        description="Speak with a CSM, verify watermarks, convert checkpoints, keep voices, plan runs.",
        epilog="Training, evaluation and data preparation have commands of their own: train.py, evaluate.py, python -m data_prep.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for declare in (
        generate.declare,
        watermark.declare,
        export.declare,
        voices.declare,
        _declare_plan,
        listen.declare,
    ):  # one line a command
        declare(commands)
    return parser


_PLAN_KEYS = "of csm.config.PlanConfig: model=csm_1b devices=8 hours=1e5; after prep, of csm.config.PrepPlanConfig: hours=1e6 devices=64"


def _declare_plan(commands: Any) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "What a training run would need: parameters, FLOPs, memory a GPU, GPU-hours; `plan prep`: what preparing its data would.",
        "examples: csm plan model=csm_8b devices=64 hours=1000000; csm plan prep hours=1e6 cores=4096 devices=64",
    )
    command.add_argument("overrides", nargs="*", metavar="[prep] KEY=VALUE", help=_PLAN_KEYS)
    command.add_argument("--json", action="store_true")


def _plan(arguments: argparse.Namespace) -> int:
    from csm.cli.plan import plan_command  # Hydra is for this command only
    from csm.cli.plan_prep import plan_prep_command

    if arguments.overrides[:1] == ["prep"]:
        plan_prep_command(arguments.overrides[1:], as_json=arguments.json)
    else:
        plan_command(arguments.overrides, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
