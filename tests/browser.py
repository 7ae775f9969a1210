"""Headless Chromium for tests of pages: skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,900",
)  # fmt: skip
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Browser:
    """An open browser and what it has said and fetched so far."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.errors: list[str] = []
        """Of the console."""
        self.answers: dict[str, int] = {}
        """Status by address."""
        self.unanswered: dict[str, str] = {}
        """Cause by address."""
        self._address: dict[str, str] = {}

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 30) -> None:
        """Wait until an expression is true.

        Raises:
            AssertionError: it never is; the message tells what the console said.
        """
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.run(f"return {script}"))
        except TimeoutException:
            self.read_logs()
            raise AssertionError(f"{script} is never true; console: {self.errors}, {self.unanswered}") from None

    def click(self, what: str, text: str) -> None:
        """Click on what a CSS selector finds that reads `text`."""
        next(found for found in self.driver.find_elements("css selector", what) if found.text == text).click()

    def hover(self, what: str) -> None:
        """Move the mouse to the middle of what a CSS selector finds."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.driver.find_element("css selector", what)).perform()

    def read_logs(self) -> None:
        """Bring `errors`, `answers` and `unanswered` up to date."""
        self.errors += [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        for line in self.driver.get_log("performance"):
            event = json.loads(line["message"])["message"]
            told = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                self._address[told["requestId"]] = told["request"]["url"]
            elif event["method"] == "Network.responseReceived":
                self.answers[told["response"]["url"]] = told["response"]["status"]
            elif (
                event["method"] == "Network.loadingFailed" and told["requestId"] in self._address
            ):  # else: the browser's own
                self.unanswered[self._address[told["requestId"]]] = told["errorText"]


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in the folder `profile`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
