"""How a subcommand of `csm` is added, and where presets lie by default."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_VOICES = Path("voices")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, summary: str, epilog: str = "") -> Any:
    """Add one subcommand; `run` takes its arguments and returns the exit status."""
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if run is not None:
        command.set_defaults(run=run)
    return command
