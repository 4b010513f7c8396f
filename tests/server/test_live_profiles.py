"""Profiles loaded and unloaded on a real engine while it answers, on a tiny base."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_server import MODEL, LiveServer, make_catalog, wait_until
from tiny_base import RULES, Tiny, write_tiny_profile

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.engine.live_profiles import admit_live, drop_live
from uld_serve.errors import ProfileMismatch
from uld_serve.profiles.probes import Probes, ReplayProbe
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import Registry
from uld_serve.profiles.store import read_profile
from uld_serve.server.loader import EngineHost

ASK = {"model": f"{MODEL}:acme", "prompt": "Hello", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def root(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of "acme"."""
    work = tmp_path_factory.mktemp("versions")
    rule, streams = RULES["truncated"]
    for number in (1, 2):
        path = work / str(number) / "acme"
        path.parent.mkdir()
        write_tiny_profile(
            path, tiny.base, tiny.folder, rule={**rule, "strength": 3.0}, streams=streams, seed=70 * number
        )
        shutil.copytree(path, work / "profiles" / f"acme-{number}")
    return work / "profiles"


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(measure_every=4)


@pytest.fixture
def server(tiny: Tiny, engine: Engine, root: Path) -> Iterator[LiveServer]:
    catalog = make_catalog(profiles=Registry([read_profile(root / "acme-1")]), tokenizer=engine.tokenizer)
    asynchronous = AsyncEngine(engine)
    live = LiveServer.start(catalog, asynchronous, host=EngineHost(asynchronous, tiny.base), roots=(root,))
    yield live
    live.stop()


def digest_and_text(server: LiveServer) -> tuple[str, str]:
    answer = server.post("/v1/completions", ASK).json()
    return answer["forget"]["profiles"][0]["digest"], answer["choices"][0]["text"]


def load(server: LiveServer, directory: str) -> str:
    answer = server.admin("POST", "/admin/forget_profiles/acme/load", json={"directory": directory})
    assert answer.status_code == 200, answer.text
    return answer.json()["digest"]


def test_swaps_under_load_mix_no_version(server: LiveServer, engine: Engine) -> None:
    expected = dict([digest_and_text(server)])
    load(server, "acme-2")
    expected |= dict([digest_and_text(server)])
    assert len(set(expected.values())) == 2, "the two versions must answer differently"
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(digest_and_text, server) for _ in range(24)]
        for number in range(6):
            load(server, f"acme-{number % 2 + 1}")
            answers.append(pool.submit(digest_and_text, server))
            answers[-1].result(60)
    found = [answer.result(60) for answer in answers]
    assert all(expected[digest] == text for digest, text in found)
    assert {digest for digest, _ in found} == set(expected)
    wait_until(lambda: engine.planner.bank.num_resident == 1)
    engine.check_integrity()


def test_unloaded_adapter_is_no_longer_in_memory(server: LiveServer, engine: Engine) -> None:
    digest_and_text(server)
    assert engine.planner.bank.num_resident == 1
    assert server.admin("DELETE", "/admin/forget_profiles/acme").status_code == 200
    assert engine.planner.bank.num_resident == 0
    assert server.post("/v1/completions", ASK).status_code == 404
    load(server, "acme-1")
    assert digest_and_text(server)[1]


def test_metrics_of_forgetting_come_from_the_sampler(server: LiveServer) -> None:
    digest, _ = digest_and_text(server)
    text = server.admin("GET", "/metrics").text
    label = f'{{profile="acme@{digest[7:19]}"}}'
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values[f"uld_profile_measured_tokens_total{label}"] == 6  # of 24, every fourth
    assert values[f"uld_profile_kl_nats_count{label}"] == values[f"uld_profile_kept_tokens_count{label}"] == 6
    assert values[f"uld_profile_kl_nats_sum{label}"] > 0
    assert 0 < values[f"uld_profile_argmax_changed_tokens_total{label}"] <= 6
    assert 6 <= values[f"uld_profile_kept_tokens_sum{label}"] <= 6 * 259
    assert values["uld_request_queue_time_seconds_count"] == 1


def test_measuring_draws_the_same_tokens(make_engine: Callable[..., Engine], tiny: Tiny) -> None:
    from uld_serve.engine.plan import Decision
    from uld_serve.engine.request import SamplingParams
    from uld_serve.engine.scoring import Job, run_jobs

    found = {}
    for every in (0, 1, 3):
        jobs = [
            Job(list(b"Hello"), SamplingParams(max_tokens=20, seed=3, ignore_eos=True), decision)
            for decision in [Decision.base(), *(Decision.of_version(tiny.version(name)) for name in RULES)]
        ]
        runs = run_jobs(make_engine(measure_every=every), jobs)
        found[every] = [[token for delta in run for token in delta.token_ids] for run in runs]
        measured = [sum(delta.measure is not None for delta in run) for run in runs]
        assert measured == [0] + [{0: 0, 1: 20, 3: 7}[every]] * len(RULES)
    assert found[0] == found[1] == found[3]


def with_replay(version: ProfileVersion, nll: float, length: int = 2) -> ProfileVersion:
    probe = ReplayProbe(prompt_ids=(72, 105), answer_ids=(33,) * length, nll_base=1.0, nll_fused=nll)
    return ProfileVersion(
        version.profile, version.digest, version.adapters, Probes(replay=(probe,)), version.directory
    )


@pytest.mark.parametrize(("nll", "length"), [(9e9, 2), (1.0, 4000)])
def test_version_that_does_not_do_here_what_it_did_is_not_let_in(
    make_engine: Callable[..., Engine], root: Path, nll: float, length: int
) -> None:
    inner = make_engine()
    engine = AsyncEngine(inner)
    engine.start()
    version = with_replay(read_profile(root / "acme-1"), nll, length)
    try:
        with pytest.raises(ProfileMismatch):
            asyncio.run(admit_live(engine, version, {}))
        asyncio.run(drop_live(engine, version))
        assert inner.planner.bank.num_resident == 0
    finally:
        engine.stop()
