"""Which turns stay: thresholds on what was measured, each turn's reason for leaving, and what is context only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from csm.config import FilterConfig
from data_prep.failures import Rejected
from data_prep.manifest import ManifestTurn

MANY_WORDS = 10  # fewer words differ, or do not, by chance


def refused_recording(language: str | None, probability: float, dnsmos: float | None, config: FilterConfig) -> Rejected | None:
    """Why a whole recording is left out, or None."""
    if config.languages and language not in config.languages:
        return Rejected("language", f"{language} ({probability:.2f}), filter.languages={config.languages}")
    if language is not None and probability < config.min_language_probability:
        return Rejected("language", f"{language} at {probability:.2f}, filter.min_language_probability={config.min_language_probability:g}")
    if dnsmos is not None and dnsmos < config.min_dnsmos:
        return Rejected("dnsmos", f"{dnsmos:.2f} overall, filter.min_dnsmos={config.min_dnsmos:g}")
    return None


def refused_turn(turn: ManifestTurn, config: FilterConfig) -> Rejected | None:
    """Why a turn is left out, or None. A listener's noise is spared what counts words or length. What was not measured decides nothing."""
    quality = turn.quality
    assert turn.start_s is not None and turn.end_s is not None
    for key, value, low, high in (
        ("snr_db", quality.get("snr_db"), config.min_snr_db, None),
        ("bandwidth_hz", quality.get("bandwidth_hz"), config.min_bandwidth_hz, None),
        ("clipping", quality.get("clipping"), None, config.max_clipping),
        ("speech_share", quality.get("speech_share"), config.min_speech_share, None),
        ("background_db", quality.get("background_db"), None, config.max_background_db),
        ("dnsmos", quality.get("dnsmos"), config.min_dnsmos, None),
        ("compression", quality.get("asr_compression"), None, config.max_compression),
        ("unique_share", quality.get("unique_share") if len(turn.words) >= MANY_WORDS else None, config.min_unique_share, None),
        # A listener's noise is short, soft and unsure by nature: none of this says that it was not made.
        ("log_probability", None if turn.backchannel else quality.get("asr_log_probability"), config.min_log_probability, None),
        ("words_per_s", None if turn.backchannel else quality.get("words_per_s"), config.min_words_per_s, config.max_words_per_s),
        ("characters_per_s", None if turn.backchannel else quality.get("characters_per_s"), None, config.max_characters_per_s),
        ("duration_s", None if turn.backchannel else turn.end_s - turn.start_s, config.min_duration_s, None),
    ):
        if value is None:
            continue
        if low is not None and value < low:
            return Rejected(key, f"{value:.4g}, filter.min_{key}={low:g}: {turn.text[:60]!r}")
        if high is not None and value > high:
            return Rejected(key, f"{value:.4g}, filter.max_{key}={high:g}: {turn.text[:60]!r}")
    return None


def apart(turns: Sequence[ManifestTurn], config: FilterConfig) -> Iterator[tuple[int, ManifestTurn, Rejected | None]]:
    """(index, turn, why it leaves).

    What others talk over in mixed channels stays as context: its audio is not one voice. What follows a turn that leaves, if that
    was more than a listener's noise, was said to what is not there any more: there a sample ends.
    """
    is_gap = False
    for index, turn in enumerate(turns):
        if turn.channel is None and turn.quality.get("overlap_share", 0.0) > config.max_overlap_share:
            turn.learn = False
        why = refused_turn(turn, config)
        if why is None:
            turn.follows_gap, is_gap = is_gap, False
        else:
            is_gap |= not turn.backchannel
        yield index, turn, why
