"""Dialogues of the model with itself, cpWER against cases done by hand, and what context is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csm import CSM
from csm.data.shards import iter_samples
from csm.evaluation.context_gain import context_gain
from csm.evaluation.dialogue import Dialogue, cp_word_errors, dialogue_metrics, plan_dialogues, speak_dialogues
from csm.evaluation.likelihood import calibration_error, score_samples
from csm.evaluation.suites import DIALOGUE, SINGLE, Utterance
from csm.generation import Generator
from tests.test_evaluation_report import verdict


def line(voice: str, number: int) -> Utterance:
    speaker = "abcd".index(voice)
    return Utterance(f"{voice}{number}", SINGLE, speaker, voice, "seven four", torch.ones(8, 6, dtype=torch.int64), None)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ([("a", "one two"), ("b", "three")], [("x", "one two"), ("y", "three")], (0, 3)),  # names need not agree
        ([("a", "one two"), ("b", "three")], [("x", "one two"), ("x", "three")], (2, 3)),  # a word in the wrong voice: gone and extra
        ([("a", "one two"), ("b", "three")], [("x", "one five"), ("y", "three")], (1, 3)),
        ([("a", "one"), ("b", "two"), ("a", "three")], [("x", "one"), ("y", "two"), ("x", "three")], (0, 3)),
        ([("a", "one two"), ("b", "three")], [("x", ""), ("", "")], (3, 3)),  # nothing heard
        ([("a", "7 4")], [("x", "Seven, four!")], (0, 2)),  # spelt and cased alike
    ],
)
def test_cpwer_of_conversations_done_by_hand(reference, hypothesis, expected) -> None:
    assert cp_word_errors(reference, hypothesis) == expected


def test_scripts_alternate_two_voices_and_repeat_no_line_before_they_must() -> None:
    lines = [line(voice, number) for voice in "abc" for number in range(6)]
    scripts = plan_dialogues(lines, num_dialogues=3, num_turns=4, seed=1)
    assert [turn.key for turn in scripts[1].turns] == [f"001-{turn:02d}" for turn in range(4)]
    assert [{turn.voice for turn in script.turns[::2]} for script in scripts] == [{"a"}, {"a"}, {"b"}]
    assert all(turn.suite == DIALOGUE and turn.context == [] for script in scripts for turn in script.turns)
    assert scripts == plan_dialogues(list(reversed(lines)), num_dialogues=3, num_turns=4, seed=1), "the order of the split plays no part"
    assert len(plan_dialogues(lines, num_dialogues=7, num_turns=2, seed=1)) == 7, "pairs come again"
    with pytest.raises(ValueError, match="needs two voices"):
        plan_dialogues([line("a", 0)], num_dialogues=1, num_turns=2, seed=1)


def test_each_turn_hears_what_was_spoken_before_and_the_batch_plays_no_part(speaking_model, small_codec, word_tokenizer) -> None:
    generator = Generator(speaking_model, small_codec, word_tokenizer, None)
    scripts = plan_dialogues([line(voice, number) for voice in "ab" for number in range(4)], num_dialogues=2, num_turns=3, seed=1)
    heard = {}
    for batch_size in (1, 2):
        turns = {}
        settings = dict(max_duration_s=0.8, temperature=0.5, top_k=5, seed=3, batch_size=batch_size)
        speak_dialogues(generator, scripts, on_turn=lambda turn, said, turns=turns: turns.update({turn.key: (turn, said)}), **settings)
        heard[batch_size] = turns
    assert list(heard[1]) == ["000-00", "001-00", "000-01", "001-01", "000-02", "001-02"]
    for key, (turn, said) in heard[1].items():
        assert torch.equal(said.codes, heard[2][key][1].codes)
        before = [heard[1][f"{key[:3]}-{number:02d}"][1].codes.T for number in range(int(key[-2:]))]
        assert [context.codes.shape for context in turn.context] == [codes.shape for codes in before if codes.shape[1]]
        assert all(torch.equal(c.codes, b) for c, b in zip(turn.context, [b for b in before if b.shape[1]], strict=True))
    alone = generator.generate_codes("seven four", 0, heard[1]["000-02"][0].context, max_duration_s=0.8, temperature=0.5, top_k=5,
                                     seed=heard[1]["000-02"][1].seed)  # fmt: skip
    assert torch.equal(alone, heard[1]["000-02"][1].codes)


def test_a_voice_that_changes_half_way_drifts_and_costs_its_words() -> None:
    turns = []
    for number, (guess, similarity) in enumerate([("a", 0.9), ("b", 0.9), ("a", 0.5), ("a", 0.5)]):
        voiced = replace(verdict(), voice="ab"[number % 2], voice_guess=guess, voice_similarity=similarity)
        turns.append(replace(voiced, key=f"000-{number:02d}", suite=DIALOGUE))
    metrics, by_turn = dialogue_metrics(turns, seed=0, suffix="_dialogue")
    assert metrics["voice_drift_dialogue"].value == pytest.approx(-0.4)
    assert metrics["cpwer_dialogue"].value == pytest.approx(6 / 12)  # three words of b said by a: missed there, extra here
    assert by_turn == {"wer": [0.0] * 4, "voice_similarity": [0.9, 0.9, 0.5, 0.5], "voice_accuracy": [1.0, 1.0, 1.0, 0.0]}


def test_context_is_worth_the_difference_of_the_same_turns_losses(
    tmp_path: Path, write_conversations, word_tokenizer, tiny_model_config
) -> None:
    talks = [[(0, "one two", 5)], [(1, "four", 9), (2, "five six", 3)], [(3, "nine", 2), (0, "two", 4), (3, "one", 6)]]
    samples = list(iter_samples(write_conversations(tmp_path / "heldout", talks)))
    model = CSM(tiny_model_config, seed=1)
    metrics, missing = context_gain(model, word_tokenizer, samples, seed=0)
    assert set(missing) == {"context_gain with 4 turns"} and "has 2 before its last" in missing["context_gain with 4 turns"]
    assert [metrics[f"c0_nll_{name}"].n for name in ("context0", "context1", "context_max")] == [2, 2, 2]
    lone = [replace(sample, turns=sample.turns[-1:]) for sample in samples[1:]]
    assert metrics["c0_nll_context0"].value == pytest.approx(
        score_samples(model, word_tokenizer, lone, seed=0, name="x").c0.value, abs=1e-6
    )
    for part in ("c0", "depth"):
        saved = metrics[f"{part}_nll_context0"].value - metrics[f"{part}_nll_context_max"].value
        assert metrics[f"{part}_gain_context_max"].value == pytest.approx(saved, abs=1e-6)
    assert metrics["c0_nll_context1"].value != metrics["c0_nll_context_max"].value
    assert context_gain(model, word_tokenizer, samples[:1], seed=0)[0] == {}
    assert model.training


def test_calibration_error_of_known_promises() -> None:
    assert calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert calibration_error(torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0])) == pytest.approx(0)  # right in the long run
    assert calibration_error(torch.full((4,), 0.9), torch.zeros(4)) == pytest.approx(0.9)


def test_an_empty_dialogue_turn_is_counted_and_not_heard(speaking_model, small_codec, word_tokenizer, monkeypatch) -> None:
    generator = Generator(speaking_model, small_codec, word_tokenizer, None)
    silent = generator.generate_codes_batch
    monkeypatch.setattr(generator, "generate_codes_batch", lambda requests, **options: [
        replace(said, codes=said.codes[:0]) for said in silent(requests, **options)
    ])  # fmt: skip
    turns = []
    script = Dialogue("000", [replace(line("ab"[i % 2], i), key=f"000-{i:02d}") for i in range(2)])
    settings = dict(max_duration_s=0.4, temperature=0.0, top_k=0, seed=3, batch_size=2)
    speak_dialogues(generator, [script], on_turn=lambda turn, said: turns.append((turn, said)), **settings)
    assert len(turns) == 2 and turns[1][0].context == []
