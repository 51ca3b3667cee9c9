"""The page in a headless Chromium, as people use it: the swarm, a run, the chat, on a desk and on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from petals_lightning.callbacks.learning_curve import CURVE_FILE
from petals_lightning.sample import MODEL_DIR
from petals_lightning.swarm import SwarmDirectory
from petals_lightning.swarm.directory import ModelEntry
from tests.helpers.endpoints import Endpoint, Server, save_tuned_parts
from tools.testing.swarms import InProcessSwarm

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]
TITLE = "a run"


class Page:
    """A browser, which has opened a page."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)

    def wait(self, holds: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60).until(lambda _: holds())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Read at once: the page may replace its elements."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.innerText)"
        return self.driver.execute_script(f"return {found}")

    def assert_no_complaints(self) -> None:
        complaints = [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert [entry for entry in complaints if "401" not in entry["message"]] == []


@pytest.fixture
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def swarm() -> Iterator[InProcessSwarm]:
    with InProcessSwarm(MODEL_DIR, [(0, 4), (0, 2)]) as swarm:
        yield swarm


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "newest"
    folder.mkdir(parents=True)
    train = [[step, 2 / step] for step in range(1, 41)]
    validation = [{"step": step, "epoch": step // 20, "val/loss": 1 / step, "val/accuracy": 0.9} for step in (20, 40)]
    curve = {"title": TITLE, "score": "val/accuracy", "steps": 80, "train": train, "validation": validation}
    (folder / CURVE_FILE).write_text(json.dumps(curve))
    return tmp_path / "outputs"


def test_swarm_run_and_chat(swarm: InProcessSwarm, browser: Any, run_folder: Path, tmp_path: Path) -> None:
    prompts = save_tuned_parts(tmp_path)["prompts"]
    endpoint = Endpoint(swarm.initial_peers, "--prompts", f"tuned={prompts}", "--run", str(run_folder))
    try:
        page = Page(browser, endpoint.url)
        page.wait(lambda: page.all(".cell"))
        names = [f"…{server.node.peer_id.to_base58()[-10:]}" for server in swarm.servers]
        assert page.texts(".spots li") == [f"Weak: blocks 2:4 only on {names[0]}"]
        assert [cell.get_attribute("class") for cell in page.all(".cell")] == ["cell", "cell", "cell one", "cell one"]
        rows = page.texts("tbody tr")
        assert [name in row for name, row in zip(reversed(names), rows, strict=True)] == [True, True]
        for row in rows:
            assert {"float32", "now"} <= set(row.split())
            assert " ms" in row
        page.wait(lambda: page.all("#run svg"))
        assert page.texts("#run h2") == [TITLE]
        assert "40 of 80" in page.texts("#run .figures")[0]
        assert len(page.all("#run svg")) == 2

        options = [option.text for option in page.all("#model option")]
        assert options == ["model", "tuned"]
        temperature = page.all("#temperature")[0]
        temperature.clear()
        temperature.send_keys("0")
        said = []
        for text in ("the plot was dull . what is your verdict ?", "is it thumbs up ?"):
            page.all("#text")[0].send_keys(text, Keys.ENTER)
            said.append({"role": "user", "content": text})
            page.wait(lambda: page.texts("#send") == ["Send"] and len(page.all(".turn")) == len(said) + 1)
            answer = endpoint.client().chat.completions.create(model="tuned", messages=said, temperature=0)  # type: ignore[arg-type]
            content = answer.choices[0].message.content or ""
            assert page.texts(".turn.assistant")[-1].split() == (content or "(no words)").split()
            said.append({"role": "assistant", "content": content})
        assert "before were on the servers" in page.texts("#note")[0]

        swarm.servers.pop(0).stop(timeout=1)
        page.wait(lambda: any(text.startswith("Broken: ") for text in page.texts(".spots li")))
        assert "blocks 2:4 without a server that answers" in page.texts(".spots li")[0]
        assert page.wait(lambda: page.all("tr.gone, tr.silent"))

        def background() -> str:
            return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

        light = background()
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert background() != light
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 390
        page.assert_no_complaints()
    finally:
        endpoint.stop()


def test_the_page_alone_asks_for_a_key_and_trusts_no_name(swarm: InProcessSwarm, browser: Any, tmp_path: Path) -> None:
    node = swarm.servers[0].node
    entry = ModelEntry("<img/src=x>", 3, "</script><img/src=x>")
    assert node.run(SwarmDirectory(node).announce_model(entry, 600))
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    server = Server("dashboard", "--initial-peers", *swarm.initial_peers, "--api-key-file", str(keys))
    try:
        page = Page(browser, server.url)
        for key, refusal in (("wrong", "That key is not known here."), ("the-key", None)):
            field = page.wait(
                lambda: next((each for each in page.all("#gate input[type=password]") if each.is_displayed()), None)
            )
            field.clear()
            field.send_keys(key, Keys.ENTER)
            if refusal is not None:
                page.wait(lambda: page.texts("#refusal") == ["That key is not known here."])
        page.wait(lambda: len(page.all("#models h2")) == 2)
        assert page.texts("#models h2")[0] == "</script><img/src=x>", "what is broken comes first"
        assert not page.all("img")
        assert not page.all("#chat")[0].is_displayed()
        page.assert_no_complaints()
    finally:
        server.stop()
