"""A voice that the demo model never heard, learnt from minutes of it: makes the recordings, and measures what came of it.

    python benchmarks/new_voice.py make data/new_voice                  # 5 minutes of wavs with texts; --minutes for more
    python benchmarks/new_voice.py measure runs/demo/mine --speaker 0   # a run or checkpoint; a line of JSON

`measure` speaks the corpus's held-out strings (in no recording, here or there) with every speaker, and asks a Whisper what it
hears and a speaker encoder whose voice it is: the new one's, or which of the corpus's four. References are real recordings. The row
`codec` is the ceiling: other real recordings of the new voice, through the codec. A codec that never met a voice may move it to another.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from csm.config import EvaluateConfig
from csm.evaluation.metrics import count_word_errors
from csm.evaluation.speaking import longest_s, speak
from csm.evaluation.suites import SINGLE, Utterance, read_suites
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.generator import Generator
from csm.listening.asr import Recogniser
from csm.listening.speaker import SpeakerEncoder, VoiceBook
from data_prep.script import LENGTH_SHARES, VOICES, spoken
from data_prep.synthesis import Synthesizer, Voice, random_for

NEW = "stranger"
NUM_REFERENCES = 40  # recordings that say what the new voice is like
NUM_RESYNTHESISED = 90  # others, of which the codec's ceiling is told
SEED = 7


def unheard(corpus: Path) -> list[str]:
    """The strings of 3 to 5 digits that no training turn of the corpus has in it: held out, and of validation."""
    plan = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
    return [*plan["heldout_strings"], *plan["validation_strings"]]


def make(folder: Path, minutes: float, corpus: Path, voice: Voice) -> None:
    """Digit strings as training has them (1 to 5 digits, no unheard one inside), a wav and a txt each."""
    reserved = unheard(corpus)
    synthesizer, strings = Synthesizer(), random_for(SEED, "strings")
    folder.mkdir(parents=True)
    index, num_samples = 0, 0
    while num_samples < minutes * 60 * SAMPLE_RATE_HZ:
        length = int(strings.choice(list(LENGTH_SHARES), p=list(LENGTH_SHARES.values())))
        text = spoken("".join(map(str, strings.integers(0, 10, length))))
        if any(other in text for other in reserved):
            continue
        waveform = synthesizer.speak(text, voice, random_for(SEED, "speech", index))
        soundfile.write(folder / f"{index:05d}.wav", waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
        (folder / f"{index:05d}.txt").write_text(text + "\n", encoding="utf-8")
        num_samples += len(waveform)
        index += 1
    print(f"{folder}: {index} recordings of {voice}, {num_samples / SAMPLE_RATE_HZ / 60:.2f} minutes")


def audio_of(path: Path) -> np.ndarray:
    """float32 [S] of a recording."""
    audio, _ = soundfile.read(path, dtype="float32")
    return audio


def text_of(path: Path) -> str:
    """What is said in a recording."""
    return path.with_suffix(".txt").read_text(encoding="utf-8").strip()


def measure(
    checkpoint: Path, recordings: Path, corpus: Path, speaker: int | None, temperature: float, only_new: bool, draws: int
) -> dict[str, Any]:
    """WER and nearest voice by speaker; `speaker` is the one that speaks with the new voice, None in the base.

    Args:
        draws: how often each string is said, each time with another seed.
    """
    defaults = EvaluateConfig(run=str(checkpoint))
    torch.set_num_threads(1)
    generator, recogniser, encoder = Generator.from_pretrained(checkpoint), Recogniser(prompt=defaults.asr_prompt), SpeakerEncoder()
    real = read_suites(corpus / "heldout", context=False)[SINGLE]
    references = [(u.voice, u.text, encoder.embed(u.audio)) for u in real if u.audio is not None]
    paths = sorted(recordings.glob("*.wav"))
    references += [(NEW, text_of(path), encoder.embed(audio_of(path))) for path in paths[:NUM_REFERENCES]]
    voices = VoiceBook([(voice, text, embedding) for voice, text, embedding in references if embedding is not None])
    names = {number: voice.name for number, voice in enumerate(VOICES)}
    if speaker is not None:
        names = {speaker: NEW} if only_new else {**names, speaker: NEW}
    utterances = [
        Utterance(f"{number}-{index:03d}", SINGLE, number, name, text, real[0].codes, None)
        for number, name in names.items()
        for index, text in enumerate(unheard(corpus))
    ]
    longest = max(real, key=lambda utterance: utterance.reference_s)
    utterances = [replace(utterance, codes=longest.codes) for utterance in utterances]

    def judge(row: str, text: str, codes: torch.Tensor) -> tuple[str, int, int, str]:
        audio = generator.audio_from_codes(codes).numpy()
        errors = count_word_errors(text, recogniser.transcribe(audio) if len(audio) else "")
        embedding = encoder.embed(audio) if len(audio) else None
        near = voices.similarities(embedding, text) if embedding is not None else {}
        return row, errors.errors, errors.num_words, max(near, key=lambda name: near[name], default="")

    judged = []
    with ThreadPoolExecutor(1) as pool:
        for seed in range(defaults.seed, defaults.seed + draws):
            made = speak(
                generator,
                utterances,
                temperature=temperature,
                top_k=defaults.top_k,
                batch_size=32,
                seed=seed,
                max_duration_s=longest_s(utterances),
            )
            judged += [pool.submit(judge, utterance.voice, utterance.text, said.codes) for utterance, said in made]
    found = [future.result() for future in judged]
    others = paths[NUM_REFERENCES : NUM_REFERENCES + NUM_RESYNTHESISED]
    through = generator.codec.encode([torch.from_numpy(audio_of(path)) for path in others]) if others else []
    found += [judge("codec", text_of(path), codes.T) for path, codes in zip(others, through, strict=True)]
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "temperature": temperature}
    voice_of = {name: name for name in names.values()} | ({"codec": NEW} if others else {})
    for name, voice in voice_of.items():
        mine = [row for row in found if row[0] == name]
        heard_as = [row[3] for row in mine]
        result[name] = {
            "wer": round(sum(row[1] for row in mine) / sum(row[2] for row in mine), 4),
            "word_errors": [sum(row[1] for row in mine), sum(row[2] for row in mine)],
            "heard_as": dict(Counter(heard_as)),
            "heard_as_it": round(heard_as.count(voice) / len(mine), 4),
            "n": len(mine),
        }
    old = [row for row in found if voice_of[row[0]] != NEW]
    if old:
        result["old_voices_wer"] = round(sum(row[1] for row in old) / sum(row[2] for row in old), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--minutes", type=float, default=5.0)
    making.add_argument("--pitch", type=float, default=0.4, help="of the synthesiser's")
    making.add_argument("--warp", type=float, default=1.0, help="of the frequency axis")
    measuring = commands.add_parser("measure")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("--recordings", type=Path, default=Path("data/new_voice"))
    measuring.add_argument("--speaker", type=int)
    measuring.add_argument("--only-new", action="store_true", help="leave the old voices out")
    measuring.add_argument("--temperature", type=float, default=0.5)
    measuring.add_argument("--draws", type=int, default=1, help="how often each string is said, each time with another seed")
    for command in (making, measuring):
        command.add_argument("--corpus", type=Path, default=Path("data/demo"))
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, arguments.minutes, arguments.corpus, Voice(NEW, arguments.pitch, arguments.warp))
    else:
        places = (arguments.checkpoint, arguments.recordings, arguments.corpus)
        print(json.dumps(measure(*places, arguments.speaker, arguments.temperature, arguments.only_new, arguments.draws)))


if __name__ == "__main__":
    main()
