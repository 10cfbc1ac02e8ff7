"""Conversations that the model speaks turn by turn, hearing itself: does it keep its voices, words and pace?

Two voices take turns with held-out lines; what was spoken so far, as the model spoke it, is the context of what comes next.
Scored by turn, and by conversation with cpWER (Watanabe et al. 2020, through meeteval): each turn's words go to the voice it
sounds like, so that words in the wrong voice count as wrong words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from csm.evaluation.judging import Verdict
from csm.evaluation.metrics import Estimate, mean_estimate, ratio_estimate, seed_for
from csm.evaluation.suites import DIALOGUE, Utterance, evenly_spaced
from csm.frames import Turn
from csm.generation.generator import GeneratedCodes, Generator, Request
from csm.listening.transcripts import normalise_transcript


@dataclass(frozen=True)
class Dialogue:
    """A script: lines of two voices in turn.

    Attributes:
        turns: each with a key `<name>-<turn>`; `context` empty, for it is spoken first.
    """

    name: str
    turns: list[Utterance]


def plan_dialogues(lines: Sequence[Utterance], *, num_dialogues: int, num_turns: int, seed: int) -> list[Dialogue]:
    """Scripts out of single lines: pairs of voices in turn, each line at most once until a voice has no more.

    Raises:
        ValueError: if there are fewer than two voices.
    """
    by_voice: dict[str, list[Utterance]] = {}
    for line in lines:
        by_voice.setdefault(line.voice, []).append(line)
    voices = sorted(by_voice)
    if len(voices) < 2:
        raise ValueError(f"a dialogue needs two voices, the single lines have {voices}; leave suite 'dialogue' out")
    for voice in voices:  # not in the order of the split, which may be that of the text
        by_voice[voice].sort(key=lambda line: seed_for(seed, "dialogue", line.key))
    pairs = [(one, other) for i, one in enumerate(voices) for other in voices[i + 1 :]]
    used = dict.fromkeys(voices, 0)
    dialogues = []
    chosen = evenly_spaced(pairs, num_dialogues)  # all of them where more are wanted, and then again from the first
    for index in range(num_dialogues):
        pair = chosen[index % len(chosen)]
        turns = []
        for turn in range(num_turns):
            voice = pair[turn % 2]
            line = by_voice[voice][used[voice] % len(by_voice[voice])]
            used[voice] += 1
            turns.append(replace(line, key=f"{index:03d}-{turn:02d}", suite=DIALOGUE, context=[]))
        dialogues.append(Dialogue(f"{index:03d}", turns))
    return dialogues


def speak_dialogues(
    generator: Generator,
    dialogues: Sequence[Dialogue],
    *,
    max_duration_s: float,
    temperature: float,
    top_k: int,
    batch_size: int,
    seed: int,
    on_turn: Callable[[Utterance, GeneratedCodes], None],
) -> None:
    """Speak turn after turn of every dialogue, those of one number together; what was spoken is heard by the next.

    Args:
        on_turn: called with each turn, its context filled in, and what was made.
    """
    spoken: dict[str, list[Turn]] = {dialogue.name: [] for dialogue in dialogues}
    for number in range(max((len(dialogue.turns) for dialogue in dialogues), default=0)):
        alive = [dialogue for dialogue in dialogues if number < len(dialogue.turns)]
        requests = []
        for dialogue in alive:
            turn = dialogue.turns[number]
            requests.append(
                Request(
                    text=turn.text,
                    speaker=turn.speaker,
                    context=list(spoken[dialogue.name]),
                    max_duration_s=max_duration_s,
                    temperature=temperature,
                    top_k=top_k,
                    seed=seed_for(seed, "speak", turn.key),
                )
            )
        for dialogue, request, said in zip(
            alive, requests, generator.generate_codes_batch(requests, max_batch_size=batch_size), strict=True
        ):
            turn = replace(dialogue.turns[number], context=list(request.context))
            if len(said.codes):  # an empty turn leaves nothing to hear; its verdict counts it
                spoken[dialogue.name].append(Turn(turn.speaker, turn.text, codes=said.codes.T.contiguous()))
            on_turn(turn, said)


def dialogue_metrics(verdicts: Sequence[Verdict], *, seed: int, suffix: str) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """cpWER over dialogues and drift over turns; and, by turn number, word error rate, similarity and share in the right voice."""
    by_dialogue: dict[str, list[Verdict]] = {}
    by_turn: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        name, turn = verdict.key.rsplit("-", 1)
        by_dialogue.setdefault(name, []).append(verdict)
        by_turn.setdefault(int(turn), []).append(verdict)
    counts = [
        cp_word_errors([(v.voice, v.text) for v in turns], [(v.voice_guess or "", v.hypothesis) for v in turns])
        for turns in by_dialogue.values()
    ]
    drifts = []
    for turns in by_dialogue.values():
        ordered = sorted(turns, key=lambda verdict: verdict.key)
        half = len(ordered) // 2
        if half:
            means = [sum(v.voice_similarity for v in part) / half for part in (ordered[:half], ordered[-half:])]
            drifts.append(means[1] - means[0])
    metrics = {"cpwer": ratio_estimate([e for e, _ in counts], [n for _, n in counts], seed=seed, name="cpwer" + suffix)}
    if drifts:
        metrics["voice_drift"] = mean_estimate(drifts, seed=seed, name="voice_drift" + suffix)
    curves: dict[str, list[float]] = {"wer": [], "voice_similarity": [], "voice_accuracy": []}
    for _, turns in sorted(by_turn.items()):
        curves["wer"].append(sum(v.word_errors.errors for v in turns) / sum(v.word_errors.num_words for v in turns))
        curves["voice_similarity"].append(sum(v.voice_similarity for v in turns) / len(turns))
        curves["voice_accuracy"].append(sum(v.voice_guess == v.voice for v in turns) / len(turns))
    rounded = {name: [round(value, 6) for value in values] for name, values in curves.items()}
    return {name + suffix: estimate for name, estimate in metrics.items()}, rounded


def cp_word_errors(reference: Sequence[tuple[str, str]], hypothesis: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """(errors, reference words) of a conversation: (speaker, text) of each turn, in order; the names of the two sides need not agree."""
    from meeteval.wer import cp_word_error_rate

    sides = []
    for turns in (reference, hypothesis):
        words: dict[str, list[str]] = {}
        for speaker, text in turns:
            words.setdefault(speaker, []).append(normalise_transcript(text))
        sides.append({speaker: " ".join(part for part in parts if part) for speaker, parts in words.items()})
    result = cp_word_error_rate(reference=sides[0], hypothesis=sides[1], reference_sort=False, hypothesis_sort=False)
    return int(result.errors), int(result.length)
