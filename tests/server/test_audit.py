"""The audit log: what is in it, how it turns over, and that nothing is answered without it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from live_server import MODEL, LiveServer, wait_until

from uld_serve.errors import InvalidRequest, NumericalError
from uld_serve.server import audit
from uld_serve.server.audit import AuditLog, AuditUnavailable
from uld_serve.server.settings import AuditSettings
from uld_serve.server.telemetry import Telemetry

ACME = "acme@" + "a" * 12
ROUTES = {
    "/v1/completions": {"prompt": "private words"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "private words"}]},
}


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl")


@pytest.fixture
def audited(start_server: Callable[..., LiveServer], log: AuditLog) -> LiveServer:
    return start_server(telemetry=Telemetry(audit=log))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def disk_full(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_two_lines_tell_who_and_what_but_no_text(
    audited: LiveServer, log: AuditLog, path: str, stream: bool
) -> None:
    body = {"model": MODEL, **ROUTES[path], "forget_profile": "acme", "user": "u-1", "max_tokens": 3}
    answer = audited.post(path, body | {"stream": stream})
    assert answer.status_code == 200
    admitted, ended = lines(log.path)
    assert (admitted["event"], ended["event"]) == ("admitted", "ended")
    assert admitted["id"] == ended["id"]
    assert str(admitted["id"]) in answer.text
    assert (admitted["decided"], ended["forget"]) == (ACME, ACME)
    for line in (admitted, ended):
        assert (line["route"], line["key"], line["user"], line["model"]) == (
            path,
            "development",
            "u-1",
            MODEL,
        )
    assert (ended["outcome"], ended["completion_tokens"]) == ("ok", 3)
    assert ended["prompt_tokens"] == admitted["prompt_tokens"] == len(audited.engine.calls[0].prompt_ids)
    assert "private" not in log.path.read_text()
    assert "FOR" not in log.path.read_text()


def test_failure_and_departure_are_outcomes(audited: LiveServer, log: AuditLog) -> None:
    body = {"model": MODEL, "prompt": "Hi"}
    audited.engine.fail_after = (0, NumericalError("not finite"))
    audited.post("/v1/completions", body)
    assert lines(log.path)[-1]["outcome"] == "numerical_error"
    assert lines(log.path)[-1]["forget"] == "unknown"
    audited.engine.fail_after, audited.engine.crash_after = None, 2
    audited.post("/v1/completions", body)
    assert lines(log.path)[-1]["outcome"] == "internal_error"
    audited.engine.crash_after, audited.engine.hang_after = None, 2
    with audited.client() as client:
        stream = client.completions.create(model=MODEL, prompt="Hi", stream=True)
        next(iter(stream))
        stream.close()
    wait_until(lambda: len(lines(log.path)) == 6)
    assert lines(log.path)[-1]["outcome"] == "gone"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_generated_that_cannot_be_recorded(
    audited: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    monkeypatch.setattr(audit.os, "write", disk_full)
    body = {"model": MODEL, **ROUTES[path], "stream": stream}
    answer = audited.post(path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")
    assert audited.engine.calls == []
    monkeypatch.undo()
    assert audited.post(path, body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answer_whose_end_cannot_be_recorded_fails(
    start_server: Callable[..., LiveServer], log: AuditLog, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def break_disk(call: object) -> str:
        monkeypatch.setattr(audit.os, "write", disk_full)
        return "an answer"

    server = start_server(telemetry=Telemetry(audit=log), engine=FakeEngine(text_of=break_disk))
    body = {"model": MODEL, "prompt": "Hi", "stream": stream}
    if not stream:
        assert server.post("/v1/completions", body).json()["error"]["code"] == "audit_unavailable"
        return
    with server.client() as client, pytest.raises(Exception, match="audit"):
        list(client.completions.create(model=MODEL, prompt="Hi", stream=True))


def test_file_turns_over_by_size_and_keeps_a_count(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.jsonl", AuditSettings(max_bytes=4096, max_files=3))
    for number in range(400):
        log.write("tick", number=number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.jsonl", "a.jsonl.1", "a.jsonl.2", "a.jsonl.3"]
    assert all(path.stat().st_size <= 4096 for path in tmp_path.iterdir())
    kept = [line["number"] for name in reversed(names) for line in lines(tmp_path / name)]
    assert kept == list(range(400 - len(kept), 400))
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_line_that_was_cut_short_spoils_no_other(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write("first")
    write, calls = os.write, []

    def cut(descriptor: int, data: bytes) -> int:
        calls.append(data)
        return write(descriptor, data[:7]) if len(calls) == 1 else disk_full()

    monkeypatch.setattr(audit.os, "write", cut)
    with pytest.raises(AuditUnavailable):
        log.write("second")
    monkeypatch.undo()
    log.write("third")
    found = log.path.read_text().splitlines()
    assert [json.loads(found[i])["event"] for i in (0, 2)] == ["first", "third"]


def test_half_a_line_left_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"event": "fir')
    AuditLog(tmp_path / "a").write("second")
    assert json.loads((tmp_path / "a").read_text().splitlines()[-1])["event"] == "second"


@pytest.mark.parametrize("fsync", [False, True])
def test_fsync_is_done_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(audit.os, "fsync", synced.append)
    AuditLog(tmp_path / "a", AuditSettings(fsync=fsync)).write("tick")
    assert len(synced) == fsync


def test_moved_file_is_begun_anew_after_reopen(log: AuditLog, tmp_path: Path) -> None:
    log.write("one")
    log.path.rename(tmp_path / "moved")
    log.reopen()
    log.write("two")
    assert [line["event"] for line in lines(log.path)] == ["two"]


def test_file_that_was_deleted_is_made_anew(log: AuditLog) -> None:
    log.write("one")
    log.path.unlink()
    log.write("two")
    assert [line["event"] for line in lines(log.path)] == ["two"]
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(AuditUnavailable):
        log.write("three")


def test_file_that_cannot_be_opened_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot write the audit log"):
        AuditLog(tmp_path / "missing" / "a")
