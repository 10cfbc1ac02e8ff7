"""Against runaways: what each option does, that it is the same streamed, batched and in a session, and that off changes nothing."""

from __future__ import annotations

import pytest
import torch

from csm import CSM
from csm.generation import Generator
from csm.generation.guards import LoopGuard, SilenceTrim
from tests.conftest import tiny_config


def first_loop(codes: list[int]) -> int | None:
    """Frames until the guard ends the reply."""
    guard = LoopGuard()
    for index, code in enumerate(codes):
        if guard.push(torch.tensor([code, index])):  # finer codebooks differ all the time
            return index + 1
    return None


def test_circles_are_found_and_speech_is_not():
    random = torch.randint(100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    assert first_loop(random) is None
    assert first_loop(random[:50] + [7] * 100) == 50 + 38  # 3 s of one code
    for period in (2, 9, 12):
        assert first_loop(random[:20] + random[20 : 20 + period] * 50) == 20 + 38
    assert first_loop(random[:25] * 4) == 75  # three rounds of 2 s
    assert first_loop(random[:30] * 4) is None  # longer circles are not looked for
    assert first_loop(random[:10] * 3 + random[50:90]) is None  # 2.4 s of the same: someone stammers
    assert first_loop([7] * 37) is None


@pytest.fixture(scope="module")
def endless(small_codec, word_tokenizer) -> Generator:
    """Greedy, it says the same frame for ever."""
    model = CSM(tiny_config(), seed=0)
    with torch.no_grad():
        model.codebook0_head.weight.zero_()
        model.codebook0_head.weight[3], model.codebook0_head.weight[4] = 1.0, -1.0
    return Generator(model, small_codec, word_tokenizer, None)


def test_a_reply_in_circles_is_ended_alike_on_every_path(endless):
    options = dict(temperature=0, max_duration_s=8.0)
    free = endless.generate_codes("one", **options)
    assert free.shape[0] == 100 and not endless.last.is_loop and not endless.last.reached_eos
    guarded = endless.generate("one", stop_loops=True, **options)
    num_frames = endless.last.codes.shape[0]
    assert 38 <= num_frames < 60 and first_loop(free[:, 0].tolist()) == num_frames
    assert endless.last.is_loop and not endless.last.reached_eos and torch.equal(endless.last.codes, free[:num_frames])
    assert torch.equal(torch.cat(list(endless.stream("one", stop_loops=True, **options))), guarded)
    batch = [dict(text="one", stop_loops=True, **options), dict(text="one", **options), dict(text="two", stop_loops=True, **options)]
    results = endless.generate_codes_batch(batch)
    assert [result.codes.shape[0] for result in results[:2]] == [num_frames, 100]
    assert torch.equal(results[2].codes, endless.generate_codes("two", stop_loops=True, **options))
    assert [result.is_loop for result in results] == [True, False, True]
    session = endless.session()
    assert torch.equal(session.say("one", stop_loops=True, **options), guarded)
    assert torch.equal(session.say("two", **options)[:1920], endless.generate("two", context=session.turns[:1], **options)[:1920])


def test_no_end_before_the_least_duration(small_codec, word_tokenizer):
    model = CSM(tiny_config(), seed=0)
    with torch.no_grad():
        model.codebook0_head.weight.zero_()
        model.audio_head.zero_()  # greedy: code 0 everywhere, which is EOS
    generator = Generator(model, small_codec, word_tokenizer, None)
    options = dict(temperature=0, max_duration_s=0.8)
    assert generator.generate_codes("one", **options).shape[0] == 0
    for least_s, num_frames in ((0.08, 1), (0.4, 5), (0.8, 10)):
        codes = generator.generate_codes("one", min_duration_s=least_s, **options)
        assert codes.shape[0] == num_frames and (codes[:, 0] == 1).all()
        assert generator.last.reached_eos == (least_s < 0.8)
    batch = [dict(text="one", min_duration_s=least_s, **options) for least_s in (0.0, 0.4, 0.8)]
    assert [result.codes.shape[0] for result in generator.generate_codes_batch(batch)] == [0, 5, 10]
    assert generator.session().say("one", min_duration_s=0.4, **options).shape[0] == 5 * 1920


def test_the_least_duration_leaves_longer_replies_alone(speaking_model, small_codec, word_tokenizer):
    """Where code 0 would not be drawn, nothing changes."""
    generator = Generator(speaking_model, small_codec, word_tokenizer, None)
    options = dict(seed=4, max_duration_s=0.8, top_k=2)
    free = generator.generate_codes("one two", **options)
    assert (free[:, 0] != 0).all()
    assert torch.equal(free, generator.generate_codes("one two", min_duration_s=0.8, **options))


def trimmed(clip: torch.Tensor, chunk_sizes: list[int]) -> torch.Tensor:
    trim = SilenceTrim()
    parts, start = [], 0
    while start < clip.shape[0]:
        size = chunk_sizes[len(parts) % len(chunk_sizes)]
        parts.append(trim.push(clip[start : start + size]))
        start += size
    return torch.cat([*parts, trim.finish()])


@pytest.mark.parametrize(("num_loud", "num_silent"), [(4801, 24_000), (4800, 0), (24_000, 1000), (0, 10_000), (100, 50)])
def test_silence_at_the_end_is_cut_but_for_a_tenth_of_a_second(num_loud, num_silent):
    loud = torch.sin(torch.arange(num_loud) / 5 + 1) * 0.3
    pause = torch.zeros(7200)
    clip = torch.cat((loud, pause, loud, torch.full((num_silent,), 1e-4)))
    expected = trimmed(clip, [clip.shape[0]])
    for sizes in ([1920], [1], [700, 0, 5000]) if num_loud < 10_000 else ([1920],):
        assert torch.equal(trimmed(clip, sizes), expected)
    assert torch.equal(expected, clip[: expected.shape[0]])
    if num_loud > 240:  # 0.1 s behind the last window that sounds, or all there was
        assert 0 <= expected.shape[0] - min(clip.shape[0], 2 * num_loud + 7200 + 2400) <= 240


def test_trimmed_speech_is_the_same_streamed_batched_and_in_a_session(speaking_model, small_codec, word_tokenizer):
    generator = Generator(speaking_model, small_codec, word_tokenizer, None)
    options = dict(seed=4, max_duration_s=0.8)
    clip = generator.generate("one two", trim_silence=True, **options)
    whole = generator.generate("one two", **options)
    assert torch.equal(clip, whole[: clip.shape[0]])
    assert torch.equal(torch.cat(list(generator.stream("one two", trim_silence=True, **options))), clip)
    assert torch.equal(generator.generate_batch([dict(text="one two", trim_silence=True, **options)])[0], clip)
    assert torch.equal(generator.session().say("one two", trim_silence=True, **options), clip)
