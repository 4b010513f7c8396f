"""A fleet on a real Ray cluster of two nodes on this machine, with nothing faked: `make ray-test`.

The tests share one cluster and run in the order of this file; the last ones leave it changed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from tiny_base import RULES, Tiny, write_tiny_profile

from uld_serve.config import EngineSettings
from uld_serve.engine.request import SamplingParams
from uld_serve.fleet.settings import FleetSettings
from uld_serve.llm import LLM
from uld_serve.server.listener import bound_socket
from uld_serve.server.settings import ServerSettings

ray = pytest.importorskip("ray", reason="needs the extra `ray`")

# Ray's own libraries warn of each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

MODEL, NUM_TOKENS, NUM_CLIENTS = "tiny-llama", 24, 6
RESULTS = "ULD_FLEET_RESULTS"
START_S, REQUEST_S = 1500.0, 600.0
# Ray gives up on its own processes after seconds that a busy machine of two cores does not have.
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
}


def ask(prompt: str, profile: str | None = "acme") -> dict[str, object]:
    name = MODEL if profile is None else f"{MODEL}:{profile}"
    return {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass
class Fleet:
    url: str
    admin_url: str
    folder: Path
    expected: dict[tuple[str, str], str]
    results: dict[str, object] = field(default_factory=dict)

    def post(self, body: dict[str, object], **kwargs: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=REQUEST_S, **kwargs)

    def admin(self, method: str, path: str, body: object = None) -> httpx.Response:
        return httpx.request(method, f"{self.admin_url}{path}", json=body, timeout=300)

    def active(self) -> dict[str, str]:
        """Digests by name."""
        listed = self.admin("GET", "/admin/forget_profiles").json()["data"]
        return {one["name"]: one["digest"] for one in listed}

    def load(self, directory: str) -> str:
        answer = self.admin("POST", "/admin/forget_profiles/acme/load", {"directory": directory})
        assert answer.status_code == 200, answer.text
        return answer.json()["digest"]

    def is_right(self, prompt: str, response: httpx.Response) -> bool:
        """Whether the whole text is what one process says under the very version of the receipt."""
        body = response.json()
        (applied,) = body["forget"]["profiles"]
        return body["choices"][0]["text"] == self.expected[prompt, applied["digest"]]

    def replicas(self) -> list[str]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return sorted(one["name"] for one in named if "uld-serve#replica#" in one["name"])

    def audited(self) -> dict[str, list[dict[str, object]]]:
        return {
            path.name.split(".")[1]: [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.folder.glob("audit.*.jsonl")
        }

    def admitted(self) -> Counter[str]:
        """Requests, by replica."""
        return Counter(
            {name: sum(one["event"] == "admitted" for one in lines) for name, lines in self.audited().items()}
        )


WORDS = ("This", "That", "Here", "There", "Once", "Never")
PROMPTS = [f"{word} is the beginning of prompt number {n}, and" for n, word in enumerate(WORDS)]


def free_port() -> int:
    with bound_socket("127.0.0.1", 0) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of two Ray nodes of one core each on this machine."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServerSettings, FleetSettings]:
    """Settings over two versions of "acme", of which the first is in the root."""
    folder = tmp_path_factory.mktemp("fleet")
    rule, streams = RULES["truncated"]
    for number in (1, 2):
        path = folder / "made" / str(number) / "acme"
        path.parent.mkdir(parents=True)
        write_tiny_profile(
            path, tiny.base, tiny.folder, rule={**rule, "strength": 3.0}, streams=streams, seed=70 * number
        )
    shutil.copytree(folder / "made" / "1" / "acme", folder / "profiles" / "acme-1")
    settings = ServerSettings.model_validate(
        {
            "model": str(tiny.folder),
            "profiles": [folder / "profiles"],
            "port": free_port(),
            "dtype": "float32",
            "kv_cache_bytes": 2**24,
            "audit_log": folder / "audit.jsonl",
            "admin": {"port": free_port()},
        }
    )
    fleet = FleetSettings(
        active_file=folder / "active.json",
        min_replicas=2,
        max_replicas=2,
        max_ongoing_requests=8,
        max_queued_requests=4,
        prefix_chars=32,
        slack=8,
        start_s=START_S,
        prepare_s=START_S,
        lease_s=60.0,
    )
    return settings, fleet


@pytest.fixture(scope="module")
def served(tiny: Tiny, made: tuple[ServerSettings, FleetSettings]) -> Iterator[Fleet]:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from ray.serve._private import api, client

    from uld_serve.fleet import ray_app, ray_service

    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = START_S
    settings, fleet = made
    folder = fleet.active_file.parent
    expected = {}
    for number in (1, 2):
        llm = LLM(
            str(tiny.folder),
            profiles=folder / "made" / str(number),
            dtype="float32",
            settings=EngineSettings(kv_cache_bytes=2**24),
        )
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        digest = llm.registry.get("acme").digest
        for prompt, under, base in zip(
            PROMPTS, llm.generate(PROMPTS, params, profile="acme"), llm.generate(PROMPTS, params), strict=True
        ):
            expected[prompt, digest], expected[prompt, "base"] = under.text, base.text
    with ExitStack() as until:
        until.enter_context(ray_service.cluster(until.enter_context(two_nodes())))
        started_s = time.monotonic()
        until.enter_context(ray_service.running(ray_app.plan_of(fleet, settings), is_ours=True))
        found = Fleet(
            f"http://127.0.0.1:{settings.port}", f"http://127.0.0.1:{settings.admin.port}", folder, expected
        )
        found.results["seconds_to_ready"] = round(time.monotonic() - started_s, 1)
        yield found
        if RESULTS in os.environ:
            found.results |= {
                "device": platform.processor() or platform.machine(),
                "load_average": os.getloadavg(),
            }
            Path(os.environ[RESULTS]).write_text(json.dumps(found.results, indent=1) + "\n")


def test_two_nodes_carry_a_replica_each(served: Fleet) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert len(served.replicas()) == 2
    assert ray.available_resources().get("CPU", 0) == 0


def test_answers_are_one_process_s_and_profiles_change_them(served: Fleet) -> None:
    for prompt in PROMPTS:
        answer = served.post(ask(prompt))
        assert answer.status_code == 200, answer.text
        assert served.is_right(prompt, answer)
        plain = served.post(ask(prompt, None)).json()
        assert plain["choices"][0]["text"] == served.expected[prompt, "base"]
        assert plain["choices"][0]["text"] != answer.json()["choices"][0]["text"]


def test_routes_and_errors_are_the_server_s_own(served: Fleet) -> None:
    assert httpx.get(f"{served.url}/ready", timeout=60).json() == {"status": "ready"}
    assert httpx.get(f"{served.url}/v1/models", timeout=60).json()["data"][0]["id"] == MODEL
    wrong = served.post({**ask(PROMPTS[0]), "misspelt": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "misspelt")
    assert served.post(ask(PROMPTS[0], "nothing")).status_code == 404


def test_streams_pass_token_by_token(served: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=120)
    body = ask(PROMPTS[0])
    extra = {"ignore_eos": body.pop("ignore_eos")}
    chunks = list(client.completions.create(**body, stream=True, extra_body=extra))
    (digest,) = (
        one["digest"]
        for chunk in chunks
        if getattr(chunk, "forget", None)
        for one in chunk.forget["profiles"]
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == served.expected[PROMPTS[0], digest]
    assert len(chunks) > NUM_TOKENS / 4


def test_what_begins_alike_goes_to_one_replica_and_the_rest_is_spread(served: Fleet) -> None:
    before = served.admitted()
    for number in range(6):
        served.post({**ask(PROMPTS[0] + str(number)), "max_tokens": 1})
    assert sorted((served.admitted() - before).values()) == [6]
    for number in range(24):
        served.post({**ask(f"{number:032d}"), "max_tokens": 1})
    assert len([name for name in served.audited() if name != "ledger"]) == 2


def test_a_client_that_leaves_frees_its_place(served: Fleet) -> None:
    body = {**ask(PROMPTS[1]), "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 60
    while not any(one.get("outcome") == "gone" for lines in served.audited().values() for one in lines):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_more_than_replicas_and_queue_take_is_429_with_retry_after(served: Fleet) -> None:
    body = {**ask(PROMPTS[2]), "max_tokens": 64}
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda _: served.post(body), range(48)))
    kinds = Counter(answer.status_code for answer in answers)
    assert set(kinds) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["code"] == "overloaded"
    served.results["overload"] = {"sent": 48, **{str(status): count for status, count in kinds.items()}}


@dataclass
class Load:
    """What clients that ask without pause were told."""

    fleet: Fleet
    num_right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(180)

    def _client(self, number: int) -> None:
        turn = number
        while not self._is_over.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            turn += 1
            try:
                answer = self.fleet.post(ask(prompt))
                failure = None if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"
            except httpx.HTTPError as error:
                failure = type(error).__name__
            with self._lock:
                self._note(prompt, None if failure else answer, failure)

    def _note(self, prompt: str, answer: httpx.Response | None, failure: str | None) -> None:
        if answer is None:
            self.failed.append(str(failure))
        elif not self.fleet.is_right(prompt, answer):
            self.wrong.append(answer.text)
        else:
            self.num_right[answer.json()["forget"]["profiles"][0]["digest"]] += 1

    def until(self, num_right: int, *, timeout_s: float = 300.0) -> None:
        """As many right answers more."""
        wanted, deadline = sum(self.num_right.values()) + num_right, time.monotonic() + timeout_s
        while sum(self.num_right.values()) < wanted:
            assert time.monotonic() < deadline, "the fleet stopped answering"
            time.sleep(0.05)

    @property
    def summary(self) -> dict[str, object]:
        return {
            "clients": NUM_CLIENTS,
            "right_by_digest": {digest[:19]: count for digest, count in self.num_right.items()},
            "wrong": len(self.wrong),
            "failed": self.failed,
        }


def test_a_profile_updated_under_load_is_old_or_new_and_never_mixed(served: Fleet) -> None:
    shutil.copytree(served.folder / "made" / "2" / "acme", served.folder / "profiles" / "acme-2")
    load, old = Load(served), served.post(ask(PROMPTS[0])).json()["forget"]["profiles"][0]["digest"]
    swaps = 0
    with load.running():
        load.until(12)
        for directory in ("acme-2", "acme-1", "acme-2"):
            digest = served.load(directory)
            swaps += 1
            # Whatever is asked from now on, by whomever, is answered under the new one.
            for prompt in PROMPTS:
                assert served.post(ask(prompt)).json()["forget"]["profiles"][0]["digest"] == digest
            load.until(12)
    assert load.wrong == []
    assert load.failed == []
    assert set(load.num_right) == {old, digest}
    served.results["updated_under_load"] = {"swaps": swaps, **load.summary}


def test_a_change_that_one_replica_cannot_make_changes_nothing(served: Fleet) -> None:
    broken = served.folder / "profiles" / "acme-3"
    shutil.copytree(served.folder / "made" / "1" / "acme", broken)
    for path in broken.rglob("*.safetensors"):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    before = served.active()
    answer = served.admin("POST", "/admin/forget_profiles/acme/load", {"directory": "acme-3"})
    assert answer.status_code == 409
    assert served.active() == before
    shutil.rmtree(broken)


def test_metrics_are_of_both_replicas(served: Fleet) -> None:
    text = served.admin("GET", "/metrics").text
    series = [line for line in text.splitlines() if line.startswith("uld_generation_tokens_total{")]
    assert len({line.split('replica="')[1].split('"')[0] for line in series}) == 2


def test_a_replica_killed_under_load_costs_what_it_was_answering_and_no_more(served: Fleet) -> None:
    load, before = Load(served), served.replicas()
    active = served.active()["acme"]
    victim = before[0]
    with load.running():
        load.until(12)
        killed_s = time.monotonic()
        ray.kill(ray.get_actor(victim, namespace="serve"))
        load.until(12)
        while len(set(served.replicas()) - {victim}) < 2 or time.monotonic() - killed_s < 1:
            assert time.monotonic() - killed_s < START_S, "it was not replaced"
            time.sleep(0.5)
        newest = (set(served.replicas()) - set(before)).pop().rsplit("#", 1)[1]
        while not served.audited().get(newest):
            assert time.monotonic() - killed_s < START_S, "the new replica was asked nothing"
            time.sleep(0.5)
        recovered_s = time.monotonic() - killed_s
        load.until(12)
    lines = served.audited()[victim.rsplit("#", 1)[1]]
    in_flight = {one["id"] for one in lines if one["event"] == "admitted"} - {
        one["id"] for one in lines if one["event"] == "ended"
    }
    assert load.wrong == []
    assert set(load.num_right) == {active}
    # A client asks again at once: more failures than clients would mean that somebody was sent there twice.
    assert len(load.failed) <= NUM_CLIENTS
    assert [one for one in load.failed if not (one.startswith("503") and "engine_stopped" in one)] == []
    served.results["replica_killed"] = {
        "in_flight_there_by_audit": len(in_flight),
        "seconds_to_new_replica_answering": round(recovered_s, 1),
        **load.summary,
    }


def test_a_drained_fleet_takes_no_more(served: Fleet) -> None:
    assert served.admin("POST", "/admin/drain", {"wait_s": 10}).json() == {
        "is_draining": True,
        "num_running": 0,
    }
    answer = served.post(ask(PROMPTS[0]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
