"""What a browser makes of a page: its width, what it fetches, what it complains about."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import time
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


class Page:
    """A page in headless Chromium, driven by its DevTools protocol over a pipe. Use it as a context."""

    def __init__(self, address: str, width: int, height: int, folder: Path) -> None:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("needs Chromium")
        from_browser, browser_writes = os.pipe()
        browser_reads, to_browser = os.pipe()
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-sync",
        ]
        command += [
            "--disable-background-networking",
            "--disable-component-update",
            "--remote-debugging-pipe",
        ]
        command += [f"--user-data-dir={folder / 'browser'}", f"--window-size={width},{height}"]
        # The protocol is spoken over the descriptors 3 and 4.
        shell = f"exec {shlex.join(command)} 3<&{browser_reads} 4>&{browser_writes}"
        self._process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(browser_reads, browser_writes), stderr=subprocess.DEVNULL
        )
        os.close(browser_reads)
        os.close(browser_writes)
        self._answers, self._calls = os.fdopen(from_browser, "rb"), os.fdopen(to_browser, "wb")
        self._number, self._session, self._rest = 0, None, b""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._answers.close()
        self._calls.close()

    def value_of(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        given = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value_of(condition):
            assert time.monotonic() < deadline, (condition, self.value_of("document.body.innerText"))
            time.sleep(0.05)

    def type_text(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r")

    def take_screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            call["sessionId"] = self._session
        self._calls.write(json.dumps(call).encode() + b"\0")
        self._calls.flush()
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._answers.fileno(), 65536)
                assert piece, "the browser has ended"
                self._rest += piece
            message, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(message)
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(str(answer["params"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
