"""Text in, speech out: streams equal clips, batches equal single requests, context and window behave, mistakes are told."""

from __future__ import annotations

import pytest
import torch

from csm import Turn
from csm.generation import Generator, Request
from csm.generation.watermark import load_watermarker


@pytest.fixture(scope="module")
def speaker(speaking_model, small_codec, word_tokenizer) -> Generator:
    return Generator(speaking_model, small_codec, word_tokenizer, load_watermarker())


def tone(num_samples: int = 4000) -> torch.Tensor:
    return torch.sin(torch.arange(num_samples) / 15) * 0.4


def test_streamed_chunks_equal_the_clip_sample_for_sample(speaker):
    chunks = list(speaker.stream("seven four", 1, max_duration_s=0.8, seed=5))
    clip = speaker.generate("seven four", 1, max_duration_s=0.8, seed=5)
    assert torch.equal(torch.cat(chunks), clip)
    assert clip.dtype == torch.float32 and clip.shape == (10 * 1920,)
    assert torch.equal(speaker.audio_from_codes(speaker.last.codes), clip)


def test_first_sound_comes_after_two_frames(speaker, monkeypatch):
    num_frames = 0
    decode = speaker._frames

    def counted(*arguments):
        nonlocal num_frames
        for frame in decode(*arguments):
            num_frames += 1
            yield frame

    monkeypatch.setattr(speaker, "_frames", counted)
    chunk = next(speaker.stream("seven four", max_duration_s=0.8, seed=5))
    assert chunk.shape[0] > 0 and num_frames <= 2


def test_equal_seeds_speak_alike_and_others_do_not(speaker):
    def codes(seed):
        return speaker.generate_codes("one two", seed=seed, max_duration_s=0.5)

    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))
    drawn = speaker.generate_codes("one two", max_duration_s=0.5)
    assert torch.equal(codes(speaker.last.seed), drawn)


def test_batches_equal_single_requests(speaker, make_codes):
    context = [Turn(0, "nine", codes=make_codes())]
    requests = [
        dict(text="one", speaker=0, seed=1, max_duration_s=0.4),
        dict(text="two three four", speaker=1, seed=2, max_duration_s=0.4, context=context),
        dict(text="five", speaker=2, seed=3, max_duration_s=0.4, temperature=0),
        dict(text="six seven", speaker=3, seed=4, max_duration_s=0.6),
    ]
    for together, request in zip(speaker.generate_batch(requests), requests, strict=True):
        assert torch.equal(together, speaker.generate(**request))


def test_context_as_audio_equals_context_as_its_codes(speaker, small_codec):
    audio = tone()
    codes = small_codec.encode([audio])[0]
    options = dict(temperature=0, max_duration_s=0.4)
    heard = speaker.generate_codes("one", context=[Turn(1, "two", audio=audio)], **options)
    assert torch.equal(heard, speaker.generate_codes("one", context=[Turn(1, "two", codes=codes)], **options))
    assert not torch.equal(heard, speaker.generate_codes("one", **options))


def test_oldest_turns_are_dropped_whole_when_the_window_is_full(speaker, make_codes):
    turns = [Turn(i % 2, "one two", codes=make_codes(num_frames=20)) for i in range(8)]  # 26 positions each, window 128
    full = speaker.generate_codes("three", context=turns, temperature=0, max_duration_s=1.0)
    assert speaker.last.num_dropped_turns == 4
    assert torch.equal(full, speaker.generate_codes("three", context=turns[4:], temperature=0, max_duration_s=1.0))
    assert speaker.last.num_dropped_turns == 0


def test_runaways_are_told_from_ended_speech(small_codec, word_tokenizer):
    from csm import CSM
    from tests.conftest import tiny_config

    model = CSM(tiny_config(), seed=0)
    with torch.no_grad():
        model.codebook0_head.weight.zero_()
        model.audio_head.zero_()  # greedy: code 0 everywhere, which is EOS
    ended = Generator(model, small_codec, word_tokenizer, None)
    assert ended.generate("one", temperature=0, max_duration_s=0.4).shape == (0,) and ended.last.reached_eos
    (result,) = ended.generate_codes_batch([Request(text="one", temperature=0, max_duration_s=0.4)])
    assert result.codes.shape == (0, 4) and result.reached_eos
    with torch.no_grad():
        model.codebook0_head.weight[3] = 1.0
        model.codebook0_head.weight[4] = -1.0  # now 3 or 4 wins over 0, always
    runaway = ended.generate_codes("one", temperature=0, max_duration_s=0.4)
    assert runaway.shape == (5, 4) and not ended.last.reached_eos


def test_speech_is_watermarked_unless_it_was_turned_off(speaker, speaking_model, small_codec, word_tokenizer):
    bare = Generator(speaking_model, small_codec, word_tokenizer, None)
    options = dict(seed=3, max_duration_s=2.0)
    unmarked = bare.generate("one two three", **options)
    for marked in (speaker.generate("one two three", **options), *speaker.generate_batch([dict(text="one two three", **options)])):
        assert speaker.watermarker.detect(marked).is_marked
        assert torch.equal(marked, speaker.watermarker.embed(unmarked)) and not torch.equal(marked, unmarked)
    assert (speaker.watermark_name, bare.watermark_name) == ("keyed+perth", "off")


def test_weights_that_change_are_heard(speaking_model, small_codec, word_tokenizer):
    from copy import deepcopy

    generator = Generator(deepcopy(speaking_model), small_codec, word_tokenizer, None)
    before = generator.generate_codes("one", temperature=0, max_duration_s=0.4)
    with torch.no_grad():
        generator.model.audio_head.neg_()
    assert not torch.equal(before, generator.generate_codes("one", temperature=0, max_duration_s=0.4))


def test_a_checkpoint_brings_codec_and_tokenizer(speaking_checkpoint, speaker):
    loaded = Generator.from_pretrained(speaking_checkpoint)
    options = dict(seed=2, max_duration_s=0.4)
    assert torch.equal(loaded.generate("one two", **options), speaker.generate("one two", **options))
    with pytest.raises(ValueError, match="watermark='none': expected off, or one or several of keyed"):
        Generator.from_pretrained(speaking_checkpoint, watermark="none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(text=""), "expected something to say"),
        (dict(text=" \n"), "expected something to say"),
        (dict(text=None), "expected something to say"),
        (dict(text="hello"), "'hello', which this model never heard"),
        (dict(text="😀"), "never heard"),
        (dict(text="10:30"), "never heard"),
        (dict(text="one", speaker=9), r"\[9\]"),
        (dict(text="one", speaker=-1), "speaker -1"),
        (dict(text="one " * 2500), "exceed the window of 128"),
        (dict(text="one", max_duration_s=60), "exceed the window of 128"),
        (dict(text="one", max_duration_s=0), "max_duration_s=0"),
        (dict(text="one", max_duration_s=float("nan")), "max_duration_s=nan"),
        (dict(text="one", temperature=-1), "temperature=-1"),
        (dict(text="one", top_k=-5), "top_k=-5"),
        (dict(text="one", seed=-1), "seed=-1"),
        (dict(text="one", context=[Turn(0, "two")]), "context turn 0 has neither audio nor codes"),
        (dict(text="one", context=[Turn(0, "", audio=tone())]), "context turn 0 has no text"),
        (dict(text="one", context=[Turn(0, "two", audio=torch.zeros(2, 4000))]), "context turn 0: .*mono"),
        (dict(text="one", context=[Turn(0, "two", audio=torch.zeros(0))]), "context turn 0: .*no samples"),
        (dict(text="one", context=[Turn(0, "two", audio=tone() * float("nan"))]), "context turn 0: .*not finite"),
        (dict(text="one", context=[Turn(0, "two", audio=torch.zeros(4000, dtype=torch.int16))]), "context turn 0: .*float32"),
        (dict(text="one", context=[Turn(0, "two", codes=torch.ones(8, 3, dtype=torch.int64))]), r"expected int64 \[4, F\]"),
        (dict(text="one", context=[Turn(0, "two", codes=torch.full((4, 3), 33))]), r"codes from 33 to 33, expected .*33\)"),
        (dict(text="one", context=[Turn(0, "two", codes=torch.zeros(4, 3, dtype=torch.int64))]), "zero codes, which means EOS"),
    ],
)
def test_what_cannot_be_said_is_refused_before_the_first_chunk(speaker, arguments, message):
    with pytest.raises(ValueError, match=message):
        speaker.stream(**arguments)
    if arguments["text"] is not None:
        with pytest.raises(ValueError, match=message):
            speaker.generate_batch([arguments])


def test_companions_of_another_shape_are_refused(speaking_model, small_codec, word_tokenizer):
    from csm.text import ByteTokenizer

    with pytest.raises(ValueError, match="2 codebooks of 33 codes, the model 4 of 33"):
        Generator(speaking_model, small_codec.with_codebooks(2), word_tokenizer, None)
    with pytest.raises(ValueError, match="tokenizer has 258 ids, the model's text table 32"):
        Generator(speaking_model, small_codec, ByteTokenizer(), None)
