"""From decisions to plans: every profile of a decision is in its plan once and at its strength, cache keys name all
that what is cached depends on, and what cannot be run is refused with nothing held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from uld_serve.engine.plan import Applied, Decision, LanePlan, Planner, ProfileVersion, Seat, SecondModel
from uld_serve.engine.request import ReceiptEntry
from uld_serve.errors import InvalidRequest, Overloaded, ProfileError, ProfileMismatch
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import Profile

SHA = "sha256:" + "0" * 64
OTHER = "sha256:" + "f" * 64
BASE = {"id": "tiny", "fingerprint": SHA, "tokenizer": SHA, "vocab_size": 259, "num_layers": 4}
RELU = {"kind": "relu_difference", "strength": 2.0, "dead_zone": 0.5}
RANK = {"kind": "pair_rank", "rank_k": 20, "roles": {"q": "retain", "p": "forget"}}
SUBTRACT = {"kind": "subtract", "strength": 0.5}


@dataclass
class FakeBank:
    """Counts who holds what; the key that holds `full` finds no room."""

    full: str = "-"
    users: Counter[str] = field(default_factory=Counter)
    loads: dict[str, Callable[[], LoraAdapter]] = field(default_factory=dict)

    @property
    def total_users(self) -> int:
        return self.users.total()

    def acquire(self, key: str, load: Callable[[], LoraAdapter]) -> int:
        if self.full in key:
            raise Overloaded("full")
        self.users[key] += 1
        self.loads[key] = load
        return len(self.loads)

    def release(self, key: str) -> None:
        assert self.users[key] > 0
        self.users[key] -= 1

    def evict_all(self, prefix: str) -> int:
        return 0


def stream(name: str = "assistant", **changes: object) -> dict[str, object]:
    return {"name": name, "fork": 2, "exit": 4, "kv": "borrowed", "adapter": name, **changes}


def version(
    name: str,
    digit: str,
    *streams: dict[str, object],
    rule: dict[str, object] = RELU,
    target: str | None = None,
) -> ProfileVersion:
    made = {"schema": 1, "name": name, "method": "rkld", "base": BASE, "rule": rule, "target_adapter": target}
    profile = Profile.model_validate({**made, "streams": list(streams)})
    adapters = {key: f"{name}'s {key}" for key in ("assistant", "retain", "forget", "target")}
    return ProfileVersion(profile, "sha256:" + digit * 64, adapters, Probes())


LATE = version("late", "a", stream())
DISTILLED = version("distilled", "d", rule={"kind": "identity"}, target="target")
PAIR = version("pair", "b", stream("retain", fork=1), stream("forget"), rule=RANK)
OWN = version("own", "c", stream(fork=1, kv="own"))
MODEL = {"id": "other", "fingerprint": OTHER, "tokenizer": SHA}
ELSEWHERE = version("elsewhere", "e", stream(fork=0, exit=6, kv="own", adapter=None, model=MODEL))


def planner(**changes: object) -> Planner:
    return Planner(FakeBank(), **{"own_layers": 3, **changes})


def forgetting(*versions: ProfileVersion, scale: float = 1.0) -> Decision:
    return Decision.forgetting([Applied(one, scale) for one in versions])


def test_forgetting_nothing_must_be_said_as_the_base() -> None:
    with pytest.raises(InvalidRequest, match=r"Decision\.base"):
        Decision.forgetting([])
    assert Decision.base() == Decision((), "max")
    assert Decision.of_version(LATE) == Decision((Applied(LATE, 1.0),), "max")
    assert Decision.forgetting([Applied(LATE)], compose="sum").compose == "sum"


def test_the_base_alone_is_one_lane_and_holds_nothing() -> None:
    ours = planner()
    plan = ours.plan(Decision.base())
    assert (plan.streams, plan.terms, plan.silent, plan.target_seat) == ((), (), (), None)
    assert plan.lanes == (LanePlan("target", "0:"),)
    assert (plan.num_borrowing, plan.max_positions, plan.compose, ours.num_users) == (0, None, "max", 0)


def test_a_term_is_the_profiles_rule_at_its_scaled_strength() -> None:
    plan = planner().plan(forgetting(LATE, scale=1.5))
    (term,) = plan.terms
    assert (term.kind, term.strength, term.streams) == ("relu_difference", 3.0, {"a": 0})
    assert (term.filter_mode, term.tau, term.min_keep) == ("fused", 0.02, 256)
    assert (term.protect, term.rank_k, term.dead_zone) == (False, 0, 0.5)
    assert term.tag == int("a" * 15, 16)
    assert term.entry == ReceiptEntry("late", LATE.digest, "relu_difference", 3.0)
    (one,) = plan.streams
    assert (one.fork, one.exit, one.lane, one.model, one.is_late) == (2, 4, 0, None, False)
    assert one.seat == Seat(f"{LATE.digest}/assistant", 1)


def test_roles_say_which_stream_is_which_input() -> None:
    plan = planner().plan(forgetting(LATE, PAIR))
    assert [term.streams for term in plan.terms] == [{"a": 0}, {"q": 1, "p": 2}]
    assert [(one.fork, one.seat.key) for one in plan.streams[1:]] == [
        (1, f"{PAIR.digest}/retain"),
        (2, f"{PAIR.digest}/forget"),
    ]
    assert (plan.terms[1].rank_k, plan.num_borrowing, plan.rows_a_token) == (20, 3, 4)


@pytest.mark.parametrize("scales", [(0.5, 2.0), (2.0, 0.5)])
def test_a_profile_given_twice_counts_once_at_its_larger_scale(scales: tuple[float, float]) -> None:
    plan = planner().plan(Decision.forgetting([Applied(LATE, scale) for scale in scales]))
    assert [term.strength for term in plan.terms] == [4.0]
    assert len(plan.streams) == 1


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.01, float("nan")])
def test_a_scale_outside_its_range_is_refused_and_nothing_stays_held(scale: float) -> None:
    ours = planner()
    with pytest.raises(InvalidRequest, match="above 0 and at most 2") as caught:
        ours.plan(Decision.forgetting([Applied(DISTILLED), Applied(LATE, scale)]))
    assert caught.value.param == "forget_strength"
    assert ours.num_users == 0


@pytest.mark.parametrize("one", [PAIR, DISTILLED])
def test_what_has_no_strength_takes_no_scale(one: ProfileVersion) -> None:
    with pytest.raises(InvalidRequest, match="no strength to scale") as caught:
        planner().plan(forgetting(one, scale=2.0))
    assert caught.value.param == "forget_strength"


def test_the_targets_own_adapter_is_in_every_cache_key() -> None:
    ours = planner()
    plan = ours.plan(forgetting(DISTILLED, OWN))
    assert plan.target_seat == Seat(f"{DISTILLED.digest}/target", 1)
    assert plan.silent == (ReceiptEntry("distilled", DISTILLED.digest, "identity", 1.0),)
    assert [term.kind for term in plan.terms] == ["relu_difference"]
    assert plan.lanes == (
        LanePlan("target", f"71:{DISTILLED.digest}"),
        LanePlan("own", f"71:{DISTILLED.digest}71:{OWN.digest}9:assistant"),
    )
    assert ours.bank.loads[f"{DISTILLED.digest}/target"]() == "distilled's target"
    ours.release(plan)
    assert ours.num_users == 0


def test_two_adapters_on_one_target_are_refused() -> None:
    ours = planner()
    second = version("second", "9", rule={"kind": "identity"}, target="target")
    with pytest.raises(InvalidRequest, match="'distilled', 'second' each put an adapter"):
        ours.plan(forgetting(DISTILLED, second))
    assert ours.num_users == 0


def test_a_stream_with_state_of_its_own_has_a_lane_under_its_profiles_digest() -> None:
    plan = planner().plan(forgetting(LATE, OWN))
    assert plan.lanes == (LanePlan("target", "0:"), LanePlan("own", f"0:71:{OWN.digest}9:assistant"))
    assert [(one.lane, one.borrows) for one in plan.streams] == [(0, True), (1, False)]
    assert plan.num_borrowing == 1


def test_state_of_its_own_needs_room_for_its_layers() -> None:
    assert planner(own_layers=3).plan(forgetting(OWN)).lanes
    with pytest.raises(ProfileError, match=r"in 3 layers; there is room for 2"):
        planner(own_layers=2).check(OWN)


def test_a_stream_without_adapter_or_model_would_say_what_the_base_says() -> None:
    with pytest.raises(ProfileError, match="'empty': stream 'assistant' has no adapter"):
        planner().check(version("empty", "1", stream(adapter=None)))


def test_a_separate_model_must_be_loaded_and_run_whole() -> None:
    with pytest.raises(ProfileError, match="not loaded"):
        planner().check(ELSEWHERE)
    with pytest.raises(ProfileMismatch, match="exits at layer 6; its model has 5"):
        planner(models={OTHER: SecondModel(FakeBank(), 5, 64)}).check(ELSEWHERE)


def test_a_separate_model_has_its_own_bank_lane_and_context() -> None:
    bank = FakeBank()
    adapted = version("adapted", "7", stream(fork=0, exit=6, kv="own", model=MODEL))
    ours = planner(models={OTHER: SecondModel(bank, 6, 64)}, defers_logits=True)
    plan = ours.plan(forgetting(LATE, ELSEWHERE, adapted))
    assert [one.model for one in plan.streams] == [None, OTHER, OTHER]
    assert [one.is_late for one in plan.streams] == [False] * 3
    assert plan.streams[1].seat is None
    assert [lane.pool for lane in plan.lanes] == ["target", OTHER, OTHER]
    assert plan.max_positions == 64
    assert bank.users == {f"{adapted.digest}/assistant": 1}
    assert ours.num_users == 2
    ours.release(plan)
    assert (ours.num_users, bank.total_users) == (0, 0)


@pytest.mark.parametrize(
    ("versions", "is_late"),
    [
        ((LATE,), True),
        ((LATE, version("again", "2", stream())), True),
        ((version("ulp", "3", stream(), rule=SUBTRACT),), True),
        ((version("ulp", "3", stream(), rule=SUBTRACT), LATE), False),
        ((version("ulp", "3", stream(), rule=SUBTRACT | {"filter": {"mode": "fused", "tau": 0.1}}),), False),
        ((version("bare", "4", stream(), rule=RELU | {"filter": {"mode": "none"}}),), False),
        ((PAIR,), False),
        (
            (
                version("plausible", "5", stream(), rule=RELU | {"filter": {"mode": "plausibility", "tau": 0.1}}),
                version("bare", "4", stream(), rule=RELU | {"filter": {"mode": "none"}}),
            ),
            True,
        ),
    ],
)  # fmt: skip
def test_logits_are_put_off_where_filters_leave_few_tokens(
    versions: tuple[ProfileVersion, ...], is_late: bool
) -> None:
    plan = planner(defers_logits=True).plan(forgetting(*versions))
    assert {one.is_late for one in plan.streams} == {is_late}
    assert {one.is_late for one in planner().plan(forgetting(*versions)).streams} == {False}


def test_no_room_that_others_will_give_back_is_overload() -> None:
    bank = FakeBank(full=PAIR.digest)
    ours = Planner(bank)
    held = ours.plan(forgetting(LATE))
    with pytest.raises(Overloaded):
        ours.plan(forgetting(LATE, PAIR))
    assert ours.num_users == 1
    ours.release(held)
    with pytest.raises(InvalidRequest, match="more memory than adapters may have"):
        ours.plan(forgetting(LATE, PAIR))
    assert ours.num_users == 0
