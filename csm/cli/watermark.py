"""`csm watermark`: do sound files carry our mark?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm.generation.watermark import Watermarker

from csm.cli.subcommand import add_command
from csm.config import DEFAULT_WATERMARK, WATERMARK_KEY_VARIABLE


def declare(commands: Any) -> None:
    """Add `watermark` to the subcommands."""
    command = add_command(
        commands,
        "watermark",
        _watermark,
        "Verify that sound files carry our watermark: status 0 when all do, 1 when one does not.",
        f"The mark `keyed` is looked for with the key in {WATERMARK_KEY_VARIABLE}, or the public one where that is not set; a file is\n"
        "called marked when sound made without the key would score as high less than once in a million times. docs/watermark.md\n"
        "says what survives which treatment.",
    )
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="WAV, FLAC, OGG or MP3, any sample rate")
    decides = DEFAULT_WATERMARK.split("+")[0]
    command.add_argument(
        "--mark", default=decides, metavar="NAME", help="which one decides: keyed, perth, silentcipher, audioseal (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="a list of {file, mark, is_marked, confidence, p_value, also, noted}")


def _watermark(arguments: argparse.Namespace) -> int:
    from csm.generation.audio_files import read_audio, read_provenance
    from csm.generation.watermark import MARKS, load_watermarker

    if arguments.mark not in MARKS:
        raise ValueError(f"--mark {arguments.mark}: expected one of {', '.join(MARKS)}")
    decisive = load_watermarker(arguments.mark)
    assert decisive is not None
    others = _others(decisive)
    results: list[dict[str, Any]] = []
    for path in arguments.files:
        waveform, sample_rate = read_audio(path, resample=False)
        results.append(
            {
                "file": str(path),
                **_heard(arguments.mark, decisive, waveform, sample_rate),
                "also": [_heard(name, other, waveform, sample_rate) for name, other in others.items()],
                "noted": read_provenance(path).get("watermark"),
            }
        )
        if not arguments.json:
            print(_line(results[-1]))
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["is_marked"] for result in results) else 1


def _others(decisive: Watermarker) -> dict[str, Watermarker]:
    """Marks that are told of besides, but decide nothing: the public key where another is set, and Perth's."""
    from csm.generation.keyed_mark import PUBLIC_KEY, KeyedWatermarker
    from csm.generation.perth_mark import PerthWatermarker

    others: dict[str, Watermarker] = {}
    if isinstance(decisive, KeyedWatermarker):
        if decisive.key_kind == "secret":
            others["keyed with the public key"] = KeyedWatermarker(PUBLIC_KEY)
        others["perth"] = PerthWatermarker()
    return others


def _heard(name: str, watermarker: Watermarker, waveform: Any, sample_rate: int) -> dict[str, Any]:
    heard = watermarker.detect(waveform, sample_rate)
    return {"mark": name, "is_marked": heard.is_marked, "confidence": round(heard.confidence, 4), "p_value": heard.p_value}


def _line(result: dict[str, Any]) -> str:
    told = ", ".join(f"{other['mark']} {'found' if other['is_marked'] else 'not found'}" for other in result["also"])
    if result["p_value"] is None:
        evidence = f"{result['mark']}, confidence {result['confidence']:.3f}"
    else:
        evidence = f"{result['mark']}, p {'=' if result['p_value'] > 1e-30 else '<'} {max(result['p_value'], 1e-30):.1g}"
    noted = "" if result["noted"] != "off" else "; its metadata says the mark was turned off"
    return f"{result['file']}: {'marked' if result['is_marked'] else 'NOT marked'} ({evidence}){'; ' if told else ''}{told}{noted}"
