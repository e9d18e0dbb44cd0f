"""Pages in a real browser, where the machine has one."""

import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
if BROWSER is None:  # for the summary of the run
    warnings.warn("no Chromium: the site and the slides were not drawn", stacklevel=1)
# No sandbox: it does not start for root in a container. No page here is a stranger's.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--window-size=1280,807", "--virtual-time-budget=20000")
TELL = """<script>
const waiting = setInterval(() => {
  if (!(%s)) return;
  clearInterval(waiting);
  const told = JSON.stringify((() => { %s })());
  document.body.replaceChildren(Object.assign(
    document.createElement("pre"), {id: "told", textContent: told}));
}, 50);
</script>"""


def ask(page: Path, script: str, *, ready: str = "true", query: str = "") -> Any:
    """What a script returns in a page, once it is ready; the page's own folder serves it."""
    copy = page.with_name(f".asked.{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace(
        "</html>", TELL % (ready, script) + "</html>"), encoding="utf-8")
    try:
        done = subprocess.run(
            [BROWSER, *FLAGS, "--dump-dom", copy.resolve().as_uri() + query],
            capture_output=True, text=True, timeout=900)
    finally:
        copy.unlink()
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told[1]))
