"""A real browser, driven over the DevTools protocol: Chromium without a window, told what to do through two pipes.

It has a profile of its own, which is gone afterwards, and listens on no port.
"""

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-first-run", "--no-default-browser-check", "--disable-gpu", "--hide-scrollbars",
         "--disable-extensions", "--disable-background-networking", "--disable-sync", "--mute-audio",
         "--disable-component-update", "--autoplay-policy=user-gesture-required", "--remote-debugging-pipe")
BROWSER_ANSWER_S = 60.0
# keys that are no letters: code, number
NAMED_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9,
              "Home": 36, "End": 35, " ": 32}


class NoBrowser(RuntimeError):
    """No Chromium is installed here."""


class BrowserError(RuntimeError):
    """The browser, or a script in it, has failed."""


def chromium() -> str:
    """The browser's program.  Raises NoBrowser."""
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise NoBrowser("no Chromium is installed; Debian's package is called chromium: apt-get install chromium")


class Browser:
    """One page of one browser."""

    def __init__(self, width: int = 1280, height: int = 800, *, scale: float = 1.0, dark: bool = False,
                 phone: bool = False):
        """Raises NoBrowser."""
        program = chromium()
        self.folder = tempfile.mkdtemp(prefix="dailies-browser-")
        self.numbers = itertools.count(1)
        self.answers: dict[int, queue.SimpleQueue] = {}
        self.events: list[dict[str, Any]] = []
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def place() -> None:                            # where the browser looks for its two pipes
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [program, *FLAGS, *root, f"--user-data-dir={self.folder}", "about:blank"], preexec_fn=place,
            close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self.folder})
        os.close(theirs_in)
        os.close(theirs_out)
        self.to, self.come = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb")
        self.session: str | None = None
        threading.Thread(target=self.listen, daemon=True).start()
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrowserError, OSError):
            self.call("Browser.close", timeout_s=5)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self.to.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def listen(self) -> None:
        waiting = b""
        with suppress(ValueError, OSError):
            while data := os.read(self.come.fileno(), 1 << 16):
                *whole, waiting = (waiting + data).split(b"\0")
                for text in whole:
                    message = json.loads(text)
                    if "id" in message:
                        self.answers.pop(message["id"]).put(message)
                    else:
                        self.events.append(message)

    def call(self, method: str, *, timeout_s: float = BROWSER_ANSWER_S, **params: Any) -> dict[str, Any]:
        """Raises BrowserError."""
        number = next(self.numbers)
        said = {"id": number, "method": method, "params": params}
        if self.session:
            said["sessionId"] = self.session
        answers = self.answers[number] = queue.SimpleQueue()
        self.to.write(json.dumps(said).encode() + b"\0")
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise BrowserError(f"{method}: no answer in {timeout_s:g} s") from None
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise.  Raises BrowserError for what it throws."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                          userGesture=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def open(self, address: str, *, until: str = "document.readyState === 'complete'") -> None:
        self.run("window.before = true")                # until the next page is there, this one answers
        self.call("Page.navigate", url=address)
        self.wait(f"!window.before && ({until})")

    def wait(self, script: str, *, timeout_s: float = 30.0) -> None:
        """Until an expression is true.  Raises BrowserError."""
        end = time.monotonic() + timeout_s
        while True:
            with suppress(BrowserError):                # a page that is only just coming
                if self.run(f"Boolean({script})"):
                    return
            if time.monotonic() > end:
                raise BrowserError(f"not so in {timeout_s:g} s: {script}; {self.complaints()[:3]}")
            time.sleep(0.02)

    def key(self, key: str, *, shift: bool = False) -> None:
        """Pressed and let go, as on a keyboard."""
        code = NAMED_KEYS[key] if key in NAMED_KEYS else ord(key.upper()) if key.isalnum() else 0
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path | None = None, **options: Any) -> bytes:
        """PNG, or what `format` says, of what is seen."""
        data = base64.b64decode(self.call("Page.captureScreenshot", **({"format": "png"} | options))["data"])
        if path:
            path.write_bytes(data)
        return data

    def complaints(self) -> list[str]:
        """Errors of the console, of scripts and of loading."""
        found = []
        for event in list(self.events):
            params = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    details = params["exceptionDetails"]
                    found.append(details.get("exception", {}).get("description") or details["text"])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    found.append(" ".join(str(each.get("value")) for each in params["args"]))
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def requested(self) -> list[str]:
        """The address of every request."""
        return [event["params"]["request"]["url"] for event in list(self.events)
                if event.get("method") == "Network.requestWillBeSent"]
