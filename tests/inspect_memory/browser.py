"""Chromium without a window: it opens a page, runs a program in it, and says what that found.

`python -m tests.inspect_memory.browser` says in one line that there is none here, with exit code 1.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FIRST = """<script>const mistakes = []; addEventListener("error", event => mistakes.push(event.message));
addEventListener("securitypolicyviolation", event => mistakes.push(event.blockedURI));</script>"""
LAST = """<script>
let found = null;
try { found = (() => { PROGRAM })(); } catch (error) { mistakes.push(String(error)); }
const told = document.createElement("pre");
told.id = "told";
told.textContent = JSON.stringify({found, mistakes});
document.body.append(told);
</script>"""


def missing() -> str:
    """What this machine lacks, "" for nothing."""
    return "" if _browser() else f"needs one of {', '.join(NAMES)} (apt install chromium)"


def run_in_page(page: Path, program: str) -> Any:
    """What the body of a JavaScript function returns in a page that was opened; any mistake on the page is an error."""
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", f"<head>{FIRST}").replace("</body>", LAST.replace("PROGRAM", program) + "</body>")
    driven = page.with_name("driven.html")
    driven.write_text(text, encoding="utf-8")
    shown = _chromium(driven, "--dump-dom")
    match = re.search('<pre id="told">(.*?)</pre>', shown, re.DOTALL)
    if not match:
        raise AssertionError(f"the page has not told what it found: {shown[-2000:]}")
    told = json.loads(html.unescape(match.group(1)))
    if told["mistakes"]:
        raise AssertionError(f"mistakes on the page: {told['mistakes']}")
    return told["found"]


def _chromium(page: Path, *options: str) -> str:
    browser = _browser()
    assert browser is not None
    profile = page.with_name("profile")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise AssertionError(f"{browser} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


if __name__ == "__main__":
    sys.exit(f"make test-browser cannot run here: it {why}" if (why := missing()) else 0)
