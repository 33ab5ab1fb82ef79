"""A headless Chromium for tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

SECONDS = 30
DRIVERS, BROWSERS = ("chromedriver",), ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Why there is no browser here; None where there is one."""
    if _found(BROWSERS) is None or _found(DRIVERS) is None:
        return "there is no Chromium with its driver: apt-get install chromium chromium-driver"
    return None


def _found(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


@contextmanager
def chromium(width: int = 1360, height: int = 1000) -> Iterator[webdriver.Chrome]:
    """A browser with a window of this size."""
    options = webdriver.ChromeOptions()
    options.binary_location = _found(BROWSERS) or ""
    # Without a sandbox, because root can have none, and with files in place of /dev/shm, which containers keep small.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_found(DRIVERS)))
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()
