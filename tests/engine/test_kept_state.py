"""Keys and values that assistants keep: whose they are, who may share them, what they cost who needs none, and what is
refused because it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kept_profiles import Kept
from tiny_base import Tiny, byte_tokenizer

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import OWN_POOL, TARGET_POOL, Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.engine.scheduler import Scheduler
from uld_serve.errors import InvalidRequest, Overloaded, ProfileError, ProfileMismatch, PromptTooLong
from uld_serve.model.decoder import Decoder
from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.profile import ProfileVersion

MakeEngine = Callable[..., Engine]
PROMPT = list(b"A conversation that is long enough to fill some blocks of four")


def forgetting(kept: Kept, *names: str) -> Decision:
    return Decision.forgetting([Applied(kept.version(name)) for name in names])


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def finish(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.check_integrity()
    return deltas


def ask(engine: Engine, decision: Decision, *, salt: str = "") -> tuple[list[int], int]:
    """Tokens of PROMPT's answer, and how many of its own came from the cache."""
    engine.add("r", PROMPT, greedy(6), decision, cache_salt=salt)
    deltas = finish(engine)["r"]
    assert deltas[-1].error is None
    assert deltas[-1].usage is not None
    return [i for delta in deltas for i in delta.token_ids], deltas[-1].usage.cached_tokens


def again(version: ProfileVersion) -> ProfileVersion:
    """The same profile under another digest, as a retrained one would be."""
    return replace(version, digest="sha256:" + "5" * 64)


WHOLE = (len(PROMPT) - 1) // 4 * 4


@pytest.mark.parametrize("name", ["own-late", "own-pair", "separate", "offset", "distilled", "adapted-late"])
def test_state_is_shared_under_one_digest_and_under_no_other(
    kept: Kept, make_kept_engine: MakeEngine, name: str
) -> None:
    engine = make_kept_engine(block_size=4)
    first, cached = ask(engine, forgetting(kept, name))
    assert cached == 0
    assert ask(engine, forgetting(kept, name)) == (first, WHOLE)
    other = Decision.of_version(again(kept.version(name)))
    assert ask(engine, other) == (first, 0)
    assert ask(engine, forgetting(kept, name), salt="somebody else") == (first, 0)


def test_the_target_is_shared_with_requests_without_a_profile_unless_it_carries_an_adapter(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    for name, shared in (("own-late", WHOLE), ("two-models", WHOLE), ("distilled", 0), ("adapted-late", 0)):
        engine = make_kept_engine(block_size=4)
        ask(engine, forgetting(kept, name))
        assert ask(engine, Decision.base())[1] == shared, name


def test_what_forks_from_an_adapted_target_is_not_what_forks_from_the_plain_one(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    engine = make_kept_engine(block_size=4)
    ask(engine, Decision.base())
    ask(engine, forgetting(kept, "distilled"))
    ask(
        engine, forgetting(kept, "own-late")
    )  # its lane is there for the plain target now, both targets are too
    assert ask(engine, forgetting(kept, "own-late", "distilled"))[1] == 0


@pytest.mark.parametrize("lost", [OWN_POOL, TARGET_POOL])
def test_a_prefix_is_as_long_as_its_shortest_lane(
    kept: Kept, make_kept_engine: MakeEngine, lost: str
) -> None:
    engine = make_kept_engine(block_size=4)
    first, _ = ask(engine, forgetting(kept, "own-late"))
    plan = engine.planner.plan(forgetting(kept, "own-late"))
    engine.planner.release(plan)
    lane = next(lane for lane in engine.pools.lanes(plan.lanes) if lane.pool == lost)
    third = lane.keys.first(3, lambda start, count: PROMPT[start : start + count])[2]
    pool = engine.pools.by_name[lost]
    pool.withdraw([pool._block_of[third]])
    assert ask(engine, forgetting(kept, "own-late")) == (first, 8)


def test_nothing_is_made_for_profiles_that_borrow_and_a_plain_request_takes_nothing_of_what_there_is(
    tiny: Tiny, kept: Kept, make_engine: MakeEngine, make_kept_engine: MakeEngine
) -> None:
    engine = make_engine()
    engine.prepare([version for _, version in tiny.profiles.values()])
    assert list(engine.pools.by_name) == [TARGET_POOL]
    assert (engine.runner.own, engine.runner.separate) == (None, {})
    engine = make_kept_engine()
    for decision in (Decision.base(), Decision.of_version(tiny.version("pair"))):
        engine.add("r", PROMPT, greedy(6), decision)
        engine.step()
        assert {name: pool.num_held > 0 for name, pool in engine.pools.by_name.items()} == {
            name: name == TARGET_POOL for name in engine.pools.by_name
        }
        finish(engine)


def test_the_room_of_their_own_is_as_deep_as_the_deepest_and_grows_only_when_idle(
    kept: Kept, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    engine.prepare([kept.version("own-late")])
    assert len(engine.runner.own.keys_SHD) == 2
    engine.add("r", PROMPT, greedy(3), forgetting(kept, "own-late"))
    for _ in range(2):  # while it waits, and while it runs
        with pytest.raises(Overloaded, match="in 4 layers"):
            engine.prepare([kept.version("own-pair")])
        engine.step()
    finish(engine)
    engine.prepare([kept.version("own-pair")])
    assert len(engine.runner.own.keys_SHD) == 4
    assert ask(engine, forgetting(kept, "own-late"))[1] == 0, "what the smaller room held is gone"


def test_a_tenth_of_the_memory_in_every_pool_gives_the_same_tokens(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    names = ["own-late", "own-pair", "separate", "offset", "two-models", "adapted-late", "separate-and-own"]
    prompts = [[number, *PROMPT[: 5 + 3 * number]] for number in range(21)]
    results = []
    # 21 requests of up to 86 tokens want some 1,400 of them at once in the target's cache, and more of their own.
    for settings in ({}, {"kv_cache_bytes": 140 * 512, "own_kv_bytes": 176 * 512}):
        engine = make_kept_engine(block_size=4, **settings)
        for number, prompt in enumerate(prompts):
            engine.add(f"r{number}", prompt, greedy(20), forgetting(kept, names[number % len(names)]))
        deltas = finish(engine)
        results.append({name: [i for delta in own for i in delta.token_ids] for name, own in deltas.items()})
        assert all(own[-1].finish_reason == "length" for own in deltas.values())
    assert engine.scheduler.num_preemptions > 0
    assert results[0] == results[1]


def test_a_profile_for_which_there_is_no_room_takes_none_from_those_served(
    kept: Kept, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is loaded while the server runs."""
    engine = make_engine()
    engine.prepare([kept.version("own-late")])
    expected = ask(engine, forgetting(kept, "own-late"))
    allocate = Decoder.allocate_cache

    def lack_memory(decoder: Decoder, num_layers: int, *args: int, **kwargs: int) -> object:
        if num_layers > 2:
            raise RuntimeError("out of memory")
        return allocate(decoder, num_layers, *args, **kwargs)

    monkeypatch.setattr(Decoder, "allocate_cache", lack_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.prepare([kept.version("own-pair")])
    assert ask(engine, forgetting(kept, "own-late"), salt="other") == expected
    with pytest.raises(ProfileError, match="there is room for 2"):
        engine.add("r", PROMPT, greedy(1), forgetting(kept, "own-pair"))


def test_when_a_pool_runs_short_only_those_who_hold_some_of_it_give_way(
    kept: Kept, make_kept_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave_way: list[str] = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(
        Scheduler, "_preempt", lambda self, one: gave_way.append(one.request_id) or preempt(self, one)
    )
    engine = make_kept_engine(block_size=4, own_kv_bytes=64 * 512)
    for name, decision in (
        ("old", forgetting(kept, "own-late")),
        ("new", forgetting(kept, "own-late")),
        ("plain", Decision.base()),
    ):
        engine.add(name, PROMPT[:20], greedy(40), decision)
    finish(engine)
    assert set(gave_way) == {"new"}, "neither the older one nor the one that holds nothing there"


def test_a_sequence_is_no_longer_than_its_lanes_can_get(kept: Kept, make_kept_engine: MakeEngine) -> None:
    engine = make_kept_engine(block_size=4, own_kv_bytes=40 * 512)
    engine.add("fits", PROMPT[:15], greedy(40), forgetting(kept, "own-pair"))  # two lanes of 20 tokens
    deltas = finish(engine)["fits"]
    assert (sum(len(delta.token_ids) for delta in deltas), deltas[-1].finish_reason) == (5, "length")
    with pytest.raises(PromptTooLong, match="20 tokens in all and this one needs at least 21"):
        engine.add("long", PROMPT[:20], greedy(1), forgetting(kept, "own-pair"))
    engine.check_integrity()
    assert ask(engine, Decision.base())[0], "others are as long as before"


def test_own_rows_count_at_every_position(kept: Kept, make_kept_engine: MakeEngine) -> None:
    engine = make_kept_engine(max_step_rows=12)
    forward, sizes = engine.runner.run, []

    def run(rows: object) -> object:
        own = sum(lane.count for lane in rows.lanes)
        elsewhere = sum(batch.num_target_rows for batch in rows.separate.values())
        sizes.append((rows.num_target_rows, own, elsewhere))
        return forward(rows)

    engine.runner = type("Spy", (), {"run": lambda _, rows: run(rows), "clear": engine.runner.clear})()
    engine.add("r", PROMPT[:13], greedy(1), forgetting(kept, "separate-and-own"))
    finish(engine)
    assert sizes == [(4, 4, 4)] * 3 + [(1, 1, 1)]


def test_nan_in_what_an_assistant_keeps_ends_its_request_and_reaches_no_other(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    for name in ("own-late", "separate"):
        engine = make_kept_engine(block_size=4, own_kv_bytes=80 * 512)
        clean, _ = ask(engine, forgetting(kept, name))
        engine = make_kept_engine(block_size=4, own_kv_bytes=80 * 512)
        engine.add("bad", PROMPT, greedy(9), forgetting(kept, name))
        engine.add("good", PROMPT[:9], greedy(3), forgetting(kept, "own-truncated"))
        engine.step()
        lane = engine.sequences["bad"].lanes[1]
        beside = engine.runner
        cache = beside.own if lane.pool == OWN_POOL else beside.separate[lane.pool].cache
        for pool in (*cache.keys_SHD, *cache.values_SHD):
            for block_id in lane.block_ids:
                pool[block_id * 4 : (block_id + 1) * 4] = float("nan")
        reasons = {request: deltas[-1].finish_reason for request, deltas in finish(engine).items()}
        assert reasons == {"bad": "error", "good": "length"}
        for _ in range(3):
            assert ask(engine, forgetting(kept, name))[0] == clean


def test_two_adapters_on_the_target_are_one_too_many(kept: Kept, make_kept_engine: MakeEngine) -> None:
    engine = make_kept_engine()
    with pytest.raises(InvalidRequest, match="'distilled', 'adapted-late' each put an adapter on the target"):
        engine.add("r", PROMPT, greedy(1), forgetting(kept, "distilled", "adapted-late"))
    engine.check_integrity()


def test_the_receipt_names_a_profile_that_works_in_the_target_alone(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    engine = make_kept_engine()
    engine.add("r", PROMPT, greedy(2), forgetting(kept, "distilled", "own-late"))
    for delta in finish(engine)["r"]:
        assert delta.receipt is not None
        assert {entry.name for entry in delta.receipt.profiles} == {"distilled", "own-late"}


@pytest.mark.parametrize("name", ["distilled", "own-late"])
def test_an_adapter_lost_under_a_running_request_ends_it_and_draws_nothing(
    kept: Kept, make_kept_engine: MakeEngine, name: str
) -> None:
    engine = make_kept_engine()
    engine.add("r", [1, 2, 3], greedy(9), forgetting(kept, name))
    engine.step()
    [(_, seat)] = engine.sequences["r"].plan.seats
    engine.planner.bank.release(seat.key)
    engine.planner.bank.evict(seat.key)
    engine.planner.bank._users[seat.key] = 1
    [delta] = engine.step()
    assert (delta.finish_reason, delta.token_ids) == ("error", ())


def test_a_profile_whose_model_is_not_there_is_refused(kept: Kept, make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(ProfileError, match=r"names model \.\./\.\./models/small, which is not loaded"):
        engine.prepare([kept.version("separate")])
    with pytest.raises(ProfileError, match="which is not loaded"):
        engine.add("r", PROMPT, greedy(1), forgetting(kept, "separate"))
    engine.check_integrity()


def swapped(model: Base) -> Base:
    """The model with a tokenizer that means `B` by the id of `A`, and the other way round."""
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    text = text.replace('"A":65', '"A":-1').replace('"B":66', '"B":65').replace('"A":-1', '"A":66')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)
    return replace(model, tokenizer=tokenizer)


def test_a_model_of_another_vocabulary_is_refused_by_its_tokens(kept: Kept, make_engine: MakeEngine) -> None:
    version, engine = kept.version("separate"), make_engine()
    models = {key: swapped(model) for key, model in kept.load_models().items()}
    with pytest.raises(
        ProfileMismatch,
        match="in 2 of 259 tokens: 65 is 'A' here and 'B' there, 66 is 'B' here and 'A' there",
    ):
        engine.prepare([version], models)
    fewer = {key: replace(model, vocab_size=258) for key, model in kept.load_models().items()}
    with pytest.raises(ProfileMismatch, match="has 258 tokens and base tiny-llama has 259"):
        engine.prepare([version], fewer)


def test_a_model_is_in_memory_once_for_all_profiles_that_name_it(
    kept: Kept, make_kept_engine: MakeEngine
) -> None:
    engine = make_kept_engine()
    runners = dict(engine.runner.separate)
    assert len(runners) == 2
    engine.prepare(kept.versions)  # nothing new: nothing has to be loaded
    assert engine.runner.separate == runners


def test_a_separate_model_of_a_shorter_context_bounds_the_sequence(
    kept: Kept, make_engine: MakeEngine
) -> None:
    models = {
        key: load_base(str(path), dtype="float32", device="cpu")
        for key, path in zip(kept.load_models(), kept.models.values(), strict=True)
    }
    for model in models.values():
        model.model.config.max_position_embeddings = 24
    engine = make_engine()
    engine.prepare([kept.version("separate")], models)
    engine.add("r", PROMPT[:20], greedy(9), forgetting(kept, "separate"))
    assert sum(len(delta.token_ids) for delta in finish(engine)["r"]) == 4
    with pytest.raises(PromptTooLong):
        engine.add("r", PROMPT[:24], greedy(1), forgetting(kept, "separate"))
    torch.testing.assert_close(engine.planner.num_users, 0)
