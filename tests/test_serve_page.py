"""The page of `mla-trt serve` in a real Chromium, in front of a real tritonserver."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_serve import alone, lowered  # noqa: F401

browser = pytest.importorskip("browser", reason="selenium is not installed")
pytest.importorskip("triton_server", reason="tritonclient is not installed")
import triton_server  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from serve_process import ServeProcess  # noqa: E402

WHY = triton_server.missing() or browser.missing()
SECONDS = 30
PAGES = 4000
LONG = 12_000

pytestmark = pytest.mark.skipif(WHY is not None, reason=WHY or "")


@pytest.fixture(scope="module")
def server(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:  # noqa: F811
    options = ("--pages", str(PAGES), "--max-batch", "3", "--stop-ids", "")
    with ServeProcess(lowered, tmp_path_factory.mktemp("serve"), *options) as process:
        yield process.ready()


@pytest.fixture(scope="module")
def ids_server(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:  # noqa: F811
    """The same without a tokenizer."""
    folder = tmp_path_factory.mktemp("ids") / "model"
    shutil.copytree(lowered, folder, ignore=shutil.ignore_patterns("*.json"))
    with ServeProcess(folder, tmp_path_factory.mktemp("serve"), "--pages", str(PAGES), "--name", "ids") as process:
        yield process.ready()


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    with browser.chromium() as found:
        yield found


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver: WebDriver, server: ServeProcess) -> None:
        self.driver = driver
        driver.get(f"http://127.0.0.1:{server.port}/")
        self.until(lambda: self.text("state") == "live" and self.text("pages-of") == f"of {PAGES}")

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.at(name).text

    def number(self, name: str) -> float:
        return float(self.text(name).replace(",", ""))

    def until(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def write(self, **values: object) -> None:
        for name, value in values.items():
            self.at(name).clear()
            self.at(name).send_keys(str(value))

    def start(self, prompt: str, **values: object) -> WebElement:
        self.write(prompt=prompt, **values)
        before = len(self.driver.find_elements(By.CSS_SELECTOR, ".stream"))
        self.at("start").click()
        self.until(lambda: len(self.driver.find_elements(By.CSS_SELECTOR, ".stream")) > before)
        return self.driver.find_element(By.CSS_SELECTOR, ".stream")

    def status(self, stream: WebElement) -> str:
        return stream.find_element(By.CSS_SELECTOR, ".status").text

    def said(self, stream: WebElement) -> str:
        return stream.find_element(By.CSS_SELECTOR, ".said").get_property("textContent")

    def complaints(self) -> list[str]:
        """What the browser's console has against the page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def test_tokens_stream_and_are_those_of_the_sequence_alone(
    driver: WebDriver,
    ids_server: ServeProcess,
    alone: Callable[[list[int], int], list[int]],  # noqa: F811
) -> None:
    page = Page(driver, ids_server)
    assert page.text("name") == "ids"
    assert "token ids, 0 to 63" in page.text("prompt-label")
    assert page.at("max_new_tokens").get_property("value") == "128"
    stream = page.start("1, 5, 9", max_new_tokens=60)
    page.until(lambda: page.status(stream) == "complete")
    assert page.said(stream).split() == [str(token) for token in [1, 5, 9, *alone([1, 5, 9], 60)]]
    assert stream.find_element(By.CSS_SELECTOR, ".figures").text.startswith("60 tokens · ")
    page.until(lambda: page.text("first-count") == "1")

    def drawn() -> bool:
        count = page.text("between-count")
        dots = len(driver.find_elements(By.CSS_SELECTOR, "#between-chart circle"))
        if count == "0" and page.at("stop").get_property("disabled"):  # on a busy machine all tokens may come together
            page.start("1, 5, 9", max_new_tokens=60)
        most = 59 * len(driver.find_elements(By.CSS_SELECTOR, ".stream"))
        return count == str(dots) and 0 < dots <= most

    page.until(drawn)
    for name in ("first-p50", "first-p95", "between-p50", "between-p95"):
        assert page.text(name).endswith("s")

    def whole() -> bool:  # the figures are a poll old, and the last stream may have ended since
        free, cached = page.number("pool-free-text"), page.number("pool-cached-text")
        return cached > 0 and free + cached == PAGES

    page.until(whole)
    assert page.complaints() == []


def test_text_goes_in_and_comes_out(
    driver: WebDriver,
    server: ServeProcess,
    alone: Callable[[list[int], int], list[int]],  # noqa: F811
) -> None:
    page = Page(driver, server)
    page.write(prompt="w1 w5 w9", max_new_tokens=12)
    page.at("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: bool(driver.find_elements(By.CSS_SELECTOR, ".stream.done")))
    stream = driver.find_element(By.CSS_SELECTOR, ".stream")
    assert page.said(stream) == " ".join(f"w{token}" for token in [1, 5, 9, *alone([1, 5, 9], 12)])
    stream = page.start("w1 w5", stop_ids=str(alone([1, 5], 3)[2]))
    page.until(lambda: page.status(stream) == "stopped at a stop id")
    assert page.complaints() == []


def test_streams_run_together_are_seen_in_the_figures_and_stop_when_told(
    driver: WebDriver, server: ServeProcess
) -> None:
    page = Page(driver, server)
    before = server.metrics()["tokens_total"]
    streams = [page.start(f"w{token}", max_new_tokens=LONG, temperature=1, seed=token) for token in (3, 4)]
    page.until(lambda: page.number("batch") == 2 and page.number("pages") > 0 and page.number("rate") > 0)
    page.until(lambda: all(page.status(stream) == "running" for stream in streams))
    assert page.text("stop") == "Stop all 2"
    streams[0].find_element(By.TAG_NAME, "button").click()
    page.until(lambda: page.status(streams[0]) == "stopped by you")
    page.until(lambda: page.text("stop") == "Stop")
    page.at("stop").click()
    page.until(lambda: page.status(streams[1]) == "stopped by you")
    server.wait_for(running=0, waiting=0)
    assert server.metrics()["tokens_total"] - before < 2 * LONG
    page.until(lambda: page.number("pages") == 0 and page.number("batch") == 0 and page.number("rate") == 0)
    assert not page.at("stop").is_enabled()
    assert page.complaints() == []


def test_a_stream_that_grows_does_not_move_the_buttons_of_others(driver: WebDriver, server: ServeProcess) -> None:
    page = Page(driver, server)
    below, above = (page.start(f"w{token}", max_new_tokens=LONG, temperature=1, seed=token) for token in (5, 6))
    button = below.find_element(By.TAG_NAME, "button")
    place = button.location
    said = above.find_element(By.CSS_SELECTOR, ".said")
    page.until(lambda: driver.execute_script("return arguments[0].scrollHeight > arguments[0].clientHeight", said))
    assert button.location == place
    page.at("stop").click()
    page.until(lambda: all(page.status(stream) == "stopped by you" for stream in (below, above)))


def test_what_is_wrong_is_said_where_it_was_asked(driver: WebDriver, ids_server: ServeProcess) -> None:
    page = Page(driver, ids_server)
    for prompt, reason in (("", "the prompt is empty"), ("1, x", "token ids must be whole numbers")):
        page.write(prompt=prompt)
        page.at("start").click()
        page.until(lambda reason=reason: reason in page.text("form-error"))
    stream = page.start("1, 64")
    page.until(lambda: "failed" in stream.get_attribute("class"))
    assert "token 64 of the prompt is not in the vocabulary" in page.status(stream)
    assert not page.at("form-error").is_displayed()
    # Nothing that comes back is taken for HTML.
    page.write(prompt="<b>1</b>")
    page.at("start").click()
    page.until(lambda: page.at("form-error").is_displayed())
    assert driver.find_elements(By.CSS_SELECTOR, "#form-error b") == []


def test_the_page_is_dark_where_the_visitor_likes_it_so_and_narrow_on_a_phone(
    driver: WebDriver, ids_server: ServeProcess
) -> None:
    page = Page(driver, ids_server)

    def brightness() -> int:
        colour = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return sum(int(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])

    try:
        for scheme, bright in (("light", True), ("dark", False)):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            assert (brightness() > 380) == bright
        size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert page.at("batch").location["x"] < 360
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_sees_the_server_end(driver: WebDriver, lowered: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ("--pages", str(PAGES), "--drain-seconds", "0", "--stop-ids", "")
    with ServeProcess(lowered, tmp_path, *options) as process:
        page = Page(driver, process.ready())
        stream = page.start("w1", max_new_tokens=LONG)
        page.until(lambda: page.status(stream) == "running")
        assert process.end(signal.SIGINT) == 0
    page.until(lambda: "failed" in stream.get_attribute("class"))
    assert "shutting down" in page.status(stream)
    page.until(lambda: page.text("state") == "the server has ended")
