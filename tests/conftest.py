"""Fixtures that several packages' tests share: a tiny base, profiles on it for every rule, an engine, an oracle."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator

import pytest
import results_log
import torch
from kept_profiles import Kept, write_kept
from oracle import Oracle
from tiny_base import RULES, Tiny, write_base, write_tiny_profile

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.model.loading import load_base


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    results_log.note(item, report)
    return report


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Two threads collapse on a busy machine: steps of 20 ms then take seconds.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _libraries_out_of_the_collectors_way() -> Iterator[None]:
    # The Trainer collects garbage twice a run, which takes longer than a tiny run if it looks at all libraries.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    folder = write_base(root / "tiny-llama")
    base = load_base(str(folder), dtype="float32", device="cpu")
    profiles = {}
    for seed, (name, (rule, streams)) in enumerate(RULES.items()):
        path = root / "profiles" / name
        version = write_tiny_profile(path, base, folder, rule=rule, streams=streams, seed=10 * seed)
        profiles[name] = (path, version)
    return Tiny(folder, base, profiles)


@pytest.fixture(scope="session")
def oracle(tiny: Tiny) -> Oracle:
    return Oracle(tiny.folder, tiny.profiles, vocab_size=tiny.base.vocab_size, control_ids=[256, 257, 258])


@pytest.fixture(scope="session")
def kept(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return write_kept(tmp_path_factory.mktemp("kept"), tiny.base, tiny.folder)


@pytest.fixture(scope="session")
def kept_oracle(tiny: Tiny, kept: Kept) -> Oracle:
    profiles = {**tiny.profiles, **kept.profiles}
    return Oracle(tiny.folder, profiles, vocab_size=tiny.base.vocab_size, control_ids=[256, 257, 258])


@pytest.fixture(scope="session")
def make_kept_engine(kept: Kept, make_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    """As make_engine, prepared for profiles that keep state of their own."""

    def make(**settings: int) -> Engine:
        engine = make_engine(**settings)
        engine.prepare(kept.versions, kept.load_models())
        return engine

    return make


@pytest.fixture(scope="session")
def make_engine(tiny: Tiny) -> Callable[..., Engine]:
    """make_engine(max_step_rows=…, …) -> an engine on a freshly loaded tiny base."""

    def make(**settings: int) -> Engine:
        base = load_base(str(tiny.folder), dtype="float32", device="cpu")
        # The default of 1 GiB takes longer to fill with zeros than most tests take.
        return Engine.of(base, EngineSettings(**{"kv_cache_bytes": 2**24, **settings}))

    return make
