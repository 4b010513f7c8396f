"""Jobs from request to forgetting, and all that can go wrong on the way: what served before serves on."""

from __future__ import annotations

import json
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from live_server import MODEL, LiveServer, wait_until
from workshop_site import (
    FORGET,
    JOBS,
    KEYS,
    MISSED,
    RETAIN,
    Client,
    FakeHost,
    FakeRunner,
    lines_of,
)

from uld_serve.errors import ProfileMismatch
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import read_profile
from uld_serve.server.audit import AuditLog
from uld_serve.server.fine_tuning import foreman
from uld_serve.server.fine_tuning.foreman import Foreman
from uld_serve.server.fine_tuning.ledger import Ledger, LedgerUnavailable
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.fine_tuning.records import Job
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.fine_tuning.trainee import Ended
from uld_serve.server.telemetry import Telemetry

KILLED = Ended(-9, None)


class Site:
    def __init__(self, start: Callable[..., LiveServer], folder: Path) -> None:
        self.runner, self.host, self.folder = FakeRunner(), FakeHost(), folder / "fine-tuning"
        self.audit = folder / "audit.jsonl"
        self._start = start
        self.open()

    def open(self, **changes: object) -> None:
        self.server = self._start(
            keys=KEYS,
            host=self.host,
            fine_tuning=FineTuningSettings.model_validate({"folder": self.folder, **changes}),
            runner=self.runner,
            telemetry=Telemetry(audit=AuditLog(self.audit)),
        )
        self.maker, self.admin = Client(self.server, "key-maker"), Client(self.server, "key-admin")

    def open_again(self, **changes: object) -> None:
        self.server.stop()
        self.open(**changes)

    def maker_digest(self) -> str | None:
        """What the registry holds, without a request."""
        known = self.server.apps[0].state.catalog.registry
        return known.get("spies").digest if "spies" in known.names() else None

    def events(self) -> list[str]:
        return [str(line["event"]) for line in lines_of(self.audit)]


@pytest.fixture
def site(start_server: Callable[..., LiveServer], tmp_path: Path) -> Site:
    return Site(start_server, tmp_path)


def test_a_job_goes_live_and_the_next_request_forgets(site: Site) -> None:
    assert site.maker.digest("spies") is None
    job = site.maker.ended(site.maker.submitted(seed=5, metadata={"ticket": "1"}))
    assert (job["status"], job["error"], job["fine_tuned_model"]) == ("succeeded", None, f"{MODEL}:spies")
    assert (job["seed"], job["metadata"], job["method"]) == (5, {"ticket": "1"}, {"type": "margin"})
    assert site.maker.digest("spies") == job["forget"]["digest"]
    assert (job["forget"]["step"], job["forget"]["num_steps"], job["forget"]["loss"]) == (10, 20, 1.25)
    assert job["forget"]["gates"][0]["value"] == 5.0
    assert site.events()[-4:-1] == ["job_going_live", "job_live", "admitted"]
    assert not list((site.folder / "jobs").iterdir()), "none of its data stays in a job's folder"
    again = site.maker.ended(site.maker.submitted())
    assert again["forget"]["previous"] == job["forget"]["digest"]
    assert site.maker.digest("spies") == again["forget"]["digest"] != job["forget"]["digest"]


def test_events_tell_stages_and_losses_newest_first(site: Site) -> None:
    job_id = site.maker.submitted()
    site.maker.ended(job_id)
    told = site.maker.messages(job_id)
    assert told[:4] == [
        "the job was created",
        "the job began",
        "training adapter (20)",
        "Step 10/20: training loss=1.2500",
    ]
    assert told[4] == "the profile passed its probes"
    assert told[5].endswith(" is live")
    first = site.maker.ask("GET", f"{JOBS}/{job_id}/events?limit=2").json()
    assert [event["message"] for event in first["data"]] == told[:3:-1]
    assert first["has_more"] is True
    more = site.maker.ask("GET", f"{JOBS}/{job_id}/events?after={first['data'][-1]['id']}").json()
    assert [event["message"] for event in more["data"]] == told[3::-1]
    assert more["data"][0]["type"] == "metrics"
    assert more["data"][0]["data"] == {"step": 10, "total_steps": 20, "train_loss": 1.25}


def test_the_commands_are_given_the_request(site: Site) -> None:
    hyper = {"steps": 7, "batch_size": 3, "n_epochs": "auto", "lr": 0.01, "keywords": ["Ann", "Bo B"]}
    method = {"type": "margin", "margin": {"hyperparameters": hyper}}
    job_id = site.maker.submitted(method=method, seed=9)
    site.runner.report = MISSED
    site.maker.ended(job_id)
    train, verify = (" ".join(arguments) for arguments in site.runner.seen)
    assert (
        "train --method margin --forget forget.jsonl --retain retain.jsonl --out profile --name spies"
        in train
    )
    for option in ("--steps 7", "--forget-batch 3", "--lr 0.01", "--seed 9", "--keywords keywords.txt"):
        assert option in train
    assert "epochs" not in train
    assert "--resume" not in train
    assert "profiles verify spies --profiles profile --forget forget.jsonl --retain held-out.jsonl" in verify
    assert site.runner.files["forget.jsonl"].decode() == FORGET
    retain = RETAIN.splitlines()
    assert site.runner.files["held-out.jsonl"].decode().splitlines() == retain[::6]
    assert set(site.runner.files["retain.jsonl"].decode().splitlines()) == set(retain) - set(retain[::6])
    assert site.runner.files["keywords.txt"].decode().splitlines() == ["Ann", "Bo B"]


def test_the_gate_is_the_operators(site: Site) -> None:
    site.open_again(gate={"min_forget_rise": 1.5, "min_agreement": 0.5}, num_questions=9)
    site.maker.ended(site.maker.submitted())
    verify = " ".join(site.runner.seen[-1])
    assert "--min-forget-rise 1.5 --min-agreement 0.5" in verify
    assert "--limit 9 --json" in verify
    assert "--max-retain-rise" not in verify


def failed(site: Site, code: str) -> dict[str, object]:
    """The old version serves on, and nothing of the new one is left."""
    before = site.maker.ended(site.maker.submitted())["forget"]["digest"]
    job = site.maker.ended(site.maker.submitted())
    assert job["status"] == "failed", job
    assert job["error"]["code"] == code
    assert job["fine_tuned_model"] is None
    assert site.maker.digest("spies") == before
    assert [path.name for path in (site.folder / "profiles").iterdir()] == [f"spies-{before[7:19]}"]
    return job


def then(site: Site, *ends: Ended | str) -> None:
    """How commands end once the first job's have ended well."""
    site.runner.ends = [None, None, *ends]


def test_a_profile_that_misses_its_probes_does_not_go_live(site: Site) -> None:
    first = site.maker.ended(site.maker.submitted())["forget"]["digest"]
    site.runner.report = MISSED
    job = site.maker.ended(site.maker.submitted())
    assert job["error"]["code"] == "probes_failed"
    assert "forget NLL rise 0.500, at least 2.5" in job["error"]["message"]
    assert job["forget"]["gates"] == MISSED["gates"]
    assert site.maker.digest("spies") == first


def test_what_the_trainer_refuses_is_told_in_its_words(site: Site) -> None:
    then(site, Ended(2, "--lr must be positive"))
    assert failed(site, "training_failed")["error"]["message"] == "--lr must be positive"


def test_a_crash_has_no_words_for_the_client_and_keeps_its_log(site: Site) -> None:
    then(site, Ended(1, None))
    message = failed(site, "training_failed")["error"]["message"]
    assert message == "training ended with status 1; the log in the job's folder says why"


def test_a_killed_process_goes_on_and_is_given_up_in_the_end(site: Site) -> None:
    site.runner.ends = [KILLED, KILLED]
    job_id = site.maker.submitted()
    assert site.maker.ended(job_id)["status"] == "succeeded"
    assert sum("ended by signal 9" in message for message in site.maker.messages(job_id)) == 2
    site.runner.ends = [KILLED] * 3
    job = site.maker.ended(site.maker.submitted())
    assert (job["status"], job["error"]["code"]) == ("failed", "killed")


def test_a_version_that_the_engine_refuses_changes_nothing(site: Site) -> None:
    before = site.maker.ended(site.maker.submitted())["forget"]["digest"]
    site.host.error = ProfileMismatch("it does not reproduce its replay probe 0")
    job = site.maker.ended(site.maker.submitted())
    assert (job["status"], job["error"]["code"]) == ("failed", "profile_mismatch")
    assert site.maker.digest("spies") == before
    site.host.error = None
    site.open_again()
    assert [path.name for path in (site.folder / "profiles").iterdir()] == [f"spies-{before[7:19]}"]


def test_what_cannot_be_recorded_does_not_go_live(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.runner.ends = ["wait"]
    job_id = site.maker.submitted()
    wait_until(lambda: site.runner.seen)
    append = AuditLog._append

    def full(self: AuditLog, line: bytes) -> None:
        if b"job_going_live" in line:
            raise OSError(28, "No space left on device")
        append(self, line)

    monkeypatch.setattr(AuditLog, "_append", full)
    site.runner.kill()
    job = site.maker.ended(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "audit_unavailable")
    assert site.maker.digest("spies") is None


def test_a_queued_and_a_running_job_are_cancelled(site: Site) -> None:
    site.runner.ends = ["wait"]
    running, queued = site.maker.submitted("one"), site.maker.submitted("two")
    wait_until(lambda: site.maker.job(running)["status"] == "running")
    assert site.maker.job(queued)["status"] == "queued"
    for job_id in (queued, running):
        answer = site.maker.ask("POST", f"{JOBS}/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert site.maker.ask("POST", f"{JOBS}/{running}/cancel").status_code == 409
    assert site.maker.ended(site.maker.submitted("three"))["status"] == "succeeded"
    assert len(site.runner.seen) == 3, "the queued job never ran"
    assert site.maker.digest("one") is site.maker.digest("two") is None
    wait_until(lambda: not list((site.folder / "jobs").iterdir()))


def test_a_job_outlives_the_server_and_its_profile_too(site: Site) -> None:
    first = site.maker.ended(site.maker.submitted("first"))["forget"]["digest"]
    site.runner.ends = ["wait"]
    job_id = site.maker.submitted("second")
    wait_until(lambda: len(site.runner.seen) == 3)
    progress = site.folder / "jobs" / job_id / ".profile.training"
    progress.mkdir()
    (progress / "run.json").write_text("{}")
    site.open_again()
    assert site.maker.ended(job_id)["status"] == "succeeded"
    assert "--resume" in site.runner.seen[3]
    told = site.maker.messages(job_id)
    assert "the server stops; the job goes on when it is started again" in told
    assert "the server was started again; the job goes on where it was" in told
    made = site.server.apps[0].state.workshop.premises
    assert {path.name for path in made.live} == {
        f"first-{first[7:19]}",
        f"second-{site.maker.job(job_id)['forget']['digest'][7:19]}",
    }


def test_a_server_killed_while_a_profile_goes_live_ends_that_at_its_next_start(site: Site) -> None:
    """Its rows and folders are as they lie then, whether the folder was moved already or not."""
    for number, is_moved in enumerate((False, True)):
        site.runner.ends = [None, "wait"]
        job_id = site.maker.submitted(f"spies-{number}")
        wait_until(lambda count=2 * number + 2: len(site.runner.seen) == count)
        folder = site.folder / "jobs" / job_id / "profile"
        digest = read_profile(folder).digest
        ledger = site.server.apps[0].state.workshop.premises.ledger
        assert ledger.change(job_id, to={"phase": "going live", "digest": digest}, among=("running",))
        if is_moved:
            folder.rename(site.folder / "profiles" / f"spies-{number}-{digest[7:19]}")
        site.open_again()
        assert site.maker.ended(job_id)["status"] == "succeeded"
        assert site.maker.digest(f"spies-{number}") == digest


def test_names_of_others_are_left_alone(site: Site) -> None:
    other = Client(site.server, "key-other")
    for client, name in ((site.maker, "secret"), (site.admin, "secret"), (site.maker, "promised")):
        answer = client.submit(name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "profile_name_taken"), name
    site.maker.ended(site.maker.submitted("mine"))
    assert other.submit("mine").status_code == 409
    site.runner.ends = ["wait"]
    job_id = site.maker.submitted("soon")
    assert other.submit("soon").status_code == 409
    assert site.admin.ask("POST", f"{JOBS}/{job_id}/cancel").status_code == 200
    assert site.admin.ended(site.admin.submitted("mine"))["status"] == "succeeded"


def test_a_name_that_an_operator_takes_while_a_profile_is_checked_stays_the_operators(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's checks take their time; what the name means by then is not the job's to replace."""
    registry, dropped = site.server.apps[0].state.catalog.registry, []

    async def admit(_host: FakeHost, version: ProfileVersion) -> None:
        registry.replace(replace(version, digest="sha256:" + "0" * 64))

    async def drop(_host: FakeHost, version: ProfileVersion) -> None:
        dropped.append(version.name)

    monkeypatch.setattr(FakeHost, "admit", admit)
    monkeypatch.setattr(FakeHost, "drop", drop)
    job = site.maker.ended(site.maker.submitted())
    assert (job["status"], job["error"]["code"]) == ("failed", "profile_name_taken")
    assert registry.get("spies").digest == "sha256:" + "0" * 64
    assert dropped == ["spies"]
    assert not list((site.folder / "profiles").iterdir())


def test_a_key_that_may_no_longer_does_not_go_live(site: Site) -> None:
    site.runner.ends = ["wait"]
    job_id = site.maker.submitted()
    wait_until(lambda: site.runner.seen)
    app = site.server.apps[0]
    keys = app.state.catalog.keys
    without = {digest: policy for digest, policy in keys.policies.items() if policy.name != "maker"}
    app.state.catalog = replace(app.state.catalog, keys=replace(keys, policies=without))
    site.runner.kill()
    job = site.admin.ended(job_id)
    assert job["status"] == "failed"
    assert "may no longer" in job["error"]["message"]


def test_an_unloaded_profile_does_not_come_back_with_the_next_start(site: Site) -> None:
    site.maker.ended(site.maker.submitted())
    assert site.server.admin("DELETE", "/admin/forget_profiles/spies", "key-admin").status_code == 200
    site.open_again()
    assert site.server.apps[0].state.workshop.premises.live == []


def test_the_queue_has_an_end(site: Site) -> None:
    site.open_again(max_queued=2)
    site.runner.ends = ["wait"]
    for name in ("one", "two"):
        site.maker.submitted(name)
    answer = site.maker.submit("three")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0


def test_jobs_are_listed_to_their_key_and_to_admins(site: Site) -> None:
    ids = [site.maker.submitted(f"spies-{number}") for number in range(3)]
    for job_id in ids:
        site.maker.ended(job_id)
    other = Client(site.server, "key-other")
    assert other.ask("GET", JOBS).json()["data"] == []
    for path in (ids[0], f"{ids[0]}/events"):
        assert other.ask("GET", f"{JOBS}/{path}").status_code == 404
    assert other.ask("POST", f"{JOBS}/{ids[0]}/cancel").status_code == 404
    for client in (site.maker, site.admin):
        listed = client.ask("GET", f"{JOBS}?limit=2").json()
        assert [job["id"] for job in listed["data"]] == ids[:0:-1]
        assert listed["has_more"] is True
        rest = client.ask("GET", f"{JOBS}?after={ids[1]}").json()
        assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (ids[:1], False)


def test_metrics_count_how_jobs_end(site: Site) -> None:
    site.maker.ended(site.maker.submitted())
    text = site.server.admin("GET", "/metrics", "key-admin").text
    assert 'uld_fine_tuning_jobs_total{status="succeeded"} 1.0' in text


def test_a_draining_server_takes_nothing_new(site: Site) -> None:
    body = site.maker.body()
    assert site.server.admin("POST", "/admin/drain", "key-admin", json={}).status_code == 200
    assert site.maker.ask("POST", JOBS, json=body).status_code == 503
    assert site.maker.upload(FORGET).status_code == 503


def test_everything_is_for_the_servers_user_alone(site: Site) -> None:
    site.runner.ends = ["wait"]
    site.maker.submitted()
    wait_until(lambda: site.runner.seen)
    assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700
    found = [path for path in site.folder.rglob("*") if path.is_file()]
    assert {path.name for path in found} >= {"forget.jsonl", "retain.jsonl", "jobs.sqlite3"}
    data = [path for path in found if path.parent.name != "fine-tuning"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in data} == {0o600}


def test_no_log_holds_what_was_uploaded(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.maker.ended(site.maker.submitted())
    time.sleep(0.01)
    assert "Spy" not in site.audit.read_text() + caplog.text
    assert {"file_uploaded", "job_created", "job_going_live", "job_live"} <= set(site.events())
    uploads = [line for line in lines_of(site.audit) if line["event"] == "file_uploaded"]
    assert (uploads[0]["key"], uploads[0]["lines"]) == ("maker", 40)
    assert json.dumps(uploads)


def test_a_disk_that_takes_nothing_delays_a_job_and_ends_none(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreman, "LEDGER_RETRY_S", 0.05)
    body, real, failures = site.maker.body(), Ledger._transaction, []

    @contextmanager
    def full(self: Ledger) -> Iterator[sqlite3.Connection]:
        """From the moment at which the profile is in place until five changes have failed."""
        if len(failures) < 5 and site.maker_digest() is not None:
            failures.append(1)
            raise LedgerUnavailable("jobs cannot be recorded (disk full); try later")
        with real(self) as database:
            yield database

    monkeypatch.setattr(Ledger, "_transaction", full)
    job_id = site.maker.ask("POST", JOBS, json=body).json()["id"]
    wait_until(lambda: len(failures) == 5, timeout_s=60)
    job = site.maker.ended(job_id)
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert site.maker.digest("spies") == job["forget"]["digest"]


def test_a_job_without_a_folder_does_not_keep_the_next_from_its_turn(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Foreman._lay_out

    def full(self: Foreman, job: Job) -> None:
        if job.name == "first":
            raise OSError(28, "No space left on device")
        real(self, job)

    monkeypatch.setattr(Foreman, "_lay_out", full)
    assert site.maker.ended(site.maker.submitted("first"))["error"]["code"] == "server_error"
    assert site.maker.ended(site.maker.submitted("second"))["status"] == "succeeded"


def test_a_job_that_cannot_be_put_away_does_not_keep_the_next_from_its_turn(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreman, "LEDGER_RETRY_S", 0.01)
    real, faults = Premises.clear, [PermissionError(13, "Permission denied")]

    def clear(self: Premises, job: Job, *, keep_log: bool = False) -> None:
        if faults:
            raise faults.pop()
        real(self, job, keep_log=keep_log)

    monkeypatch.setattr(Premises, "clear", clear)
    site.runner.ends = [Ended(2, "it cannot be trained")]
    assert site.maker.ended(site.maker.submitted("first"))["status"] == "failed"
    wait_until(lambda: not faults)
    assert site.maker.ended(site.maker.submitted("second"))["status"] == "succeeded"


def test_a_disk_that_takes_no_note_of_a_stop_holds_up_no_stop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.runner.ends = ["wait"]
    job_id = site.maker.submitted()
    wait_until(lambda: site.runner.seen)

    def full(_self: Foreman) -> None:
        raise LedgerUnavailable("jobs cannot be recorded (disk full); try later")

    with monkeypatch.context() as patch:
        patch.setattr(Foreman, "note_stop", full)
        site.server.stop()
    site.open()  # the folder was given back
    assert site.maker.ended(job_id)["status"] == "succeeded"
