"""The chat page in headless Chromium, as a person uses it: no console error, no request to anywhere else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live import running, slow
from ownlm.generate.model import Model
from tiny import tiny_model

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a-key-of-these-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page, and everything it said and asked for."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda message: message.type in {"error", "warning"} and self.faults.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = address
        self.page.goto(address)

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def answered(self) -> str:
        """The last answer, once it has ended."""
        self.page.wait_for_selector(".assistant:last-child .below button", timeout=30_000)
        return str(self.page.text_content(".assistant:last-child .text"))

    def close(self) -> None:
        assert all(url.startswith(self.address + "/") for url in self.requests), self.requests
        self.page.close()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Model]]:
    """A server slow enough to watch, sure enough of some tokens to show every shade."""
    model = slow(tiny_model(context=2048, seed=8, gain=2.5), 0.01)
    with running(model, tmp_path_factory.mktemp("page")) as address:
        yield address, model


def test_a_conversation(browser: Any, spoken: tuple[str, Model], tmp_path: Path) -> None:
    visit = Visit(browser, spoken[0], viewport={"width": 1100, "height": 760})
    page = visit.page
    page.wait_for_selector("#model:text-is('tiny')")
    assert "2,048 tokens" in page.text_content("#facts")
    assert page.is_disabled("#send")
    page.screenshot(path=tmp_path / "welcome.png")
    page.click("#settings-button")
    page.fill("#max-tokens", "60")
    page.fill("#temperature", "0")
    page.click("#settings-button")

    visit.ask("hello <b>there</b>")
    page.wait_for_selector(".writing .token")  # tokens are there before the answer has ended
    text = visit.answered()
    messages = [{"role": "user", "content": "hello <b>there</b>"}]
    assert text == spoken[1].generate(messages, max_tokens=60).text
    assert page.text_content(".user .text") == "hello <b>there</b>"
    assert page.locator(".user b").count() == 0

    token = page.locator(".assistant .token").nth(3)
    token.hover()
    assert page.is_visible("#tooltip")
    assert page.locator("#tooltip tr").count() >= 5
    assert "%" in page.text_content("#tooltip tr.chosen")
    page.screenshot(path=tmp_path / "tooltip.png")
    page.mouse.move(5, 5)
    assert page.is_hidden("#tooltip")
    page.focus(".assistant .text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#tooltip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tooltip")

    page.click("text=Regenerate")
    assert visit.answered() == text
    assert page.locator(".assistant").count() == 1
    visit.ask("and again")
    assert (
        visit.answered()
        == spoken[1]
        .generate(
            [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "and again"}], max_tokens=60
        )
        .text
    )
    page.click("#clear")
    assert page.locator("#log li").count() == 0
    assert page.is_visible("#welcome")
    assert visit.faults == []
    visit.close()


def test_stop_ends_the_answer_and_keeps_it(browser: Any, slow_address: str) -> None:
    visit = Visit(browser, slow_address)  # the other one would be done before anybody clicks
    visit.page.wait_for_selector("#model:text-is('tiny')")
    visit.ask("a long one")
    visit.page.wait_for_selector(".writing .token")
    visit.page.click("#stop")
    text = visit.answered()
    assert 0 < len(text) < 1900
    assert "stopped" in visit.page.text_content(".assistant .below")
    assert visit.page.is_visible("#send")
    assert visit.faults == []
    visit.close()


def test_errors_are_shown(browser: Any, spoken: tuple[str, Model]) -> None:
    visit = Visit(browser, spoken[0])
    visit.page.wait_for_selector("#model:text-is('tiny')")
    visit.ask("x" * 3000)
    visit.page.wait_for_selector("#error:not([hidden])")
    assert "context is 2048 tokens" in visit.page.text_content("#error")
    visit.close()


def test_a_key_is_asked_for_and_used(browser: Any, tmp_path: Path) -> None:
    with running(tiny_model(), tmp_path, api_keys=(KEY,)) as address:
        visit = Visit(browser, address)
        visit.page.wait_for_selector("#error:not([hidden])")
        assert "needs an API key" in visit.page.text_content("#error")
        assert visit.page.is_visible("#key")
        visit.page.fill("#key", KEY)
        visit.page.press("#key", "Tab")
        visit.page.wait_for_selector("#model:text-is('tiny')")
        assert visit.page.is_hidden("#error")
        visit.page.fill("#max-tokens", "5")
        visit.ask("hello")
        assert visit.answered()
        visit.close()


def test_small_and_dark(browser: Any, spoken: tuple[str, Model], tmp_path: Path) -> None:
    visit = Visit(browser, spoken[0], viewport={"width": 360, "height": 640}, color_scheme="dark", has_touch=True)
    page = visit.page
    page.wait_for_selector("#model:text-is('tiny')")
    page.click("#settings-button")
    page.fill("#max-tokens", "80")
    page.click("#settings-button")
    visit.ask("hello")
    visit.answered()
    page.locator(".assistant .token").nth(10).tap()
    assert page.is_visible("#tooltip")
    page.screenshot(path=tmp_path / "small.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert visit.faults == []
    visit.close()
