"""From a clip to its verdict, and from the verdicts of a row to the numbers of the table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from csm.evaluation.metrics import (
    Estimate,
    WordErrors,
    count_character_errors,
    count_word_errors,
    is_runaway,
    mean_estimate,
    ratio_estimate,
)
from csm.evaluation.suites import CONTEXT, DIALOGUE, SINGLE, Utterance
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.generator import GeneratedCodes
from csm.listening.acoustics import is_silent, mel_distance_db, pauses_s, silence_tail_s, trim_silence
from csm.listening.asr import Recogniser
from csm.listening.naturalness import MosModel
from csm.listening.speaker import SpeakerEncoder, VoiceBook

SILENCE_TAIL_S = 0.5  # a clip that goes on for longer with nothing to hear did not know its end
_SUITE_TITLES = {SINGLE: "Model", CONTEXT: "In context", DIALOGUE: "In dialogue"}
GROUND_TRUTH, RESYNTHESIS, MODEL = "ground_truth", "resynthesis", "model"


@dataclass(frozen=True)
class Row:
    """One row of the table: who speaks which suite.

    Attributes:
        source: "ground_truth", "resynthesis" (ground truth through the codec) or "model".
        temperature: of the model; None for the others.
        suffix: of its metrics' names: "wer" + suffix. Empty for the model alone at the first temperature.
    """

    source: str
    suite: str
    temperature: float | None
    suffix: str

    @property
    def name(self) -> str:
        """Its folder under clips/, and its name in samples.jsonl."""
        return "model" + self.suffix if self.source == MODEL else self.source

    @property
    def title(self) -> str:
        if self.source != MODEL:
            return self.source.replace("_", " ").capitalize()
        how = "greedy" if self.temperature == 0 else f"T = {self.temperature:g}"
        return f"{_SUITE_TITLES[self.suite]}, {how}"


def plan_rows(temperatures: Sequence[float], *, context: bool, has_audio: bool, dialogue: bool = False) -> list[Row]:
    """The rows of the table, in order: the ceiling first, then the model alone, in context, and in dialogue (first temperature)."""
    rows = [Row(GROUND_TRUTH, SINGLE, None, "_ground_truth")] if has_audio else []
    rows.append(Row(RESYNTHESIS, SINGLE, None, "_resynthesis"))
    for suite in (SINGLE, CONTEXT) if context else (SINGLE,):
        for index, temperature in enumerate(temperatures):
            at = "" if index == 0 else f"_t{temperature:g}"
            rows.append(Row(MODEL, suite, temperature, ("_context" if suite == CONTEXT else "") + at))
    if dialogue:
        rows.append(Row(MODEL, DIALOGUE, temperatures[0], "_dialogue"))
    return rows


@dataclass(frozen=True)
class Verdict:
    """What was found in one clip; a line of samples.jsonl.

    Attributes:
        hypothesis: what the recogniser heard; "" for an empty clip, which is not sent to it.
        voice_guess: the nearest voice, None for an empty clip (counted as wrong).
        voice_similarity: cosine to its own voice's centroid; 0 for an empty clip.
        duration_ratio: to the reference.
        reached_eos: whether the model ended by itself; true of references.
        mel_distance: dB, None for an empty clip.
        wav: path below the evaluation folder.
        seed: of the model's draws; None for references.
        num_dropped_turns: context turns that did not fit the window.
        silence_tail_s: of nothing to hear at the clip's end.
        speech_s: from the first to the last sound; `pause_s` of it are silences, `num_pauses` of them.
        mos: naturalness by the networks that scored this clip, 1 to 5.
        emotion, reference_emotion: labels of the clip and of the real recording; None where no classifier was asked.
    """

    key: str
    row: str
    suite: str
    temperature: float | None
    seed: int | None
    num_dropped_turns: int
    speaker: int
    voice: str
    text: str
    hypothesis: str
    hits: int
    substitutions: int
    deletions: int
    insertions: int
    voice_guess: str | None
    voice_similarity: float
    duration_s: float
    reference_s: float
    duration_ratio: float
    reached_eos: bool
    is_runaway: bool
    is_empty: bool
    silence_tail_s: float
    mel_distance: float | None
    wav: str
    speech_s: float = 0.0
    pause_s: float = 0.0
    num_pauses: int = 0
    mos: dict[str, float] = field(default_factory=dict)
    emotion: str | None = None
    reference_emotion: str | None = None

    @property
    def word_errors(self) -> WordErrors:
        return WordErrors(self.hits, self.substitutions, self.deletions, self.insertions)

    def as_json(self) -> dict[str, object]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


class Judge:
    """Listens to clips. Safe to use from several threads; a verdict depends on the clip alone."""

    def __init__(
        self,
        recogniser: Recogniser,
        encoder: SpeakerEncoder,
        voices: VoiceBook,
        *,
        mos_models: Sequence[MosModel] = (),
        scored: Collection[str] = (),
        emotion_of: Callable[[np.ndarray], str] | None = None,
    ) -> None:
        """Take the listeners.

        Args:
            mos_models: score the clips of the lines in `scored`, by key, alone.
            emotion_of: label of 24 kHz float32 [S].
        """
        self.recogniser, self.encoder, self.voices = recogniser, encoder, voices
        self.mos_models, self.scored, self.emotion_of = mos_models, scored, emotion_of

    def judge(
        self, row: Row, utterance: Utterance, audio: np.ndarray, reference: np.ndarray, said: GeneratedCodes | None, wav: str
    ) -> Verdict:
        """Judge one clip.

        Args:
            audio, reference: 24 kHz float32 [S]; the clip, and the real recording of the line.
            said: what the model made; None for a reference.
        """
        reached_eos = said is None or said.reached_eos
        is_empty = is_silent(audio)
        hypothesis = "" if is_empty else self.recogniser.transcribe(audio)
        errors = count_word_errors(utterance.text, hypothesis)
        embedding = self.encoder.embed(audio)
        similarities = None if embedding is None else self.voices.similarities(embedding, utterance.text)
        duration_s = len(audio) / SAMPLE_RATE_HZ
        pauses = [] if is_empty else pauses_s(audio)
        scores = {model.name: model.score(audio) for model in (self.mos_models if utterance.key in self.scored else ())}
        return Verdict(
            key=utterance.key,
            row=row.name,
            suite=row.suite,
            temperature=row.temperature,
            seed=None if said is None else said.seed,
            num_dropped_turns=0 if said is None else said.num_dropped_turns,
            speaker=utterance.speaker,
            voice=utterance.voice,
            text=utterance.text,
            hypothesis=hypothesis,
            **asdict(errors),
            voice_guess=None if similarities is None else max(similarities, key=lambda voice: similarities[voice]),
            voice_similarity=0.0 if similarities is None else similarities[utterance.voice],
            duration_s=duration_s,
            reference_s=utterance.reference_s,
            duration_ratio=duration_s / utterance.reference_s,
            reached_eos=reached_eos,
            is_runaway=is_runaway(duration_s, utterance.reference_s, reached_eos),
            is_empty=is_empty,
            silence_tail_s=silence_tail_s(audio),
            mel_distance=None if is_empty else mel_distance_db(audio, reference),
            wav=wav,
            speech_s=0.0 if is_empty else len(trim_silence(audio)) / SAMPLE_RATE_HZ,
            pause_s=sum(pauses),
            num_pauses=len(pauses),
            mos={name: score for name, score in scores.items() if score is not None},
            emotion=None if self.emotion_of is None or is_empty else self.emotion_of(audio),
            reference_emotion=None if self.emotion_of is None else self.emotion_of(reference),
        )


def row_metrics(verdicts: Sequence[Verdict], row: Row, *, seed: int) -> dict[str, Estimate]:
    """The metrics of one row, named with its suffix. Failed clips stay in: as word errors, wrong voices and runaways.

    Only what an empty clip does not have leaves it out (`mel_distance`, pace, pauses, naturalness), and `wer_without_outliers` outliers;
    their `n` says how many were measured.
    """
    suffix = row.suffix

    def rate(name: str, flags: Sequence[float]) -> Estimate:
        return mean_estimate(list(flags), seed=seed, name=name + suffix)

    def share(name: str, pairs: Sequence[tuple[int, int]]) -> Estimate:
        return ratio_estimate([errors for errors, _ in pairs], [total for _, total in pairs], seed=seed, name=name + suffix)

    words = [v.word_errors for v in verdicts]
    metrics = {
        "wer": share("wer", [(errors.errors, errors.num_words) for errors in words]),
        "cer": share("cer", [count_character_errors(v.text, v.hypothesis) for v in verdicts]),
        "outlier_rate": rate("outlier_rate", [float(errors.is_outlier) for errors in words]),
        "voice_accuracy": rate("voice_accuracy", [float(v.voice_guess == v.voice) for v in verdicts]),
        "voice_similarity": rate("voice_similarity", [v.voice_similarity for v in verdicts]),
    }
    usual = [(errors.errors, errors.num_words) for errors in words if not errors.is_outlier]
    if usual:
        metrics["wer_without_outliers"] = share("wer_without_outliers", usual)
    heard = [v for v in verdicts if not v.is_empty]
    if heard:  # pace and pauses of an empty clip mean nothing; `empty_rate` counts it
        metrics["words_per_s"] = ratio_estimate(
            [v.word_errors.num_words for v in heard], [v.speech_s for v in heard], seed=seed, name="words_per_s" + suffix
        )
        metrics["pause_share"] = ratio_estimate(
            [v.pause_s for v in heard], [v.speech_s for v in heard], seed=seed, name="pause_share" + suffix
        )
        metrics["pauses"] = rate("pauses", [v.num_pauses for v in heard])
    for name in sorted({name for v in verdicts for name in v.mos}):
        metrics[name] = rate(name, [v.mos[name] for v in verdicts if name in v.mos])
    if row.source != GROUND_TRUTH and any(v.reference_emotion is not None for v in verdicts):
        metrics["emotion_match"] = rate("emotion_match", [float(v.emotion == v.reference_emotion) for v in verdicts])
    distances = [v.mel_distance for v in verdicts if v.mel_distance is not None]
    if distances and row.source != GROUND_TRUTH:
        metrics["mel_distance"] = rate("mel_distance", distances)
    if row.source == MODEL:
        metrics["eos_rate"] = rate("eos_rate", [float(v.reached_eos) for v in verdicts])
        metrics["runaway_rate"] = rate("runaway_rate", [float(v.is_runaway) for v in verdicts])
        metrics["empty_rate"] = rate("empty_rate", [float(v.is_empty) for v in verdicts])
        metrics["silence_tail_rate"] = rate("silence_tail_rate", [float(v.silence_tail_s > SILENCE_TAIL_S) for v in verdicts])
        metrics["duration_ratio"] = rate("duration_ratio", [v.duration_ratio for v in verdicts])
        metrics["max_duration_ratio"] = Estimate(max(v.duration_ratio for v in verdicts), None, None, len(verdicts))
    return {name + suffix: estimate for name, estimate in metrics.items()}
