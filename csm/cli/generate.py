"""`csm generate`: say a text on the command line, alone, in a conversation, or line by line from a file.

What can be checked without the model is checked before it is loaded. Progress and the closing report go to stderr, because
stdout may carry sound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

    from csm.frames import Turn
    from csm.generation.generator import GeneratedCodes, Generator, Request

from csm.cli.conversation import read_conversation, read_json_lines, turns_from_json
from csm.cli.speaking_progress import Progress, print_report
from csm.cli.subcommand import DEFAULT_VOICES, add_command
from csm.config import DEFAULT_WATERMARK

_REQUEST_KEYS = (
    "text", "speaker", "context", "voice", "out", "seed", "temperature", "top_k", "max_duration_s", "min_duration_s", "trim_silence",
    "stop_loops", "adapter",
)  # fmt: skip


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
        "  csm generate --checkpoint C --batch lines.jsonl --out-dir spoken/ --compile\n\n"
        'conversation.json is a list of {"speaker": 0, "text": "...", "audio": "path.wav"}, oldest first; paths are relative to it.\n'
        "A line of --batch is an object with text and, as needed, speaker, context (as above), voice, out, seed, temperature,\n"
        "top_k, max_duration_s, min_duration_s, trim_silence, stop_loops, adapter (a NAME of --adapter, or null for none); what it leaves\n"
        "out is taken from the command line.",
    )
    command.add_argument("--checkpoint", required=True, metavar="C", help="a run, a checkpoint folder, or a hub id")
    adapter_help = (
        "speak with an adapter beside the checkpoint: a run of finetune.py or PEFT's folder; again for more, which --batch can name"
    )
    command.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=adapter_help)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="T", help="what to say")
    what.add_argument("--batch", "--jsonl", dest="jsonl", type=Path, metavar="FILE", help="JSON Lines, a request each, decoded together")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="FILE", help="a .wav or .flac file; - writes raw 16-bit samples to stdout; with --batch a folder")
    where.add_argument("--out-dir", dest="out", metavar="DIR", help="the folder of --batch")
    command.add_argument("--speaker", type=int, metavar="N", help="the number in front of the text (default: the voice's, or 0)")
    command.add_argument("--context", type=Path, metavar="FILE", help="conversation.json: turns heard before")
    command.add_argument("--voice", metavar="NAME", help="a preset that goes in front as context (see csm voices)")
    command.add_argument("--voices", type=Path, default=DEFAULT_VOICES, metavar="DIR", help="where presets lie (default: %(default)s)")
    command.add_argument("--stream", action="store_true", help="write while speaking")
    command.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal speech (default: drawn, and noted in the file)")
    command.add_argument("--temperature", type=float, default=0.9, metavar="X", help="0 is greedy (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=50, metavar="N", help="0 keeps every code (default: %(default)s)")
    command.add_argument("--max-duration", type=float, default=10.0, metavar="S", help="seconds, at most (default: %(default)s)")
    marks = "keyed, perth, silentcipher, audioseal, joined by +; off is noted in the file (default: %(default)s)"
    command.add_argument("--min-duration", type=float, default=0.0, metavar="S", help="seconds, at least (default: %(default)s)")
    command.add_argument("--trim-silence", action="store_true", help="cut the silence at the end, but for 0.1 s")
    command.add_argument("--stop-loops", action="store_true", help="end a reply that goes round in circles for 3 s")
    command.add_argument("--watermark", default=DEFAULT_WATERMARK, metavar="NAME", help=marks)
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: %(default)s)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="on CPU; 0 leaves torch's choice")
    command.add_argument("--compile", action="store_true", help="frames by machine code (CPU; needs a C++ compiler) or a CUDA graph")
    command.add_argument("--int8", action="store_true", help="with --compile, on a CPU: the depth decoder's weights in 8 bits")


def _generate(arguments: argparse.Namespace) -> int:
    from csm.generation.audio_files import format_of
    from csm.generation.prompt import max_frames_from_duration, min_frames_from_duration
    from csm.generation.sampling import check_sampling

    # Everything that can be checked without the model comes first: loading one takes long.
    check_sampling(arguments.temperature, arguments.top_k)
    if min_frames_from_duration(arguments.min_duration) > max_frames_from_duration(arguments.max_duration):
        raise ValueError(f"--min-duration {arguments.min_duration:g} is more than --max-duration {arguments.max_duration:g}")
    if arguments.int8 and not arguments.compile:
        raise ValueError("--int8 needs --compile: only the compiled loop reads 8-bit weights")
    if arguments.text is not None and not arguments.text.strip():
        raise ValueError("--text is empty; give something to say")
    if arguments.jsonl is not None:
        if arguments.out == "-" or arguments.stream:
            raise ValueError("--batch writes files into a folder; it goes with neither --out - nor --stream")
        lines = read_json_lines(arguments.jsonl)
        if Path(arguments.out).is_file():
            raise ValueError(f"{arguments.out} is a file; with --batch name a folder")
    elif Path(arguments.out).is_dir():
        raise ValueError(f"{arguments.out} is a folder; name a .wav or .flac file in it")
    elif arguments.out != "-":
        format_of(Path(arguments.out))
    context = [] if arguments.context is None else read_conversation(arguments.context)
    adapters = [_named_adapter(given) for given in arguments.adapter]
    generator = _load_generator(arguments)
    for name, place in adapters:
        generator.add_adapter(name, place)
    generator.set_adapter(adapters[0][0] if adapters else None)
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
        min_duration_s=request.min_duration_s,
        trim_silence=request.trim_silence,
        stop_loops=request.stop_loops,
    )
    progress = Progress(request.max_frames)
    with progress:
        watched = progress.watch(chunks)
        if arguments.out == "-":
            num_samples = _write_raw(sys.stdout.buffer, (pcm16(chunk).tobytes() for chunk in watched)) // 2
        else:
            sound = watched if arguments.stream else iter(list(watched))
            num_samples = write_audio(Path(arguments.out), _not_empty(sound), _provenance(arguments, generator, request, generator.adapter))
    print_report(
        arguments.out, generator, num_samples, time.perf_counter() - started_s, progress.first_sound_s if arguments.stream else None
    )
    return 0


def _generate_lines(arguments: argparse.Namespace, generator: Generator, lines: list[dict[str, Any]], context: list[Turn]) -> int:
    from csm.frames import seconds_from_frames
    from csm.generation.audio_files import format_of, write_audio

    folder = Path(arguments.out)
    requests: list[Request] = []
    paths: list[Path] = []
    speaking: dict[str | None, list[int]] = {}  # lines by adapter, which are spoken together
    default = generator.adapter
    for number, line in enumerate(lines, start=1):
        name = str(line.get("out", f"{number:05d}.wav"))
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{arguments.jsonl}: line {number}: out={name!r} leaves the folder --out; give a name inside it")
        try:
            format_of(Path(name))
            if (adapter := line.get("adapter", default)) != generator.adapter:
                generator.set_adapter(adapter)  # for the check of the text: adapters bring their tokenizers
            speaking.setdefault(adapter, []).append(number - 1)
            requests.append(_request(arguments, generator, line, context, arguments.jsonl.parent))
        except (ValueError, OSError) as error:
            raise ValueError(f"{arguments.jsonl}: line {number}: {error}") from error
        paths.append(folder / name)
    if len(set(paths)) < len(paths):
        raise ValueError(f"{arguments.jsonl}: two lines have the same out; give each its own")
    started_s = time.perf_counter()
    with Progress(max(request.max_frames for request in requests)) as progress:
        results: dict[int, GeneratedCodes] = {}
        for adapter, members in speaking.items():
            generator.set_adapter(adapter)
            chosen = [requests[index] for index in members]
            said = generator.generate_codes_batch(chosen, on_frame=lambda frame, rows: progress.show(frame, num_rows=rows))
            results |= dict(zip(members, said, strict=True))
    adapter_of = {index: adapter for adapter, members in speaking.items() for index in members}
    num_samples = num_silent = 0
    for index, (path, request) in enumerate(zip(paths, requests, strict=True)):
        result = results[index]
        if not result.codes.shape[0]:
            num_silent += 1
            print(f"{path}: not written, the model ended at once and said nothing; try another seed or temperature", file=sys.stderr)
            continue
        waveform = generator.audio_from_codes(result.codes, trim_silence=request.trim_silence)
        num_samples += write_audio(path, [waveform], _provenance(arguments, generator, request, adapter_of[index]))
        if not result.reached_eos:
            why = "it went round in circles" if result.is_loop else "the model did not end by itself"
            print(f"{path}: cut at {seconds_from_frames(result.codes.shape[0]):g} s, {why}", file=sys.stderr)
    name = f"{folder} ({len(paths) - num_silent} files)"
    print_report(name, generator, num_samples, time.perf_counter() - started_s, None)
    return 1 if num_silent else 0


def _named_adapter(given: str) -> tuple[str, Path]:
    name, equals, place = given.partition("=")
    if not (name and equals and place):
        raise ValueError(f"--adapter {given}: expected NAME=DIR, such as anna=runs/finetune/anna")
    return name, Path(place)


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
    loop = dict(compile=arguments.compile, int8=arguments.int8)
    return Generator.from_pretrained(arguments.checkpoint, device, getattr(torch, arguments.dtype), watermark=arguments.watermark, **loop)


def _request(arguments: argparse.Namespace, generator: Generator, line: dict[str, Any], context: list[Turn], folder: Path) -> Request:
    """One request: what the line says, else what the command line says."""
    from csm.generation.generator import Request
    from csm.generation.voices import load_voice
    from csm.model.pretrained import resolve_checkpoint

    unknown = set(line) - set(_REQUEST_KEYS)
    if unknown:
        raise ValueError(f"key {sorted(unknown)[0]!r} is not known; there are: {', '.join(_REQUEST_KEYS)}")
    speaker = line.get("speaker", arguments.speaker)
    turns = turns_from_json(line["context"], folder, "context") if "context" in line else list(context)
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
            min_duration_s=float(line.get("min_duration_s", arguments.min_duration)),
            trim_silence=bool(line.get("trim_silence", arguments.trim_silence)),
            stop_loops=bool(line.get("stop_loops", arguments.stop_loops)),
        )
    except TypeError as error:
        numbers = "speaker, seed, temperature, top_k, max_duration_s and min_duration_s"
        raise ValueError(f"{error}; numbers are expected for {numbers}") from error
    generator.prompts.build(request.text, request.speaker, request.context, request.max_frames)  # refuse now what cannot be said
    return request


def _provenance(arguments: argparse.Namespace, generator: Generator, request: Request, adapter: str | None) -> dict[str, object]:
    from csm import __version__

    return {
        "software": f"csm-lab {__version__}",
        "synthetic": True,
        "watermark": generator.watermark_name,
        "weights": "int8" if generator.int8 else arguments.dtype,
        "checkpoint": "/".join(Path(arguments.checkpoint).parts[-3:]),
        **({"adapter": adapter} if adapter is not None else {}),
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
