"""The playground's files: served to anybody, under a policy that lets no other code and no other host in, and nothing
that could generate. What the page does in a browser is tests/browser's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from fastapi.routing import APIRoute
from live_server import LiveServer, make_catalog
from tiny_base import Tiny

import uld_serve.server
from uld_serve.assembly import Assembly
from uld_serve.engine.engine import Engine
from uld_serve.profiles.registry import Registry
from uld_serve.server import page
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.command import add_parser, settings_of
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.serving import Serving
from uld_serve.server.settings import ServerSettings
from uld_serve.server.telemetry import Telemetry

FOLDER = Path(uld_serve.server.__file__).parent / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
KEYS = {"key-free": KeyPolicy(name="free", allow_base=True)}


def policy_of(header: str) -> dict[str, list[str]]:
    rules = [rule.split() for rule in header.split(";")]
    return {name: values for name, *values in rules}


class Page(HTMLParser):
    """Every tag with its attributes, and the text inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def parsed() -> Page:
    found = Page()
    found.feed((FOLDER / "index.html").read_text())
    return found


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES)])
def test_files_are_served_to_anybody_under_the_strictest_headers(
    start_server: Callable[..., LiveServer], path: str
) -> None:
    server = start_server(keys=KEYS)
    response = server.get(path)
    assert response.status_code == 200
    name = "index.html" if path == "/" else path.rsplit("/", 1)[1]
    assert response.content == (FOLDER / name).read_bytes()
    assert response.headers["content-type"] == page.MEDIA_TYPES[Path(name).suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    rules = policy_of(response.headers["content-security-policy"])
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert rules.pop(name) == ["'none'"]
    assert rules.pop("require-trusted-types-for") == ["'script'"]
    assert rules == {name: ["'self'"] for name in ("script-src", "style-src", "img-src", "connect-src")}
    assert server.engine.calls == []


def test_unchanged_file_is_not_sent_again(server: LiveServer) -> None:
    tag = server.get("/").headers["etag"]
    again = server.get("/", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == page.CONTENT_SECURITY_POLICY
    assert server.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name", ["", "x.js", "../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "index.html%00", "."]
)
def test_nothing_but_these_files_is_served(server: LiveServer, name: str) -> None:
    assert server.get(f"/playground/{name}").status_code in (404, 405)


def test_every_file_can_be_served() -> None:
    assert {Path(name).suffix for name in FILES} <= page.MEDIA_TYPES.keys()


def test_page_has_no_inline_code_and_asks_no_other_host(parsed: Page) -> None:
    assert parsed.inline == []
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action"):
            target = attributes.get(name)
            local = target is None or target.startswith("#") or target.removeprefix("playground/") in FILES
            assert local, f"{tag} {target}"


@pytest.mark.parametrize("name", FILES)
def test_file_names_no_other_host(name: str) -> None:
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}|url\(|@import|data:[a-z]+/", text) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_makes_no_markup_and_keeps_nothing_but_the_theme(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        == []
    )
    assert re.findall(r"sessionStorage|indexedDB|document\.cookie", text) == []
    assert re.findall(r'localStorage\.\w+\("([^"]+)"', text) == (
        ["uld-theme"] * 2 if name == "theme.js" else []
    )


def test_page_asks_only_routes_that_exist() -> None:
    app = create_app(make_catalog(), Backend(FakeEngine()))
    routes = {route.path.lstrip("/") for route in app.routes if isinstance(route, APIRoute)}
    asked = {path for name in SCRIPTS for path in re.findall(r'"(v1/[^"]+)"', (FOLDER / name).read_text())}
    assert asked == {"v1/models", "v1/forget_profiles", "v1/completions", "v1/chat/completions"}
    assert asked <= routes


def test_every_field_has_a_label_and_every_label_a_field(parsed: Page) -> None:
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = {attributes.get("for") for tag, attributes in parsed.tags if tag == "label"}
    for name in ("prompt", "key", "strength"):
        assert name in named
    assert named - {None} <= set(ids)
    for _, attributes in parsed.tags:
        assert set((attributes.get("aria-describedby") or "").split()) <= set(ids)


def test_scripts_look_for_elements_that_exist(parsed: Page) -> None:
    ids = {attributes.get("id") for _, attributes in parsed.tags}
    for name in SCRIPTS:
        asked = set(re.findall(r'(?:byId|number|getElementById)\("([^"]+)"\)', (FOLDER / name).read_text()))
        assert asked <= ids


def test_playground_can_be_switched_off() -> None:
    app = create_app(make_catalog(), Backend(FakeEngine()), playground=False)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    assert not [path for path in paths if path == "/" or path.startswith("/playground")]
    assert "/v1/completions" in paths


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("", [], True),
        ("playground = false", [], False),
        ("", ["--no-playground"], False),
        ("playground = false", ["--playground"], True),
    ],
)
def test_option_and_setting_switch_it(tmp_path: Path, text: str, options: list[str], expected: bool) -> None:
    (tmp_path / "server.toml").write_text(text)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", "--config", str(tmp_path / "server.toml"), *options])
    assert settings_of(args).playground is expected


@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_served_follows_the_setting(
    tiny: Tiny, make_engine: Callable[..., Engine], is_there: bool
) -> None:
    serving = Serving(
        assembly=Assembly(tiny.base, make_engine(), Registry(), ()),
        settings=ServerSettings(playground=is_there),
        catalog=make_catalog(),
        telemetry=Telemetry(),
        admin_sock=None,
        premises=None,
        reloader=None,
    )
    app = serving.listener(on_ready=lambda: None).config.app
    assert isinstance(app, FastAPI)
    assert ("/" in {route.path for route in app.routes if isinstance(route, APIRoute)}) is is_there
