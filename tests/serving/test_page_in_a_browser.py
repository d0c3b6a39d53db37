"""The page to type into, in a real browser: Chromium without a window, driven by chromedriver over plain HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import ports
import processes
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from served_models import Gate, running, until, write_folder  # noqa: E402

from megasparse.serving.limits import Limits  # noqa: E402
from megasparse.serving.served import open_served  # noqa: E402

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element, by the WebDriver standard."""

CONTRAST = """
const light = (color) => {
  const parts = color.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const backOf = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
};
return [...document.querySelectorAll("h1, p, label, input, textarea, button, output, .written")].map((element) => {
  const pair = [light(getComputedStyle(element).color), light(backOf(element))].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
});
"""
"""Contrast of texts with what is behind them, by the formula of the Web Content Accessibility Guidelines, 1.4.3."""


class Browser:
    """A session of a driver."""

    def __init__(self, port: int, scheme: str) -> None:
        self._address = f"http://127.0.0.1:{port}"
        words = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,900"]
        options = {"args": words, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.post("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=media)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, content, {"Content-Type": "application/json"})
        request.method = method
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def post(self, path: str, **body: Any) -> Any:
        return self._ask("POST", self._session + path, body)

    def run(self, script: str) -> Any:
        return self.post("/execute/sync", script=script, args=[])

    def _element(self, name: str) -> str:
        return f"/element/{self.post('/element', using='css selector', value=f'#{name}')[ELEMENT]}"

    def type(self, name: str, text: str) -> None:
        self.post(f"{self._element(name)}/clear")
        self.post(f"{self._element(name)}/value", text=text)

    def click(self, name: str) -> None:
        self.post(f"{self._element(name)}/click")

    def text(self, name: str) -> str:
        return self.run(f"return document.getElementById('{name}').textContent")

    def label(self, selector: str) -> list[str]:
        """Accessible names, as the browser computes them for screen readers."""
        found = self.post("/elements", using="css selector", value=selector)
        return [self._ask("GET", f"{self._session}/element/{one[ELEMENT]}/computedlabel") for one in found]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def end(self) -> None:
        self._ask("DELETE", self._session)


@pytest.fixture
def browser(request) -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with chromedriver here (Debian: chromium, chromium-driver)")
    with ports.reserve_port() as reserved:
        port = ports.port_of(reserved)
    with processes.Process(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL) as _:
        until(lambda: _answers(port))
        found = Browser(port, request.param)
        yield found
        found.end()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=10) as answer:
            return json.load(answer)["value"]["ready"]
    except OSError:
        return False


@pytest.mark.parametrize(("browser", "back"), [("light", 251), ("dark", 21)], indirect=["browser"])
def test_a_person_writes_with_it(browser, back, tmp_path) -> None:
    served = open_served(write_folder(tmp_path / "small", "model.seq_length=512"))
    body = {"prompt": "The <b>cat</b>", "max_tokens": 40, "seed": 3, "temperature": 0.5, "top_p": 1}
    with running(served, Limits(tokens=400)) as server, Gate(served.trained.model) as gate:
        browser.post("/url", url=f"http://127.0.0.1:{server.port}/")
        until(lambda: browser.text("title") == "small")
        # The browser has asked for the model's name alone; what it needs is in the page.
        names = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert names == [f"http://127.0.0.1:{server.port}/health"]

        for name, value in (("prompt", body["prompt"]), ("tokens", 40), ("temperature", 0.5), ("seed", 3)):
            browser.type(name, str(value))
        browser.click("write")
        gate.let(10)
        until(lambda: len(gate.evaluated) == 10)
        until(lambda: browser.text("state") == "Writing ..." and len(browser.text("text")) > len(body["prompt"]))
        began = browser.text("text")
        gate.open()
        until(lambda: browser.text("state") == "40 tokens; the number of tokens is reached.")
        whole = server.post("/v1/completions", body)[1]["choices"][0]["text"]
        # Tags are text.
        assert browser.text("text") == body["prompt"] + whole and (body["prompt"] + whole).startswith(began)
        assert min(browser.run(CONTRAST)) >= 4.5
        assert browser.run("return getComputedStyle(document.body).backgroundColor").startswith(f"rgb({back},")
        assert all(browser.label("input, textarea, button, output"))
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")

    with running(served, Limits(tokens=400)) as server, Gate(served.trained.model) as gate:
        # Stopping frees the place; an error is told; another text can follow.
        browser.post("/url", url=f"http://127.0.0.1:{server.port}/")
        browser.type("prompt", "a")
        browser.type("tokens", "400")
        browser.click("write")
        gate.let(5)
        until(lambda: len(gate.evaluated) == 5)
        browser.click("stop")
        until(lambda: browser.text("state") == "Stopped.")
        gate.open()
        server.until_idle()
        assert len(gate.evaluated) < 400
        assert browser.complaints() == []
        browser.type("tokens", "401")
        browser.click("write")
        until(lambda: browser.text("state").startswith("Error: max_tokens: 401; must be at most 400"))
        browser.type("tokens", "5")
        browser.click("write")
        until(lambda: browser.text("state").startswith("5 tokens"))
