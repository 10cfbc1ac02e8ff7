"""`csm listen`: a page for a blind listening test of two evaluated runs, and the score of its votes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from csm.cli.subcommand import add_command


def declare(commands: Any) -> None:
    """Add `listen` to the subcommands."""
    command = add_command(
        commands,
        "listen",
        None,
        "A blind listening test of two evaluated runs: a page to send, and what its votes say.",
        "example: csm listen page runs/a runs/b --out test.html; csm listen score test.html.key.json votes-*.json",
    )
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    page = actions.add_parser("page", help="write the page, and beside it the key that says whose clip is whose")
    page.set_defaults(run=_page)
    page.add_argument("a", type=Path, metavar="A", help="a run that was evaluated, or its evaluation folder")
    page.add_argument("b", type=Path, metavar="B", help="the other")
    page.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    page.add_argument("--row", default="model", help="row of the evaluation's table, as its folder under clips/ (default: %(default)s)")
    page.add_argument("--pairs", type=int, default=20, metavar="N", help="at most (default: %(default)s)")
    page.add_argument("--seed", type=int, default=0, metavar="N", help="draws lines, order and sides (default: %(default)s)")
    score = actions.add_parser("score", help="mean vote for B over A, -3 to 3, with its 95%% interval")
    score.set_defaults(run=_score)
    score.add_argument("key", type=Path, metavar="KEY.json")
    score.add_argument("votes", type=Path, nargs="+", metavar="VOTES.json", help="files that listeners saved")
    score.add_argument("--json", action="store_true")


def _page(arguments: argparse.Namespace) -> int:
    from csm.evaluation.blind import find_pairs, write_page

    pairs = find_pairs(arguments.a, arguments.b, arguments.row)
    names = (str(arguments.a), str(arguments.b))
    key = write_page(pairs, arguments.out, names=names, num_pairs=arguments.pairs, seed=arguments.seed)
    print(f"{arguments.out}: {min(arguments.pairs, len(pairs))} pairs of {len(pairs)}; send this page, and keep {key} to yourself")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from csm.evaluation.blind import score

    found = score(arguments.key, arguments.votes)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    mean = found["cmos_b_over_a"]
    print(f"A {found['a']}\nB {found['b']}")
    print(
        f"B over A: {mean['value']:+.2f} [{mean['low']:+.2f}, {mean['high']:+.2f}], {mean['n']} votes, {found['num_listeners']} listeners"
    )
    print(f"B preferred {found['b_preferred']:.0%}, A {found['a_preferred']:.0%}")
    return 0
