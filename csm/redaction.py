"""Keeps keys out of what a run writes down: its configuration, its records, its messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s'\"]*@")  # scheme://user:key@host
_PARAMETER = re.compile(r"([?&][\w.~-]+=)[^&\s#'\"]+")  # of a signed address; a glob's `?` has no `=` behind it
_SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_SHORTEST_SECRET = 8  # characters; shorter values would also hide ordinary words


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """A copy of text, lists and dictionaries in which keys read `***`.

    Hidden are the user part and the parameters of addresses (`https://user:key@host`, `https://host/a?signature=...`), and
    what environment variables named like a key, token, secret, password or credential hold, wherever it stands.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, environment) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, environment) for item in value]
    if not isinstance(value, str):
        return value
    for name, secret in environment.items():
        if len(secret) >= _SHORTEST_SECRET and _SECRET_NAMES.search(name.upper()):
            value = value.replace(secret, HIDDEN)
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", value))
