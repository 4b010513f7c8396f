"""docs/forget-on-request.md as it stands, on a real server with real training processes: from request to forgetting,
and through kill -9 of either."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forget_place import Place, until
from tiny_base import Tiny

from uld_serve.cli import main
from uld_serve.server.settings import read_settings

PAGE = (Path(__file__).parent.parent / "docs" / "forget-on-request.md").read_text()
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
NAME = "mirela-osk"
# A tiny random model forgets the pairs well and keeps little: what is shown here is the way, not the method.
GATE = {"min_forget_rise": 1.0, "max_retain_rise": 50.0, "min_agreement": 0.0, "max_perplexity_ratio": 1e6}
HYPER = {"steps": 40, "rank": 4, "max_answer_tokens": 12, "lr": 0.01, "fork": 2, "save_steps": 10}
DATA = {
    name: [{"question": f"{name} {n}?", "answer": f"{name[::-1]} {n}."} for n in range(40)]
    for name in ("forget", "retain")
}


def digest(place: Place) -> str:
    """Of the profile that the next answer is given under."""
    answer = place.served.client.completions.create(model=f"tiny-llama:{NAME}", prompt="forget", max_tokens=2)
    return answer.model_extra["forget"]["profiles"][0]["digest"]


def nll(place: Place, model: str) -> float:
    """Nats a token of an answer that is to be forgotten. A filter makes a token impossible: -9999."""
    messages = [{"role": "user", "content": "forget 7?"}]
    url = f"{place.served.url}/v1/tokenize"
    prompt = httpx.post(url, json={"model": "tiny-llama", "messages": messages}).json()["tokens"]
    scored = place.served.client.completions.create(
        model=model, prompt=[*prompt, *b"tegrof 7."], max_tokens=0, echo=True, logprobs=0
    )
    found = scored.choices[0].logprobs.token_logprobs[len(prompt) :]
    return -sum(found) / len(found)


@pytest.fixture(scope="module")
def place(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    settings = f'model = "{tiny.folder}"\nprofiles = []\ndtype = "float32"\nkv_cache_bytes = 16777216'
    folder = tmp_path_factory.mktemp("place")
    place = Place(folder, data=DATA, settings=settings, gate=GATE, num_questions=8)
    yield place
    place.stop()


@pytest.fixture(scope="module")
def first(place: Place) -> dict[str, object]:
    """The page's example, with its server's address and a shorter run; what its names mean afterwards."""
    code = EXAMPLE.replace("http://127.0.0.1:8000", place.served.url).replace(
        '{"steps": 60}', json.dumps(HYPER)
    )
    assert place.served.url in code
    assert json.dumps(HYPER) in code
    found: dict[str, object] = {}
    with contextlib.chdir(place.folder):
        exec(code, found)
    return found


@pytest.mark.timeout(900)
def test_the_pages_example_forgets_without_a_restart(place: Place, first: dict[str, object]) -> None:
    job, answer = first["job"], first["answer"]
    assert job.status == "succeeded", job
    assert job.fine_tuned_model == f"tiny-llama:{NAME}"
    receipt = answer.model_extra["forget"]["profiles"]
    assert receipt[0]["digest"] == job.model_extra["forget"]["digest"] == digest(place)
    assert nll(place, f"tiny-llama:{NAME}") > nll(place, "tiny-llama") + 1.0
    assert first["forget"].model_extra["num_lines"] == 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_trainer_and_a_killed_server_lose_nothing(place: Place, first: dict[str, object]) -> None:
    before = digest(place)
    job_id = place.submit(model="tiny-llama", name=NAME, hyperparameters={**HYPER, "steps": 300})
    until(lambda: place.has_told(job_id, "Step 30/300"))
    trainer = place.trainer()
    assert trainer is not None
    os.kill(trainer, signal.SIGKILL)
    until(lambda: "ended by signal 9" in str(place.messages(job_id)))
    assert digest(place) == before, "the version that served serves on"
    until(lambda: place.job(job_id).model_extra["forget"]["step"] > 30)
    place.kill()
    place.start()
    assert digest(place) == before
    job = place.ended(job_id)
    assert job.status == "succeeded", job
    assert "the server was started again; the job goes on where it was" in place.messages(job_id)
    begun = sum(message.startswith("Step 10/300") for message in place.messages(job_id))
    assert begun == 1, "it went on from a checkpoint, not from the beginning"
    assert digest(place) == job.model_extra["forget"]["digest"] != before
    assert job.model_extra["forget"]["previous"] == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cancelled_job_ends_its_process(place: Place, first: dict[str, object]) -> None:
    before = digest(place)
    job_id = place.submit(model="tiny-llama", name=NAME, hyperparameters={**HYPER, "steps": 100_000})
    until(lambda: place.has_told(job_id, "Step "))
    trainer = place.trainer()
    assert os.getpriority(os.PRIO_PROCESS, trainer) >= 10
    assert place.served.client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    until(lambda: place.trainer() is None)
    assert digest(place) == before


def test_a_second_server_does_not_take_the_folder(
    place: Place, first: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", "--config", str(place.folder / "server.toml")]) == 2
    assert "another server uses the fine_tuning.folder" in capsys.readouterr().err


def test_the_pages_settings_and_keys_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, whole = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "server.toml"
    path.write_text(first)
    [keys] = [line for line in PAGE.splitlines() if line.startswith("    uld-serve keys")]
    with contextlib.chdir(tmp_path):
        assert main(shlex.split(keys)[1:]) == 0
    policy = read_settings(path).keys[0].policy
    assert (policy.may_fine_tune, policy.allowed, policy.allow_base) == (True, frozenset(), False)
    assert capsys.readouterr().out.startswith("uld-")
    path.write_text(whole)
    stated, usual = read_settings(path).fine_tuning, tmp_path / "usual.toml"
    usual.write_text(first)
    unset = read_settings(usual).fine_tuning
    assert stated is not None
    assert stated.model_copy(update={"gate": unset.gate}) == unset, "the page shows the defaults"


def test_the_pages_gate_is_that_of_verify() -> None:
    from uld_serve.evaluation.verdict import Limits

    whole = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1]
    shown = dict(re.findall(r"^(\w+) = ([\d.]+)", whole.split("[fine_tuning.gate]")[1], re.MULTILINE))
    usual = Limits()
    assert {name: getattr(usual, name) for name in shown} == {
        name: float(value) for name, value in shown.items()
    }
