"""Error rates of diarization, detection and words by the field's own programs; run by prep_accuracy.py in the folder's tools.

Reads {"der" | "detection": {group: {name: {"truth": [[start, end, speaker]], "found": [...]}}}, "cpwer": {name: [truth, found]}}
from stdin and writes rates to stdout. Collars are of `pyannote.metrics`: in all, half of it on each side.
"""

from __future__ import annotations

import json
import sys

from meeteval.wer import cp_word_error_rate
from pyannote.core import Annotation, Segment
from pyannote.metrics.detection import DetectionErrorRate
from pyannote.metrics.diarization import DiarizationErrorRate


def annotation(spans: list[list]) -> Annotation:
    made = Annotation()
    for index, (start_s, end_s, speaker) in enumerate(spans):
        made[Segment(start_s, end_s), index] = str(speaker)
    return made


def main() -> None:
    asked = json.load(sys.stdin)
    answer: dict = {"der": {}, "detection": {}, "cpwer": {}}
    for group, entries in asked["der"].items():
        metric = DiarizationErrorRate(collar=0.5)
        each = {name: metric(annotation(entry["truth"]), annotation(entry["found"])) for name, entry in entries.items()}
        answer["der"][group] = {"all": abs(metric), "each": each}
    for group, entries in asked["detection"].items():
        for collar in (0.0, 0.5):
            metric = DetectionErrorRate(collar=collar)
            for entry in entries.values():
                metric(annotation(entry["truth"]), annotation(entry["found"]))
            parts = metric[:]
            answer["detection"][f"{group}, collar {collar / 2:g} s"] = {
                "all": abs(metric),
                "missed": parts["miss"] / parts["total"],
                "false": parts["false alarm"] / parts["total"],
            }
    for name, (truth, found) in asked["cpwer"].items():
        rate = cp_word_error_rate(truth, found)
        answer["cpwer"][name] = {"errors": rate.errors, "length": rate.length}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
