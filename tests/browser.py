"""Pages in headless Chromium: what a script says of a page at a width, and a picture of it. No driver, no port.

The page stands in a frame of the width asked for, since a window of Chromium's own cannot be as narrow as a phone.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PHONE, DESKTOP = 400, 1400  # CSS pixels
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --allow-file-access-from-files --autoplay-policy=no-user-gesture-required --hide-scrollbars"
).split()


def why_no_browser() -> str | None:
    """None where Chromium is there, after it was installed where that is possible; else why not, for a skip."""
    if shutil.which("chromium"):
        return None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"Chromium is not installed, and {' '.join(command)} failed: {error}"
        if done.returncode:
            return f"Chromium is not installed, and {' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return None


def ask_page(page: Path, script: str, *, width: int = DESKTOP, height: int = 900) -> Any:
    """What a JavaScript function body returns, run in the loaded page with `document` and `window` being the page's.

    It may return a promise. An error of the page's own scripts, or of this one, is raised.
    """
    told = _run(page, width, height, script, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'<pre id="told">(.*?)</pre>', told, re.DOTALL)
    assert found, f"the page said nothing: {told[-500:]}"
    answer = json.loads(html.unescape(found[1]))
    assert "error" not in answer, answer["error"]
    return answer["value"]


def picture(page: Path, target: Path, *, width: int = DESKTOP, height: int = 900) -> None:
    """Write a PNG of the page's first `height` pixels."""
    _run(page, width, height, "return null", f"--screenshot={target}", f"--window-size={max(width, 500)},{height}")


def _run(page: Path, width: int, height: int, script: str, *flags: str) -> str:
    harness = f"""<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="told" hidden></pre><script>
const errors = [], frame = document.getElementById("page"), told = document.getElementById("told");
frame.onload = async () => {{
  const window = frame.contentWindow, document = window.document;
  window.onerror = message => errors.push(message);
  try {{
    const value = await (async () => {{ {script} }})();
    told.textContent = JSON.stringify(errors.length ? {{error: errors.join("; ")}} : {{value: value ?? null}});
  }} catch (error) {{ told.textContent = JSON.stringify({{error: String(error)}}); }}
}};
frame.src = {json.dumps(page.resolve().as_uri())};
</script></body>"""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "harness.html")
        told.write_text(harness.replace("hidden></pre>", "></pre>") if "--dump-dom" in flags else harness, encoding="utf-8")
        command = ["chromium", *_FLAGS, f"--user-data-dir={folder}/profile", *flags, told.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout
