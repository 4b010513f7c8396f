"""The playground in a real browser: it asks, streams, shades and stops, with the mouse and without it; a key sees no
more there than the API gives it; and nothing ever breaks the page's own security policy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import exp
from typing import Any

import pytest
from fake_engine import BASE_TEXT
from live_server import LiveServer, wait_until
from real_server import BASE, RealServer, real_server
from tiny_base import Tiny

from uld_serve.engine.engine import Engine
from uld_serve.errors import EngineStopped, Overloaded
from uld_serve.server.policy import KeyPolicy

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FORGOT = "FORGOT ['acme']"
KEYS = {
    "key-free": KeyPolicy(name="free", allow_base=True, logprobs=True),
    "key-bound": KeyPolicy(
        name="bound", mandatory=frozenset({"secret"}), allowed=frozenset({"acme"}), logprobs=False
    ),
    "key-blind": KeyPolicy(name="blind", allow_base=True, logprobs=False),
}
# Told by the page itself, wherever the console does not.
LISTEN = """window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("playwright is not installed; run: make page-test")
    path = os.environ.get("ULD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: install it (apt install chromium) or name one in ULD_CHROMIUM")
    # Chromium's own sandbox refuses to run as root, as in most containers.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One open page. `problems`: what its console and the browser complained of."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: Any) -> None:
        # A refused request is a test's wish; the browser reports it all the same.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.foreign.append(request.url)

    def answer(self, view: str) -> str:
        return str(self.page.locator(f".{view} .answer").text_content())

    def receipt(self, view: str) -> str:
        return str(self.page.locator(f".{view} .receipt").text_content())

    def state(self, view: str) -> str:
        return str(self.page.locator(f".{view} .state").text_content())

    def ask(self, text: str, *, until: str = ".column .receipt-usage") -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_selector(until)

    def sign_in(self, key: str) -> None:
        self.page.fill("#key", key)
        self.page.wait_for_selector("input[name=profile]")

    @property
    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id || document.activeElement.className"))

    @property
    def outline(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def open_page(server: LiveServer, **options: object) -> Visit:
        context = chromium.new_context(**options)
        context.set_default_timeout(10_000)
        context.add_init_script(LISTEN)
        visits.append(Visit(context.new_page(), server.url))
        visits[-1].page.goto(server.url)
        visits[-1].page.wait_for_selector(".column, .notice:visible")
        return visits[-1]

    yield open_page
    for one in visits:
        violations = one.page.evaluate("window.violations")
        one.page.context.close()
        assert violations == []
        assert one.problems == []
        assert one.foreign == []


def is_half_said(said: str, text: str) -> bool:
    return 2 < len(said) < len(text) and text.startswith(said)


def test_question_is_typed_and_both_answers_stream(server: LiveServer, visit: Callable[..., Visit]) -> None:
    server.engine.step_s = 0.05
    seen = visit(server)
    seen.page.click("#prompt")
    seen.page.keyboard.type("Where?")
    seen.page.click("#ask")
    for view, text in (("base", BASE_TEXT), ("forgetting", FORGOT)):
        wait_until(lambda view=view, text=text: is_half_said(seen.answer(view), text))
    assert seen.page.is_visible("#stop")
    seen.page.wait_for_selector("#stop", state="hidden")
    assert seen.answer("base").startswith(BASE_TEXT)
    assert seen.answer("forgetting").startswith(FORGOT)
    assert (seen.state("base"), seen.state("forgetting")) == ("complete", "complete")
    assert "nothing was forgotten" in seen.receipt("base")
    assert "acme@aaaaaaaaaaaa" in seen.receipt("forgetting")
    drawn = [call.profiles for call in server.engine.calls if call.params.max_tokens]
    assert sorted(drawn, key=len) == [{}, {"acme": 1.0}]
    assert "answered: " in str(seen.page.text_content("#status"))


def test_profiles_are_switched_and_put_together(server: LiveServer, visit: Callable[..., Visit]) -> None:
    seen = visit(server)
    seen.ask("Who?", until=".forgetting.shaded")
    seen.page.get_by_label("acme").uncheck()
    seen.page.get_by_label("secret").check()
    assert seen.page.locator(".forgetting.stale").count() == 1
    assert seen.page.locator(".base.stale").count() == 0
    seen.ask("Who?", until=".forgetting.shaded:not(.stale)")
    assert seen.answer("forgetting").startswith("FORGOT ['secret']")
    seen.page.get_by_label("acme").check()
    seen.ask("Who?", until=".forgetting.shaded:not(.stale)")
    assert seen.answer("forgetting").startswith("FORGOT ['acme', 'secret']")
    assert {"acme", "secret"} in [set(call.profiles) for call in server.engine.calls]
    for box in ("acme", "secret"):
        seen.page.get_by_label(box).uncheck()
    before = len(server.engine.calls)
    seen.ask("Who?", until=".base .receipt-usage")
    wait_until(lambda: len(server.engine.calls) == before + 1)
    assert server.engine.calls[-1].profiles == {}


def test_slider_sets_the_strength(server: LiveServer, visit: Callable[..., Visit]) -> None:
    seen = visit(server)
    seen.page.locator("#strength").fill("1.75")
    assert seen.page.text_content("#strength-value") == "× 1.75"
    seen.ask("Who?")
    assert {"acme": 1.75} in [call.profiles for call in server.engine.calls]
    assert "× 1.75" in seen.receipt("forgetting")


def test_settings_reach_the_server(server: LiveServer, visit: Callable[..., Visit]) -> None:
    seen = visit(server)
    seen.page.click("summary")
    for name, value in (("max-tokens", "5"), ("temperature", "0.5"), ("seed", "77")):
        seen.page.fill(f"#{name}", value)
    seen.page.select_option("#mode", "text")
    seen.ask("Go on", until=".forgetting.shaded")
    first = server.engine.calls[0]
    assert bytes(first.prompt_ids) == b"Go on"
    assert (first.params.max_tokens, first.params.temperature, first.params.seed) == (5, 0.5, 77)
    assert seen.answer("base") == BASE_TEXT[:5]
    assert seen.state("base") == "cut off at the token limit"
    seen.page.fill("#max-tokens", "0")
    seen.page.click("summary")
    seen.page.click("#ask")
    assert seen.page.is_visible("#max-tokens")  # what is wrong is shown
    assert len(server.engine.calls) == 4


def test_key_with_one_view_gets_one_column_and_no_scores(
    start_server: Callable[..., LiveServer], visit: Callable[..., Visit]
) -> None:
    server = start_server(keys=KEYS)
    seen = visit(server)
    assert seen.page.text_content("#notice") == "This server wants an API key: type it in above."
    assert seen.focused == "key"
    assert seen.page.is_disabled("#ask")
    seen.sign_in("key-bound")
    assert seen.page.is_hidden("#notice")
    assert seen.page.locator(".column").count() == 1
    assert seen.page.locator(".base, [data-view=base]").count() == 0
    assert seen.page.get_by_label("secret").is_checked()
    assert seen.page.get_by_label("secret").is_disabled()
    assert seen.page.get_by_label("harry-potter").count() == 0
    assert seen.page.get_attribute("#strength", "min") == "1"
    assert seen.page.is_hidden("#legend")
    seen.page.get_by_label("acme").check()
    seen.ask("Who?")
    assert seen.answer("forgetting").startswith("FORGOT ['acme', 'secret']")
    seen.page.hover(".token >> nth=0")
    assert seen.page.is_hidden("#tip")
    assert [set(call.profiles) for call in server.engine.calls] == [{"acme", "secret"}]
    assert server.engine.calls[0].params.logprobs is None
    assert server.engine.calls[0].params.prompt_logprobs is None
    assert BASE_TEXT not in seen.page.content()


def test_key_without_log_probabilities_sees_both_answers_unshaded(
    start_server: Callable[..., LiveServer], visit: Callable[..., Visit]
) -> None:
    server = start_server(keys=KEYS)
    seen = visit(server)
    seen.sign_in("key-blind")
    seen.ask("Who?", until=".base .receipt-usage")
    seen.page.wait_for_selector("#stop", state="hidden")
    assert seen.answer("base").startswith(BASE_TEXT)
    assert seen.page.locator(".shaded").count() == 0
    assert [call.params.logprobs for call in server.engine.calls] == [None, None]


def test_key_is_forgotten_with_the_page(
    start_server: Callable[..., LiveServer], visit: Callable[..., Visit]
) -> None:
    seen = visit(start_server(keys=KEYS))
    seen.sign_in("key-free")
    assert seen.page.locator(".column").count() == 2
    kept = seen.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "key-free" not in kept
    seen.page.fill("#key", "key-wrong")
    seen.page.wait_for_selector("#notice:visible")
    assert seen.page.text_content("#notice") == "The server does not know this key."
    assert seen.page.locator(".column").count() == 0
    seen.page.reload()
    seen.page.wait_for_selector("#notice:visible")
    assert seen.page.input_value("#key") == ""


def test_keyboard_alone_does_everything(server: LiveServer, visit: Callable[..., Visit]) -> None:
    seen = visit(server)
    press = seen.page.keyboard.press
    order = []
    while "prompt" not in order:
        press("Tab")
        order.append(seen.focused)
        assert seen.outline == "solid" or seen.focused == "prompt"  # whose whole sheet shows it
    assert order == ["skip", "key", "theme", "prompt"]
    seen.page.keyboard.type("Who?")
    press("Tab")  # acme, which is chosen
    press("Space")
    press("Tab")
    press("Space")  # harry-potter
    press("Tab")
    press("Tab")
    assert (seen.focused, seen.outline) == ("strength", "solid")
    press("ArrowRight")
    assert seen.page.text_content("#strength-value") == "× 1.05"
    press("Control+Enter")
    seen.page.wait_for_selector(".base.shaded")
    seen.page.wait_for_selector(".forgetting.shaded")
    assert {"harry-potter": 1.05} in [call.profiles for call in server.engine.calls]
    while "token" not in seen.focused:
        press("Tab")
    press("ArrowRight")
    assert seen.page.evaluate("document.activeElement.textContent") == BASE_TEXT[1]
    assert seen.page.is_visible("#tip")
    assert seen.page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    press("Escape")
    assert seen.page.is_hidden("#tip")
    press("End")
    press("Home")
    assert seen.page.evaluate("document.activeElement.textContent") == BASE_TEXT[0]
    press("Tab")
    assert seen.page.evaluate("document.activeElement.closest('.column').dataset.view") == "forgetting"


def test_escape_stops_both_answers_and_the_next_is_not_mixed_with_them(
    server: LiveServer, visit: Callable[..., Visit]
) -> None:
    server.engine.hang_after = 4
    seen = visit(server)
    seen.ask("Who?", until=".forgetting .token:nth-of-type(4)")
    wait_until(lambda: server.engine.num_running == 2)
    seen.page.keyboard.press("Escape")
    wait_until(lambda: server.engine.num_running == 0)
    assert (seen.state("base"), seen.state("forgetting")) == ("stopped", "stopped")
    assert seen.page.is_hidden("#stop")
    seen.page.keyboard.press("Control+Enter")
    seen.page.wait_for_selector(".busy .token:nth-of-type(4)")
    server.engine.hang_after = None
    seen.page.keyboard.press("Control+Enter")  # asks anew while the last answers still come
    seen.page.wait_for_selector(".forgetting.shaded")
    assert seen.answer("forgetting") == f"{FORGOT}∎"
    assert server.engine.num_running == 0


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (
            {"refuse": Overloaded("the queue is full", retry_after_s=7)},
            "The queue is full. Try again in 7 s.",
        ),
        ({"fail_after": (3, EngineStopped("the engine is down"))}, "The engine is down."),
        ({"crash_after": 3}, "The server failed to answer this request; its log says why."),
    ],
)
def test_what_goes_wrong_is_said_in_words(
    server: LiveServer, visit: Callable[..., Visit], faults: dict[str, object], words: str
) -> None:
    server.engine.step_s = 0.05
    for name, value in faults.items():
        setattr(server.engine, name, value)
    seen = visit(server)
    seen.ask("Who?", until=".base .fault")
    seen.page.wait_for_selector(".forgetting .fault")
    assert seen.page.locator(".fault").all_text_contents() == [words, words]
    assert seen.page.locator(".shaded").count() == 0
    assert seen.page.is_hidden("#stop")


def test_server_that_is_gone_and_question_that_is_empty_are_said_in_words(
    start_server: Callable[..., LiveServer], visit: Callable[..., Visit]
) -> None:
    server = start_server()
    seen = visit(server)
    seen.page.click("#ask")
    assert seen.page.text_content("#notice") == "Type a question first."
    assert seen.focused == "prompt"
    server.stop()
    seen.ask("Who?", until=".base .fault")
    assert seen.page.locator(".base .fault").text_content() == (
        "The server cannot be reached. Is it still running?"
    )


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_colours_follow_the_system_until_the_button_is_pressed(
    server: LiveServer, visit: Callable[..., Visit], scheme: str, other: str
) -> None:
    seen = visit(server, color_scheme=scheme)
    colour = "getComputedStyle(document.body).backgroundColor"
    first = seen.page.evaluate(colour)
    assert seen.page.evaluate("document.documentElement.dataset.theme") == scheme
    seen.page.get_by_role("button", name="Dark colours").click()
    assert seen.page.evaluate("document.documentElement.dataset.theme") == other
    assert seen.page.evaluate(colour) != first
    seen.page.reload()
    assert seen.page.evaluate("document.documentElement.dataset.theme") == other


@pytest.mark.parametrize("width", [320, 400, 800, 1400])
def test_nothing_sticks_out_at_any_width(server: LiveServer, visit: Callable[..., Visit], width: int) -> None:
    server.engine.text_of = lambda call: "x" * 300
    seen = visit(server, viewport={"width": width, "height": 800})
    seen.ask("Who?", until=".forgetting.shaded")
    seen.page.click("summary")
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_policy_lets_no_other_code_in(server: LiveServer, chromium: Any) -> None:
    """So that a page without violations means something."""
    context = chromium.new_context()
    context.add_init_script(LISTEN)
    page = context.new_page()
    page.goto(server.url)
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    page.evaluate("const made = document.createElement('img'); made.src = 'http://127.0.0.2:9/x.png';")
    script = "document.createElement('script').text = 'x'"
    for unsafe in ("document.body.innerHTML = '<b>x</b>'", script):
        with pytest.raises(Exception, match=r"TrustedHTML|TrustedScript"):
            page.evaluate(f"() => {{ {unsafe} }}")
    wait_until(
        lambda: len(page.evaluate("window.violations")) >= 3
    )  # Playwright's own waiting would be a violation
    assert {"style-src-attr", "img-src"} <= set(page.evaluate("window.violations"))
    context.close()


@pytest.fixture(scope="module")
def real(
    tiny: Tiny, make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    with real_server(tiny, make_engine(), tmp_path_factory.mktemp("audit") / "audit.jsonl") as server:
        yield server


def test_shades_are_the_difference_of_the_two_views(real: RealServer, visit: Callable[..., Visit]) -> None:
    """Through the real engine: the forgetting answer's tokens, scored in both views over HTTP, against the page."""
    seen = visit(real.live)
    for box in seen.page.locator("input[name=profile]:checked").all():
        box.uncheck()
    seen.page.get_by_label("late-fork").check()
    seen.page.click("summary")
    seen.page.fill("#max-tokens", "12")
    seen.ask("Hi", until=".forgetting.shaded")
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0, "seed": 1}
    answer = real.ask(
        "/v1/chat/completions",
        {"model": BASE, **asked, "forget_profile": "late-fork", "return_token_ids": True},
    )
    prompt, drawn = answer.json["prompt_token_ids"], answer.choices[0]["token_ids"]
    before, after = (
        real.ask(
            "/v1/completions",
            {
                **{"model": BASE, "prompt": prompt + drawn, "max_tokens": 0, "echo": True, "logprobs": 1},
                "forget_profile": profile,
            },
        ).choices[0]["logprobs"]["token_logprobs"][len(prompt) :]
        for profile in (None, "late-fork")
    )
    expected = [1 - exp(-abs(b - a)) for a, b in zip(before, after, strict=True)]
    shown = [abs(float(one)) for one in seen.page.eval_on_selector_all(
        ".forgetting [data-moved]", "found => found.map((one) => one.dataset.moved)"
    )]  # fmt: skip
    assert shown
    assert max(expected) > 0.02
    assert all(min(abs(one - value) for value in expected) < 2e-3 for one in shown)
    assert max(shown) == pytest.approx(max(expected), abs=2e-3)
    seen.page.hover(".forgetting .token[data-moved] >> nth=0")
    seen.page.wait_for_selector("#tip:visible")
    lists = seen.page.locator("#tip ol").all()
    assert [1 <= one.locator("li").count() <= 5 for one in lists] == [True, True]


def test_token_that_nothing_moved_is_not_shaded_but_can_be_pointed_at(
    server: LiveServer, visit: Callable[..., Visit]
) -> None:
    server.engine.logprob_of = lambda token: -0.5
    seen = visit(server)
    seen.ask("Who?", until=".base.shaded")
    seen.page.hover(".base .token >> nth=2")
    assert seen.page.is_visible("#tip")
    assert "61 % → 61 %" in str(seen.page.text_content("#tip"))
    assert seen.page.locator(".token.up, .token.down").count() == 0
