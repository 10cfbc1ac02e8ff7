"""`csm voices`: list, show and add voice presets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from csm.cli.subcommand import DEFAULT_VOICES, add_command


def declare(commands: Any) -> None:
    """Add `voices` to the subcommands."""
    command = add_command(commands, "voices", None, "List, show and add voice presets: recorded prompts with their terms.")
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--voices", type=Path, default=DEFAULT_VOICES, metavar="DIR", help="where presets lie (default: %(default)s)")
    where.add_argument("--checkpoint", metavar="C", help="also those that came with a checkpoint; needed by add, for its codec")

    listing = actions.add_parser("list", parents=[where], help="name, duration, speaker and licence of each")
    listing.set_defaults(run=_voices_list)
    listing.add_argument("--json", action="store_true")

    show = actions.add_parser("show", parents=[where], help="all that is known of one, as JSON")
    show.set_defaults(run=_voices_show)
    show.add_argument("name", metavar="NAME")

    add = actions.add_parser("add", parents=[where], help="encode a recording of at most 30 s")
    add.set_defaults(run=_voices_add)
    add.add_argument("name", metavar="NAME", help="letters, digits, - and _")
    add.add_argument("--audio", type=Path, required=True, metavar="FILE", help="the recording, any sample rate")
    add.add_argument("--text", required=True, metavar="T", help="what is said in it, word for word")
    add.add_argument("--speaker-name", required=True, metavar="WHO", help="whose voice it is")
    add.add_argument("--licence", required=True, metavar="L", help="of the recording, e.g. CC-BY-4.0")
    add.add_argument("--consent", required=True, metavar="NOTE", help="how the speaker agreed to this use of their voice")
    add.add_argument("--speaker", type=int, default=0, metavar="N", help="number it is spoken under by default (default: %(default)s)")


def _voice_folders(arguments: argparse.Namespace) -> list[Path]:
    from csm.codec.voices import VOICES_FOLDER
    from csm.model.pretrained import resolve_checkpoint

    folders = [arguments.voices]
    if arguments.checkpoint is not None:
        folders.append(resolve_checkpoint(arguments.checkpoint) / VOICES_FOLDER)
    return folders


def _described(name: str, folders: list[Path]) -> dict[str, object]:
    from csm.generation.voices import load_voice

    voice = load_voice(name, folders)
    return {
        "name": voice.name,
        "text": voice.text,
        "speaker": voice.speaker,
        "speaker_name": voice.speaker_name,
        "licence": voice.licence,
        "consent": voice.consent,
        "duration_s": round(voice.duration_s, 2),
        "codec_digest": voice.codec_digest,
    }


def _voices_list(arguments: argparse.Namespace) -> int:
    from csm.generation.voices import find_voices

    folders = _voice_folders(arguments)
    voices = [_described(name, folders) for name in sorted(find_voices(folders))]
    if arguments.json:
        print(json.dumps(voices, indent=1, ensure_ascii=False))
    elif not voices:
        print(f"no voices in {', '.join(str(folder) for folder in folders)}; `csm voices add --help` says how to make one")
    for voice in [] if arguments.json else voices:
        print(f"{voice['name']:<20} {voice['duration_s']:>6} s  speaker {voice['speaker']}  {voice['speaker_name']}  [{voice['licence']}]")
    return 0


def _voices_show(arguments: argparse.Namespace) -> int:
    print(json.dumps(_described(arguments.name, _voice_folders(arguments)), indent=1, ensure_ascii=False))
    return 0


def _voices_add(arguments: argparse.Namespace) -> int:
    if arguments.checkpoint is None:
        raise ValueError("csm voices add needs --checkpoint: a preset is kept as codes of that model's codec")
    from csm.codec.voices import save_voice
    from csm.generation.audio_files import read_audio
    from csm.generation.checkpoint import load_codec_of
    from csm.generation.voices import voice_from_recording

    waveform, _ = read_audio(arguments.audio)
    voice = voice_from_recording(
        arguments.name,
        waveform,
        load_codec_of(arguments.checkpoint),
        text=arguments.text,
        speaker_name=arguments.speaker_name,
        licence=arguments.licence,
        consent=arguments.consent,
        speaker=arguments.speaker,
    )
    print(f"{save_voice(voice, arguments.voices)}: {voice.duration_s:.2f} s")
    return 0
