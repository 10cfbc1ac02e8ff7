"""Whether a host that has weights answers, asked once and with a bound: its libraries hang for minutes where there is no network."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from functools import lru_cache

_TIMEOUT_S = 5.0


@lru_cache(maxsize=8)
def can_reach(host: str) -> bool:
    """False at once under HF_HUB_OFFLINE=1; else whether the host answers a request within five seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(f"https://{host}/", method="HEAD"), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
    return True
