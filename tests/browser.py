"""What a browser makes of a page: its width, what it fetches, what it complains about."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# In a frame as wide as a phone: a window of a browser may not be that narrow.
_HARNESS = """<!doctype html><body><iframe id="frame" src="%s" width="%d" height="800"></iframe><script>
window.onload = () => {
  const page = document.getElementById("frame").contentWindow;
  const root = page.document.documentElement;
  const seen = {
    width: root.scrollWidth, shown_width: root.clientWidth,
    fetched: page.performance.getEntriesByType("resource").map((entry) => entry.name),
    text: page.document.body.innerText, title: page.document.title,
    charts: [...page.document.querySelectorAll("figure svg")].map((svg) => svg.clientHeight),
  };
  document.body.textContent = "";
  document.body.dataset.seen = JSON.stringify(seen);
};
</script>"""


def look_at(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What headless Chromium sees of `page`; `folder` is for its files. Without it the test is skipped."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    harness = folder / "harness.html"
    harness.write_text(_HARNESS % (page.resolve().as_uri(), width), encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    done = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    unescaped = found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">")
    seen: dict[str, Any] = json.loads(unescaped.replace("&nbsp;", "\N{NO-BREAK SPACE}").replace("&amp;", "&"))
    return {**seen, "console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
