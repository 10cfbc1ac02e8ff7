"""Which turns stay: thresholds on what was measured, each turn's reason for leaving, and what is context only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from csm.config import FilterConfig
from data_prep.failures import Rejected
from data_prep.manifest import ManifestTurn


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
    """Why a turn is left out, or None; a listener's noise is spared what is counted in words."""
    quality = turn.quality
    assert turn.start_s is not None and turn.end_s is not None
    words_per_s = len(turn.text.split()) / max(turn.end_s - turn.start_s, 1e-6)
    for key, value, low, high in (
        ("snr_db", quality.get("snr_db"), config.min_snr_db, None),
        ("bandwidth_hz", quality.get("bandwidth_hz"), config.min_bandwidth_hz, None),
        ("clipping", quality.get("clipping"), None, config.max_clipping),
        ("speech_share", quality.get("speech_share"), config.min_speech_share, None),
        ("log_probability", quality.get("asr_log_probability"), config.min_log_probability, None),
        ("compression", quality.get("asr_compression"), None, config.max_compression),
        ("words_per_s", None if turn.backchannel else words_per_s, config.min_words_per_s, config.max_words_per_s),
    ):
        if value is None:
            continue
        if low is not None and value < low:
            return Rejected(key, f"{value:.4g}, filter.min_{key}={low:g}: {turn.text[:60]!r}")
        if high is not None and value > high:
            return Rejected(key, f"{value:.4g}, filter.max_{key}={high:g}: {turn.text[:60]!r}")
    return None


def apart(turns: Sequence[ManifestTurn], config: FilterConfig) -> Iterator[tuple[int, ManifestTurn, Rejected | None]]:
    """(index, turn, why it leaves); what others talk over in mixed channels stays as context: its audio is not one voice."""
    for index, turn in enumerate(turns):
        if turn.channel is None and overlap_share(turn, turns) > config.max_overlap_share:
            turn.learn = False
        yield index, turn, refused_turn(turn, config)


def overlap_share(turn: ManifestTurn, turns: Sequence[ManifestTurn]) -> float:
    """Share of a turn during which another speaker's turn goes on."""
    assert turn.start_s is not None and turn.end_s is not None
    parts = sorted(
        (max(turn.start_s, other.start_s), min(turn.end_s, other.end_s))
        for other in turns
        if other.speaker != turn.speaker and other.start_s is not None and other.end_s is not None
    )
    covered_s, reached_s = 0.0, turn.start_s
    for start_s, end_s in parts:
        if end_s > max(start_s, reached_s):
            covered_s += end_s - max(start_s, reached_s)
            reached_s = end_s
    return covered_s / max(turn.end_s - turn.start_s, 1e-6)
