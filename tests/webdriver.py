"""As much of W3C WebDriver (JSON over HTTP, spoken by chromedriver) as the browser tests need."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver")
PATIENCE = float(os.environ.get("MEDBUDGET_PATIENCE", "120"))  # seconds
ARROW_LEFT, ARROW_RIGHT, ESCAPE = "\ue012", "\ue014", "\ue00c"

needs_browser = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)",
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, content: Any = None, method: str | None = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as answer:
        return json.load(answer)["value"]


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"after {PATIENCE:.0f} s: {what}")


class Browser:
    """As much of WebDriver as the tests need."""

    def __init__(self, url: str, *more: str, downloads: Path | None = None) -> None:
        flags = [
            *more,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]
        flags += ["--no-proxy-server", "--window-size=1200,1000"]
        options: dict[str, Any] = {"binary": CHROMIUM, "args": flags}
        if downloads is not None:
            options["prefs"] = {"download.default_directory": str(downloads)}
        wanted = {
            "alwaysMatch": {
                "browserName": "chrome",
                "timeouts": {"script": int(1000 * PATIENCE), "pageLoad": int(1000 * PATIENCE)},
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
        }
        session = ask(f"{url}/session", {"capabilities": wanted})
        self.url = f"{url}/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        ask(f"{self.url}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return ask(f"{self.url}/execute/sync", {"script": script, "args": arguments})

    def press(self, keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        ask(f"{self.url}/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def click(self, css: str) -> None:
        ask(f"{self.url}/element/{self.find(css)}/click", {})

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return ask(f"{self.url}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        """Make the page this wide and high, as a phone's screen would."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def read_console(self) -> list[str]:
        """Return the errors that the console got since the last call."""
        logged = ask(f"{self.url}/se/log", {"type": "browser"})
        return [entry["message"] for entry in logged if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(ask(f"{self.url}/screenshot")))

    def find(self, css: str) -> str:
        found = ask(f"{self.url}/element", {"using": "css selector", "value": css})
        return str(next(iter(found.values())))

    def wait_for(self, script: str, what: str) -> Any:
        """Wait until a script returns something true; else tell what the page says."""
        try:
            return until(lambda: self.run(script), what)
        except AssertionError as error:
            page = self.run("return document.body.innerText")
            raise AssertionError(f"{error}; the page says:\n{page}") from None

    def type(self, css: str, text: str) -> None:
        ask(f"{self.url}/element/{self.find(css)}/value", {"text": text})

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move through the others, let go."""
        moves = [
            {"type": "pointerMove", "duration": 50, "x": round(x), "y": round(y)} for x, y in points
        ]
        down, up = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        actions = [{"type": "pointer", "id": "mouse", "actions": [moves[0], down, *moves[1:], up]}]
        ask(f"{self.url}/actions", {"actions": actions})


@contextmanager
def open_browser(*flags: str, downloads: Path | None = None) -> Iterator[Browser]:
    """Start chromedriver and a browser of its own; end both."""
    port = free_port()
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: ask(f"{url}/status")["ready"], "chromedriver does not start")
        made = Browser(url, *flags, downloads=downloads)
        yield made
        with suppress(OSError):  # a test may have killed it
            ask(made.url, method="DELETE")
    finally:
        driver.terminate()
        driver.wait()
