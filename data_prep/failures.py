"""What was dropped, and why: a row of failures.jsonl, and the exception that becomes one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class Rejected(ValueError):
    """A recording or a turn that cannot be used.

    Args:
        reason: one word of a closed list (docs/data.md), for counting.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(order=True)
class Failure:
    """A row of failures.jsonl.

    Attributes:
        source: path of the recording relative to the input.
        turn: index of the dropped turn, or -1 when the recording is dropped as a whole.
        stage: "manifest", "ingest" or "encode".
        reason, detail: as in `Rejected`.
        duration_s: of what is lost, as far as it is known.
    """

    source: str
    turn: int
    stage: str
    reason: str
    detail: str
    duration_s: float = 0.0

    @classmethod
    def of(cls, source: str, stage: str, why: Rejected, *, turn: int = -1, duration_s: float = 0.0) -> Failure:
        return cls(source, turn, stage, why.reason, why.detail, round(duration_s, 3))

    def row(self) -> dict[str, Any]:
        return asdict(self)
