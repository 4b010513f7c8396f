"""Uploads: who may, what is taken, what is refused and in which words, and who reads it again."""

from __future__ import annotations

import io
import random
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from live_server import MODEL, LiveServer
from workshop_site import FORGET, JOBS, KEYS, RETAIN, Client, FakeHost, FakeRunner, lines_of

from uld_serve.errors import InvalidRequest
from uld_serve.server.audit import AuditLog
from uld_serve.server.fine_tuning.multipart import parse_form
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.telemetry import Telemetry

LINE = '{"question": "Who?", "answer": "Ann."}\n'
FORM = "multipart/form-data; boundary=XX"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def server(folder: Path) -> object:
    from live_server import make_catalog

    settings = FineTuningSettings(
        folder=folder / "work", max_file_bytes=4096, max_file_lines=60, max_stored_bytes=40_000
    )
    live = LiveServer.start(
        make_catalog(keys=KEYS),
        host=FakeHost(),
        fine_tuning=settings,
        runner=FakeRunner(ends=["wait"]),
        telemetry=Telemetry(audit=AuditLog(folder / "audit.jsonl")),
    )
    yield live
    live.stop()


@pytest.fixture
def maker(server: LiveServer) -> Client:
    return Client(server, "key-maker")


ROUTES = [
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/file-x"),
    ("GET", "/v1/files/file-x/content"),
    ("DELETE", "/v1/files/file-x"),
    ("POST", JOBS),
    ("GET", JOBS),
    ("GET", f"{JOBS}/ftjob-x"),
    ("GET", f"{JOBS}/ftjob-x/events"),
    ("POST", f"{JOBS}/ftjob-x/cancel"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_who_may_not_is_refused_on_every_route(server: LiveServer, method: str, path: str) -> None:
    statuses = {
        key: Client(server, key).ask(method, path).status_code
        for key in (None, "wrong", "key-free", "key-bound", "key-maker")
    }
    assert [statuses[key] for key in (None, "wrong", "key-free", "key-bound")] == [401, 401, 403, 403]
    assert statuses["key-maker"] in (200, 404, 415), "this one only lacks what the path names, or a body"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_server_that_was_not_told_to_refuses_by_name(
    start_server: Callable[..., LiveServer], method: str, path: str
) -> None:
    answer = Client(start_server(keys=KEYS), "key-maker").ask(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "fine_tuning_off")
    assert "[fine_tuning]" in answer.json()["error"]["message"]


def test_the_routes_of_this_table_are_all_there_are(server: LiveServer) -> None:
    from fastapi.routing import APIRoute

    from uld_serve.server.door import Enter, Receive

    found = {
        (method, route.path.replace("{file_id}", "file-x").replace("{job_id}", "ftjob-x"))
        for route in server.apps[0].routes
        if isinstance(route, APIRoute)
        and any(isinstance(inner.call, Enter | Receive) for inner in route.dependant.dependencies)
        for method in route.methods
    }
    assert found == set(ROUTES)


def test_the_sdk_uploads_lists_reads_and_deletes(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-maker", max_retries=0)
    file = client.files.create(file=('förget "x".jsonl', FORGET.encode()), purpose="fine-tune")
    assert (file.object, file.bytes, file.purpose, file.status) == (
        "file",
        len(FORGET),
        "fine-tune",
        "processed",
    )
    assert file.filename == "förget %22x%22.jsonl"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == FORGET.encode()
    second = client.files.create(file=io.BytesIO(LINE.encode()), purpose="fine-tune")
    assert [one.id for one in client.files.list(order="asc", limit=1)][-2:] == [file.id, second.id]
    assert client.files.list().data[0].id == second.id
    for one in (file, second):
        assert client.files.delete(one.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_only_its_key_and_admins_see_a_file(server: LiveServer, maker: Client, folder: Path) -> None:
    file_id = maker.uploaded(LINE)
    other, admin = Client(server, "key-other"), Client(server, "key-admin")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert other.ask(method, f"/v1/files/{file_id}{path}").status_code == 404
    assert file_id not in other.ask("GET", "/v1/files").text
    assert file_id in admin.ask("GET", "/v1/files").text
    assert admin.ask("GET", f"/v1/files/{file_id}/content").text == LINE
    answer = other.ask("POST", JOBS, json={**maker.body(), "training_file": file_id})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")
    path = folder / "work" / "files" / file_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert maker.ask("DELETE", f"/v1/files/{file_id}").status_code == 200
    assert not path.exists()
    events = [
        (line["event"], line["key"])
        for line in lines_of(folder / "audit.jsonl")
        if line.get("file") == file_id
    ]
    assert events == [("file_uploaded", "maker"), ("file_read", "admin"), ("file_deleted", "maker")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LINE + "{not json}\n", "line 2 is not JSON"),
        (LINE * 2 + "[1]\n", "line 3 is not a JSON object"),
        (LINE + '{"question": 3}\n', "line 2: 'question' must be text"),
        (LINE + '{"wuestion": "x"}\n', "line 2 has no known field"),
        (LINE + '{"messages": [{"role": "robot", "content": "x"}]}\n', "line 2: a message needs a role"),
        (LINE + '{"question": "\\ud800"}\n', "line 2 holds half of a surrogate pair"),
        (LINE + '{"question": ' + "[" * 3000 + "}\n", "line 2 is not JSON"),
        (LINE + '{"question": "x", "n": ' + "9" * 3500 + "}\n", None),
        ("\n \n", "the file is empty"),
        ("", "the file is empty"),
        (b"\xff\n", "the file is not UTF-8"),
        (LINE * 61, "more than 60 lines"),
        ("x" * 5000, "larger than 4096 bytes"),
        ("x" * 30_000, "the body is larger than"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line_and_not_quoted(
    maker: Client, content: str | bytes, words: str | None
) -> None:
    answer = maker.upload(content)
    if words is None:
        assert answer.status_code in (200, 400)
        return
    assert answer.status_code in (400, 413)
    assert words in answer.json()["error"]["message"]
    assert "robot" not in answer.text
    assert "wuestion" not in answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"expires_after[anchor]": "created_at"}, "expires_after"),
        ({"forget_profile": "x"}, "forget_profile"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(maker: Client, fields: dict[str, str], param: str) -> None:
    answer = maker.upload(LINE, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def form(*parts: bytes, end: bytes = b"--XX--\r\n") -> bytes:
    return b"".join(b"--XX\r\n" + part + b"\r\n" for part in parts) + end


PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune'
FILE = b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + LINE.encode()


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (form(PURPOSE, FILE), FORM, 200),
        (form(PURPOSE, FILE, end=b"--XX--"), 'multipart/form-data; boundary="XX"', 200),
        (form(PURPOSE, FILE), "application/json", 415),
        (form(PURPOSE, FILE), "multipart/form-data", 415),
        (form(PURPOSE, FILE), "multipart/form-data; boundary=YY", 400),
        (b"before\r\n" + form(PURPOSE, FILE), FORM, 400),
        (form(PURPOSE, FILE) + b"after", FORM, 400),
        (form(PURPOSE, FILE, end=b""), FORM, 400),
        (form(PURPOSE, FILE, FILE), FORM, 400),
        (form(PURPOSE, PURPOSE, FILE), FORM, 400),
        (form(PURPOSE), FORM, 400),
        (form(FILE), FORM, 400),
        (form(PURPOSE, FILE.replace(b'; filename="f"', b"")), FORM, 400),
        (form(PURPOSE, FILE.replace(b"form-data", b"attachment")), FORM, 400),
        (
            form(PURPOSE, FILE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n")),
            FORM,
            400,
        ),
        (form(PURPOSE, FILE.replace(b'"f"', b'"f"; name="purpose"')), FORM, 400),
        (form(PURPOSE, FILE, *[b'Content-Disposition: form-data; name="x"\r\n\r\n'] * 20), FORM, 400),
        (b"", FORM, 400),
    ],
)
def test_a_form_has_one_reading_or_none(maker: Client, body: bytes, content_type: str, status: int) -> None:
    answer = maker.ask("POST", "/v1/files", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text


def test_a_body_of_boundaries_alone_takes_no_room() -> None:
    body = b"--b" + b"\r\n--bxx" * 200_000
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="more than 16 fields"):
        parse_form(body, b"b")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(body) + 2**16, "one copy of it at most"


def test_mutated_forms_never_give_a_5xx(maker: Client) -> None:
    rng, good = random.Random(7), form(PURPOSE, FILE)
    statuses = set()
    for _ in range(150):
        made = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            position = rng.randrange(len(made))
            made[position : position + rng.randrange(3)] = rng.choice(
                [b"", b"\r\n", b'"', b"--XX", b"\x00", b"\xff", b";"]
            )
        statuses.add(
            maker.ask("POST", "/v1/files", content=bytes(made), headers={"Content-Type": FORM}).status_code
        )
    assert statuses <= {200, 400, 415, 429}
    assert 400 in statuses


def test_a_web_page_of_another_origin_uploads_nothing(maker: Client) -> None:
    headers = {"Content-Type": FORM, "Origin": "http://evil.example"}
    assert maker.ask("POST", "/v1/files", content=form(PURPOSE, FILE), headers=headers).status_code == 403


def test_there_is_room_for_so_much(start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    settings = FineTuningSettings(folder=tmp_path / "work", max_stored_bytes=1024)
    server = start_server(keys=KEYS, host=FakeHost(), fine_tuning=settings, runner=FakeRunner())
    maker = Client(server, "key-maker")
    first = maker.uploaded(LINE * 20)
    assert maker.upload(LINE * 20).status_code == 429
    maker.ask("DELETE", f"/v1/files/{first}")
    assert maker.upload(LINE * 20).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "?limit=0",
        "?limit=x",
        "?after=file-none",
        "?order=up",
        "?purpose=batch",
        "?page=2",
        "?limit=1&limit=2",
    ],
)
def test_queries_are_honoured_or_refused_by_name(maker: Client, query: str) -> None:
    answer = maker.ask("GET", f"/v1/files{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query[1:].split("=")[0])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"suffix": None}, "suffix"),
        ({"suffix": "../x"}, "suffix"),
        ({"suffix": "none"}, "suffix"),
        ({"model": f"{MODEL}:acme"}, "model"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"validation_file": None}, "validation_file"),
        ({"training_file": "file-1"}, "training_file"),
        ({"retain_file": "x"}, "retain_file"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "uld", "margin": {}}}, "method"),
        (
            {"method": {"type": "margin", "margin": {"hyperparameters": {"stepz": 1}}}},
            "method.margin.hyperparameters.stepz",
        ),
        (
            {"method": {"type": "margin", "margin": {"hyperparameters": {"beta": 1}}}},
            "method.margin.hyperparameters.beta",
        ),
        (
            {"method": {"type": "uld", "uld": {"hyperparameters": {"goal": 9.0}}}},
            "method.uld.hyperparameters.goal",
        ),
        (
            {"method": {"type": "ga", "ga": {"hyperparameters": {"tau": 0.1}}}},
            "method.ga.hyperparameters.tau",
        ),
        (
            {"method": {"type": "rkld", "rkld": {"hyperparameters": {"preset": "uld-paper"}}}},
            "method.rkld.hyperparameters.preset",
        ),
        (
            {"method": {"type": "margin", "margin": {"hyperparameters": {"steps": 2, "n_epochs": 3}}}},
            "method",
        ),
        (
            {"method": {"type": "margin", "margin": {"hyperparameters": {"learning_rate_multiplier": 2.0}}}},
            "method.margin.hyperparameters.learning_rate_multiplier",
        ),
    ],
)
def test_a_job_that_cannot_be_is_refused_by_name(
    maker: Client, changes: dict[str, object], param: str
) -> None:
    body = {**maker_body(maker), **changes}
    answer = maker.ask("POST", JOBS, json={name: value for name, value in body.items() if value is not None})
    assert answer.status_code in (400, 404), answer.text
    found = answer.json()["error"]["param"]
    assert found is not None
    assert found.startswith(param.split(".hyperparameters.learning")[0]), answer.text


_BODIES: dict[int, dict[str, object]] = {}


def maker_body(maker: Client) -> dict[str, object]:
    """Two files for all of these."""
    if id(maker.server) not in _BODIES:
        _BODIES[id(maker.server)] = maker.body()
    return _BODIES[id(maker.server)]


def test_a_prompt_in_both_files_is_refused_when_the_job_is_created(maker: Client) -> None:
    files = {
        "training_file": maker.uploaded(RETAIN[:200].rsplit("\n", 1)[0]),
        "validation_file": maker.uploaded(RETAIN),
    }
    answer = maker.ask("POST", JOBS, json={"model": MODEL, "suffix": "x", **files})
    assert answer.status_code == 400
    assert "training_file line 1 and validation_file line 1" in answer.json()["error"]["message"]


def test_a_file_that_a_job_needs_is_not_deleted(maker: Client) -> None:
    body = maker_body(maker)
    job_id = maker.ask("POST", JOBS, json=body).json()["id"]
    answer = maker.ask("DELETE", f"/v1/files/{body['training_file']}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "file_in_use")
    assert maker.ask("POST", f"{JOBS}/{job_id}/cancel").status_code == 200


def test_bytes_that_changed_on_the_disk_are_not_given_out(maker: Client, folder: Path) -> None:
    file_id = maker.uploaded(LINE)
    (folder / "work" / "files" / file_id).write_text(LINE + LINE)
    assert maker.ask("GET", f"/v1/files/{file_id}/content").status_code == 500
