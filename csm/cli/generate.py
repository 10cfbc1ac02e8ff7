"""`csm generate`: say a text on the command line, alone, in a conversation, or line by line from a file.

What can be checked without the model is checked before it is loaded. Progress and the closing report go to stderr, because
stdout may carry sound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

    from csm.frames import Turn
    from csm.generation.generator import Generator, Request

from csm.cli.subcommand import DEFAULT_VOICES, add_command

_REQUEST_KEYS = ("text", "speaker", "context", "voice", "out", "seed", "temperature", "top_k", "max_duration_s")


def declare(commands: Any) -> None:
    """Add `generate` to the subcommands."""
    command = add_command(
        commands,
        "generate",
        _generate,
        "Say a text, in the context of a conversation or with a voice preset.",
        "examples:\n"
        "  csm generate --checkpoint runs/demo/<date_time> --text 'seven four two' --speaker 0 --out out.wav\n"
        "  csm generate --checkpoint C --text 'nine one' --context conversation.json --stream --out - | aplay -r 24000 -f S16_LE\n"
        "  csm generate --checkpoint C --jsonl lines.jsonl --out spoken/\n\n"
        'conversation.json is a list of {"speaker": 0, "text": "...", "audio": "path.wav"}, oldest first; paths are relative to it.\n'
        "A line of --jsonl is an object with text and, as needed, speaker, context (as above), voice, out, seed, temperature,\n"
        "top_k, max_duration_s; what it leaves out is taken from the command line.",
    )
    command.add_argument("--checkpoint", required=True, metavar="C", help="a run, a checkpoint folder, or a hub id")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="T", help="what to say")
    what.add_argument("--jsonl", type=Path, metavar="FILE", help="one request a line, decoded together; --out is then a folder")
    command.add_argument("--out", required=True, metavar="FILE", help="a .wav or .flac file; - writes raw 16-bit samples to stdout")
    command.add_argument("--speaker", type=int, metavar="N", help="the number in front of the text (default: the voice's, or 0)")
    command.add_argument("--context", type=Path, metavar="FILE", help="conversation.json: turns heard before")
    command.add_argument("--voice", metavar="NAME", help="a preset that goes in front as context (see csm voices)")
    command.add_argument("--voices", type=Path, default=DEFAULT_VOICES, metavar="DIR", help="where presets lie (default: %(default)s)")
    command.add_argument("--stream", action="store_true", help="write while speaking")
    command.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal speech (default: drawn, and noted in the file)")
    command.add_argument("--temperature", type=float, default=0.9, metavar="X", help="0 is greedy (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=50, metavar="N", help="0 keeps every code (default: %(default)s)")
    command.add_argument("--max-duration", type=float, default=10.0, metavar="S", help="seconds, at most (default: %(default)s)")
    command.add_argument("--watermark", choices=("perth", "off"), default="perth", help="off is noted in the file (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: %(default)s)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="of torch on CPU; 0 leaves torch's choice")


def _generate(arguments: argparse.Namespace) -> int:
    from csm.generation.audio_files import format_of
    from csm.generation.prompt import max_frames_from_duration
    from csm.generation.sampling import check_sampling

    # Everything that can be checked without the model comes first: loading one takes long.
    check_sampling(arguments.temperature, arguments.top_k)
    max_frames_from_duration(arguments.max_duration)
    if arguments.text is not None and not arguments.text.strip():
        raise ValueError("--text is empty; give something to say")
    if arguments.jsonl is not None:
        if arguments.out == "-" or arguments.stream:
            raise ValueError("--jsonl writes files into the folder --out; it goes with neither --out - nor --stream")
        lines = _read_jsonl(arguments.jsonl)
    elif arguments.out != "-":
        format_of(Path(arguments.out))
    context = [] if arguments.context is None else read_conversation(arguments.context)
    generator = _load_generator(arguments)
    if arguments.jsonl is not None:
        return _generate_lines(arguments, generator, lines, context)
    request = _request(arguments, generator, {"text": arguments.text}, context, Path())
    return _generate_one(arguments, generator, request)


def _generate_one(arguments: argparse.Namespace, generator: Generator, request: Request) -> int:
    from csm.generation.audio_files import pcm16, write_audio

    started_s = time.perf_counter()
    chunks = generator.stream(
        request.text,
        request.speaker,
        request.context,
        max_duration_s=request.max_duration_s,
        temperature=request.temperature,
        top_k=request.top_k,
        seed=request.seed,
    )
    progress = _Progress(request.max_frames)
    with progress:
        watched = progress.watch(chunks)
        if arguments.out == "-":
            num_samples = _write_raw(sys.stdout.buffer, (pcm16(chunk).tobytes() for chunk in watched)) // 2
        else:
            sound = watched if arguments.stream else iter(list(watched))
            num_samples = write_audio(Path(arguments.out), _not_empty(sound), _provenance(arguments, generator, request))
    _report(arguments.out, generator, num_samples, time.perf_counter() - started_s, progress.first_sound_s if arguments.stream else None)
    return 0


def _generate_lines(arguments: argparse.Namespace, generator: Generator, lines: list[dict[str, Any]], context: list[Turn]) -> int:
    from csm.generation.audio_files import format_of, write_audio

    folder = Path(arguments.out)
    requests: list[Request] = []
    paths: list[Path] = []
    for number, line in enumerate(lines, start=1):
        name = str(line.get("out", f"{number:05d}.wav"))
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{arguments.jsonl}: line {number}: out={name!r} leaves the folder --out; give a name inside it")
        try:
            format_of(Path(name))
            requests.append(_request(arguments, generator, line, context, arguments.jsonl.parent))
        except (ValueError, OSError) as error:
            raise ValueError(f"{arguments.jsonl}: line {number}: {error}") from error
        paths.append(folder / name)
    if len(set(paths)) < len(paths):
        raise ValueError(f"{arguments.jsonl}: two lines have the same out; give each its own")
    started_s = time.perf_counter()
    results = generator.generate_codes_batch(requests)
    num_samples = 0
    for path, request, result in zip(paths, requests, results, strict=True):
        waveform = generator.audio_from_codes(result.codes)
        num_samples += write_audio(path, _not_empty(iter([waveform])), _provenance(arguments, generator, request))
        if not result.reached_eos:
            print(f"{path}: cut at {request.max_duration_s:g} s, the model did not end by itself", file=sys.stderr)
    _report(f"{folder} ({len(paths)} files)", generator, num_samples, time.perf_counter() - started_s, None)
    return 0


def _load_generator(arguments: argparse.Namespace) -> Generator:
    import torch

    from csm.generation.generator import Generator

    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device}: not a device of this machine ({str(error).splitlines()[0]})") from error
    return Generator.from_pretrained(arguments.checkpoint, device, getattr(torch, arguments.dtype), watermark=arguments.watermark)


def _request(arguments: argparse.Namespace, generator: Generator, line: dict[str, Any], context: list[Turn], folder: Path) -> Request:
    """One request: what the line says, else what the command line says."""
    from csm.generation.generator import Request
    from csm.generation.voices import load_voice
    from csm.model.pretrained import resolve_checkpoint

    unknown = set(line) - set(_REQUEST_KEYS)
    if unknown:
        raise ValueError(f"key {sorted(unknown)[0]!r} is not known; there are: {', '.join(_REQUEST_KEYS)}")
    speaker = line.get("speaker", arguments.speaker)
    turns = _turns(line["context"], folder, "context") if "context" in line else list(context)
    voice_name = line.get("voice", arguments.voice)
    if voice_name is not None:
        voice = load_voice(voice_name, [arguments.voices, resolve_checkpoint(arguments.checkpoint) / "voices"])
        speaker = voice.speaker if speaker is None else speaker
        turns.insert(0, voice.turn(generator.codec, speaker))
    text = line.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r}: expected something to say")
    try:
        request = Request(
            text=text,
            speaker=0 if speaker is None else int(speaker),
            context=turns,
            max_duration_s=float(line.get("max_duration_s", arguments.max_duration)),
            temperature=float(line.get("temperature", arguments.temperature)),
            top_k=int(line.get("top_k", arguments.top_k)),
            seed=line.get("seed", arguments.seed),
        )
    except TypeError as error:
        raise ValueError(f"{error}; numbers are expected for speaker, seed, temperature, top_k and max_duration_s") from error
    generator.prompts.build(request.text, request.speaker, request.context, request.max_frames)  # refuse now what cannot be said
    return request


def read_conversation(path: Path) -> list[Turn]:
    """The turns of a conversation.json; audio is read, resampled to 24 kHz and mixed down to mono.

    Raises:
        FileNotFoundError, ValueError: with the file, the turn and what was expected.
    """
    return _turns(read_json(path), path.parent, str(path))


def _turns(entries: Any, folder: Path, where: str) -> list[Turn]:
    from csm.frames import Turn
    from csm.generation.audio_files import read_audio

    expected = '{"speaker": 0, "text": "...", "audio": "path.wav"}'
    if not isinstance(entries, list):
        raise ValueError(f"{where}: a {type(entries).__name__}, expected a list of {expected}")
    turns = []
    for index, entry in enumerate(entries):
        place = f"{where}: turn {index}"
        if not isinstance(entry, dict) or set(entry) != {"speaker", "text", "audio"}:
            got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{place} is {got}, expected {expected}")
        if type(entry["speaker"]) is not int or not isinstance(entry["text"], str) or not isinstance(entry["audio"], str):
            raise ValueError(f"{place}: speaker must be a whole number, text and audio strings; expected {expected}")
        try:
            audio, _ = read_audio(folder / entry["audio"])
        except (ValueError, OSError) as error:
            raise ValueError(f"{place}: {error}") from error
        turns.append(Turn(entry["speaker"], entry["text"], audio=audio))
    return turns


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError, ValueError: with the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{path}: line {number} is a {type(entry).__name__}, expected an object such as {{"text": "..."}}')
        lines.append(entry)
    if not lines:
        raise ValueError(f"{path}: no requests in it")
    return lines


def _provenance(arguments: argparse.Namespace, generator: Generator, request: Request) -> dict[str, object]:
    from csm import __version__

    return {
        "software": f"csm-lab {__version__}",
        "synthetic": True,
        "watermark": generator.watermark_name,
        "checkpoint": "/".join(Path(arguments.checkpoint).parts[-3:]),
        "speaker": request.speaker,
        "seed": request.seed,
        "temperature": request.temperature,
        "top_k": request.top_k,
    }


def _not_empty(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    is_empty = True
    for chunk in chunks:
        is_empty = is_empty and chunk.shape[0] == 0
        yield chunk
    if is_empty:
        raise ValueError("the model ended at once and said nothing; try another seed or temperature, or a longer-trained checkpoint")


def _write_raw(stream: BinaryIO, parts: Iterator[bytes]) -> int:
    num_bytes = 0
    for part in parts:
        num_bytes += stream.write(part)
        stream.flush()
    return num_bytes


class _Progress:
    """A live line on stderr, where that is a terminal: frames so far and the real-time factor."""

    def __init__(self, max_frames: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.first_sound_s: float | None = None
        self._started_s = time.perf_counter()
        console = Console(stderr=True)
        count = TextColumn("{task.completed:.0f}/{task.total:.0f} frames")
        columns = (TextColumn("speaking"), BarColumn(), count, TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=max_frames)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def watch(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

        num_samples = 0
        for chunk in chunks:
            elapsed_s = time.perf_counter() - self._started_s
            if self.first_sound_s is None:
                self.first_sound_s = elapsed_s
            num_samples += chunk.shape[0]
            factor = elapsed_s * SAMPLE_RATE_HZ / num_samples
            self._bar.update(self._task, completed=num_samples / SAMPLES_PER_FRAME, description=f"RTF {factor:.2f}")
            yield chunk


def _report(name: str, generator: Generator, num_samples: int, elapsed_s: float, first_sound_s: float | None) -> None:
    """One line on stderr: stdout may carry sound."""
    from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

    spoken_s = num_samples / SAMPLE_RATE_HZ
    parts = [f"{round(num_samples / SAMPLES_PER_FRAME)} frames", f"{spoken_s:.2f} s of speech in {elapsed_s:.2f} s"]
    if spoken_s:
        parts.append(f"RTF {elapsed_s / spoken_s:.2f}")
    if first_sound_s is not None:
        parts.append(f"first sound after {first_sound_s:.2f} s")
    if generator.last is not None:
        parts.append(f"seed {generator.last.seed}")
        if generator.last.num_dropped_turns:
            parts.append(f"{generator.last.num_dropped_turns} old turns dropped")
        if not generator.last.reached_eos:
            parts.append("cut: the model did not end by itself")
    print(f"{'stdout' if name == '-' else name}: {', '.join(parts)}, watermark {generator.watermark_name}", file=sys.stderr)
