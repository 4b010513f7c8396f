"""SIGHUP: what may change changes for the next request, and what may not leaves everything as it was."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from live_server import MODEL, LiveServer
from tiny_base import Tiny

from uld_serve.server import key_sources
from uld_serve.server.audit import AuditLog
from uld_serve.server.keys import sha256_of
from uld_serve.server.reload import Reloader
from uld_serve.server.settings import ServerSettings, read_settings

ASK = {"model": MODEL, "prompt": "Hi", "max_tokens": 100}


def entry(name: str, policy: str = "allow_base = true") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{sha256_of(f"key-{name}".encode()).hex()}"\n{policy}\n'


class Site:
    """A server, its file, and what a SIGHUP does."""

    def __init__(self, start: Callable[..., LiveServer], path: Path, audit: AuditLog | None = None) -> None:
        self.path = path
        self.write(entry("one"), entry("two"))
        settings = read_settings(path)
        self.server = start(keys={f"key-{key.name}": key.policy for key in settings.keys})
        self.reloader = Reloader(settings, read=self.read, ring=key_sources.safe_keys, audit=audit)

    def read(self) -> ServerSettings:
        return read_settings(self.path)

    def write(self, *parts: str) -> None:
        self.path.write_text("\n".join(parts))

    def reload(self) -> bool:
        return self.reloader.reload(self.server.apps, self.server.listener)

    def ask(self, name: str, **fields: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer key-{name}"}
        return self.server.post("/v1/completions", ASK | fields, headers=headers)


@pytest.fixture
def site(start_server: Callable[..., LiveServer], tmp_path: Path) -> Site:
    return Site(start_server, tmp_path / "server.toml")


def test_new_keys_work_and_revoked_ones_do_not(site: Site) -> None:
    assert [site.ask(name).status_code for name in ("one", "two", "new")] == [200, 200, 401]
    site.write(entry("one", 'mandatory = ["secret"]'), entry("new"))
    assert site.ask("one").headers["x-forget-profile"] == "none"
    assert site.reload()
    assert [site.ask(name).status_code for name in ("one", "two", "new")] == [200, 401, 200]
    assert site.ask("one").headers["x-forget-profile"].startswith("secret@")


def test_no_request_is_dropped_and_each_keeps_what_it_began_with(site: Site) -> None:
    site.server.engine.step_s = 0.02
    with site.server.client("key-two") as client:
        stream = client.completions.create(**ASK, stream=True)
        text = next(iter(stream)).choices[0].text
        site.write(entry("one"))
        assert site.reload()
        assert site.ask("two", max_tokens=1).status_code == 401
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == "The capital is Paris."


def test_limits_change_for_the_next_connection(site: Site) -> None:
    assert site.ask("one", prompt="x" * 1500).status_code == 200
    site.write("[limits]\nbody_bytes = 1024\nread_timeout_s = 0.5\ngrace_s = 7", entry("one"))
    assert site.reload()
    assert site.ask("one", prompt="x" * 1500).status_code == 413
    assert site.server.listener.config.timeout_graceful_shutdown == 7 + 3
    assert site.server.listener.config.http_protocol_class.limits.read_timeout_s == 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("port = 9", "port"),
        ('model = "other"\nmax_num_seqs = 3', "max_num_seqs, model"),
        ("[admin]\nport = 1", "admin"),
        ("[audit]\nfsync = true", "audit"),
        ('profiles = ["elsewhere"]', "profiles"),
        ("prt = 1", "prt"),
        ("port = ", "TOML"),
        (entry("three", 'mandatory = ["unheard-of"]'), "unheard-of"),
        (entry("three", "mandatry = []"), "mandatry"),
    ],
)
def test_what_may_not_change_is_named_and_the_old_settings_hold(
    site: Site, caplog: pytest.LogCaptureFixture, text: str, named: str
) -> None:
    site.write(text, entry("new"))
    with caplog.at_level(logging.ERROR):
        assert not site.reload()
    assert named in caplog.text
    assert [site.ask(name).status_code for name in ("one", "two", "new")] == [200, 200, 401]


def test_a_server_with_keys_is_never_opened_by_a_reload(site: Site) -> None:
    for text in ("", "host = '127.0.0.1'"):
        site.write(text)
        assert not site.reload()
    site.path.unlink()
    assert not site.reload()
    assert site.server.post("/v1/completions", ASK).status_code == 401


def test_audit_log_goes_on_in_a_new_file(start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    site = Site(start_server, tmp_path / "server.toml", log)
    log.write("before")
    log.path.rename(tmp_path / "moved")
    assert site.reload()
    assert '"reloaded"' in log.path.read_text()


def test_sighup_reaches_a_running_process(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    head = f'model = "{tiny.folder}"\nprofiles = []\nport = {free_port()}\nkv_cache_bytes = 16777216\ndtype = "float32"'
    config.write_text(f"{head}\n{entry('one')}")
    code = "import sys; from uld_serve.cli import main; sys.exit(main())"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--config", str(config)], stderr=log, stdout=log
        )
    url = f"http://127.0.0.1:{read_settings(config).port}"
    try:
        wait_for(lambda: status(f"{url}/ready") == 200)
        assert status(f"{url}/v1/models", "key-one") == 200
        config.write_text(f"{head}\n{entry('two')}")
        os.kill(process.pid, signal.SIGHUP)
        wait_for(lambda: status(f"{url}/v1/models", "key-two") == 200)
        assert status(f"{url}/v1/models", "key-one") == 401
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert "reloaded" in (tmp_path / "log").read_text()


HUNG_UP_WHILE_LOADING = """
import os, pathlib, signal, sys
from uld_serve.server import command
load = command._assemble
def hung_up(settings, *rest):
    config = pathlib.Path(sys.argv[-1])
    config.write_text(config.with_name("new.toml").read_text())
    os.kill(os.getpid(), signal.SIGHUP)
    return load(settings, *rest)
command._assemble = hung_up
from uld_serve.cli import main
sys.exit(main())
"""


def test_sighup_while_the_model_loads_is_done_when_it_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    port = free_port()
    head = (
        f'model = "{tiny.folder}"\nprofiles = []\nport = {port}\nkv_cache_bytes = 16777216\ndtype = "float32"'
    )
    for name, key in {"server.toml": "one", "new.toml": "two"}.items():
        (tmp_path / name).write_text(f"{head}\n{entry(key)}")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", HUNG_UP_WHILE_LOADING, "serve", "--config", str(tmp_path / "server.toml")],
            stderr=log,
            stdout=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or status(f"{url}/v1/models", "key-two") == 200)
        assert process.poll() is None
        assert status(f"{url}/v1/models", "key-one") == 401
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def status(url: str, key: str = "none") -> int:
    try:
        return httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=5).status_code
    except httpx.TransportError:
        return 0


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)
