"""The whole line with nothing faked: a real process, a real socket, the official client, three profile choices."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served_process import START_TIMEOUT_S, Served, start
from tiny_base import Tiny


@pytest.fixture(scope="module")
def served(tiny: Tiny) -> Iterator[Served]:
    profiles = tiny.profiles["pair"][0].parent
    server = start("--model", str(tiny.folder), "--profiles", str(profiles), "--dtype", "float32")
    yield server
    server.process.terminate()
    assert server.process.wait(timeout=20) == 0, "SIGTERM is a clean stop"
    assert server.process.stdout is not None
    server.process.stdout.close()


def stream_text(client: openai.OpenAI, model: str) -> str:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me everything."}],
        max_tokens=24,
        temperature=0.8,
        seed=5,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_list_the_base_first_and_then_each_profile(served: Served, tiny: Tiny) -> None:
    ids = [model.id for model in served.client.models.list()]
    assert ids == ["tiny-llama", *(f"tiny-llama:{name}" for name in sorted(tiny.profiles))]


def test_three_clients_at_once_get_what_each_gets_alone(served: Served) -> None:
    models = ["tiny-llama", "tiny-llama:late-fork", "tiny-llama:pair+truncated"]
    alone = [stream_text(served.client, model) for model in models]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert list(pool.map(lambda model: stream_text(served.client, model), models)) == alone


def test_echoed_log_probabilities_are_those_of_the_served_distribution(served: Served) -> None:
    def scores(model: str) -> list[float | None]:
        completion = served.client.completions.create(
            model=model, prompt=list(b"score me"), max_tokens=0, echo=True, logprobs=1
        )
        return completion.choices[0].logprobs.token_logprobs

    base, forgetting = scores("tiny-llama"), scores("tiny-llama:late-fork")
    assert base[0] is None
    assert forgetting[0] is None
    assert base[1:] != forgetting[1:]
    assert len(base) == len(forgetting) == len(b"score me")


def test_the_receipt_names_the_profile_that_was_applied(served: Served, tiny: Tiny) -> None:
    version = tiny.version("late-fork")
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": "tiny-llama", "prompt": "x", "max_tokens": 2, "forget_profile": "late-fork"},
    )
    assert answer.headers["x-forget-profile"] == f"late-fork@{version.digest12}"
    assert answer.json()["forget"]["profiles"] == [
        {"name": "late-fork", "digest": version.digest, "rule": "relu_difference", "strength": 2.0}
    ]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"forget_profile": "nobody"}, 404),
        ({"model": "tiny-llama:nobody"}, 404),
        ({"model": "other"}, 404),
        ({"forget_profil": "late-fork"}, 400),
        ({"prompt": "x" * 600}, 400),
        ({"max_tokens": -1}, 400),
        ({"temperature": 9}, 400),
        ({"best_of": 3}, 400),
        ({"prompt": ""}, 400),
    ],
)
def test_bad_input_is_refused_clearly(served: Served, changes: dict[str, object], status: int) -> None:
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": "tiny-llama", "prompt": "x", "max_tokens": 1, **changes},
    )
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_client_that_hangs_up_frees_its_request(served: Served) -> None:
    body = {"model": "tiny-llama:pair", "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    start_s = time.monotonic()
    assert stream_text(served.client, "tiny-llama:late-fork")
    assert time.monotonic() - start_s < 20
    assert httpx.get(f"{served.url}/health").status_code == 200


def failing_start(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "uld-serve"), "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_profile_for_another_base_is_refused_at_start_with_both_fingerprints(
    tiny: Tiny, tmp_path: Path
) -> None:
    from tiny_base import write_base

    other = write_base(tmp_path / "other", seed=1)
    message = failing_start("--model", str(other), "--profiles", str(tiny.profiles["late-fork"][0]))
    assert tiny.base.fingerprint in message
    assert message.count("sha256:") == 2


def test_an_altered_profile_file_is_refused_at_start_by_name(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "late-fork"
    shutil.copytree(tiny.profiles["late-fork"][0], copy)
    weights = copy / "assistant" / "adapter_model.safetensors"
    data = weights.read_bytes()
    for altered in (data[:-5], data[:-5] + b"\x00\x01\x02\x03\x04"):
        weights.chmod(0o600)
        weights.write_bytes(altered)
        message = failing_start("--model", str(tiny.folder), "--profiles", str(copy))
        assert "adapter_model.safetensors" in message


def test_a_profile_that_does_not_reproduce_its_replay_is_refused_at_start(tiny: Tiny, tmp_path: Path) -> None:
    from uld_serve.profiles.probes import Probes, ReplayProbe
    from uld_serve.profiles.store import write_profile

    folder, version = tiny.profiles["late-fork"]
    replay = ReplayProbe(
        prompt_ids=tuple(b"who?"), answer_ids=tuple(b"nobody"), nll_base=1.0, nll_fused=0.001
    )
    write_profile(
        tmp_path / "late-fork",
        version.profile,
        adapters={"assistant": folder / "assistant"},
        probes=Probes(replay=(replay,)),
        training={},
    )
    message = failing_start("--model", str(tiny.folder), "--profiles", str(tmp_path / "late-fork"))
    assert "replay probe 0" in message


def test_sigterm_lets_a_running_answer_finish(tiny: Tiny) -> None:
    server = start(
        "--model", str(tiny.folder), "--profiles", str(tiny.profiles["pair"][0]), "--dtype", "float32"
    )
    body = {"model": "tiny-llama:pair", "prompt": "x", "max_tokens": 40, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    reasons = [
        json.loads(line[6:])["choices"][0]["finish_reason"]
        for line in rest[:-1]
        if '"choices": [{' in line or '"choices":[{' in line
    ]
    assert reasons[-1] == "length"
    assert server.process.wait(timeout=20) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()
