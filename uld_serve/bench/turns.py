"""`uld-serve bench turns`: conversations whose profile changes with every turn beside ones whose profile never does:
how much of each prompt comes from the prefix cache, and the time to each answer's first token. Called by command."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from uld_serve.bench.environment import Environment
from uld_serve.bench.naive import shared_copy
from uld_serve.bench.random_profiles import random_profile
from uld_serve.bench.report import Json, Reporter
from uld_serve.bench.target import add_random_options, add_target_options, random_shape, room_for, target_of
from uld_serve.bench.timing import Quartiles, synchronize
from uld_serve.bench.variant import random_prompts
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import Base
from uld_serve.profiles.profile import ProfileVersion

Habit = Literal["plain", "constant", "switching"]
HABITS: tuple[Habit, ...] = get_args(Habit)
SUMMARY = "conversations that switch profile every turn beside ones that never do: cached tokens, first token"
COLUMNS = ("turn", "profile", "prompt tokens", "cached", "ms to first token", "quartiles", "x constant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_options(parser)
    add_random_options(parser.add_argument_group("with which profiles"), "each")
    how = parser.add_argument_group("how")
    how.add_argument("--turns", type=int, default=8)
    how.add_argument("--turn-tokens", type=int, default=64, help="new tokens in each question")
    how.add_argument("--answer-tokens", type=int, default=32)
    how.add_argument("--profiles", type=int, default=4, metavar="P", help="to switch among")
    how.add_argument("--repeats", type=int, default=5, help="conversations of each kind")
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request found and how long its first token took."""

    num_prompt: int
    num_cached: int
    first_token_s: float


@dataclass(slots=True)
class Conversation:
    """`decisions` are taken in turn; the history is what was asked and answered so far."""

    engine: Engine
    decisions: Sequence[Decision]
    history: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: Sequence[int], params: SamplingParams) -> None:
        """One request with the whole history, to its end. Raises its error."""
        self.history += question
        decision = self.decisions[len(self.turns) % len(self.decisions)]
        device = self.engine.sampler.device
        synchronize(device)
        began, first_s, answer = time.perf_counter(), None, list[int]()
        self.engine.add("turn", list(self.history), params, decision)
        while self.engine.has_work:
            for delta in self.engine.step():
                if delta.error is not None:
                    raise delta.error
                if delta.token_ids and first_s is None:
                    first_s = time.perf_counter() - began
                answer += delta.token_ids
                usage = delta.usage
        assert first_s is not None
        assert usage is not None, "the last delta of a request has its usage"
        self.turns.append(Turn(usage.prompt_tokens, usage.cached_tokens, first_s))
        self.history += answer


def run(args: argparse.Namespace) -> int:
    for name in ("turns", "turn_tokens", "answer_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be at least 1")
    if args.profiles < 2:
        raise InvalidRequest("--profiles must be at least 2: there is nothing to switch between")
    base, reporter = target_of(args), Reporter(as_json=args.json)
    environment = Environment.look(base.device)
    reporter.begin(environment)
    shape = random_shape(args, base)
    versions = [random_profile(base, shape, number) for number in range(args.profiles)]
    decisions = [Decision.of_version(version) for version in versions]
    kinds: dict[Habit, Sequence[Decision]] = {
        "plain": [Decision.base()],
        "constant": decisions[:1],
        "switching": decisions,
    }
    with reporter.progress("conversations", args.repeats) as advance:
        found = _measure(base, versions, kinds, args, advance)
    results = _results(found, args)
    is_equal = _cached(found, "switching") == _cached(found, "constant")
    reporter.table(f"{args.turns} turns on {base.id}", COLUMNS, map(_row, results))
    reporter.console.print(
        "switching finds as many tokens in the cache as constant does, in every turn"
        if is_equal
        else "switching finds other numbers of tokens in the cache than constant does"
    )
    names = ("turns", "turn_tokens", "answer_tokens", "profiles", "repeats")
    reporter.end(
        {
            "results": results,
            "cached_tokens_equal": is_equal,
            "settings": {
                "model": base.id,
                "kv": shape.kv,
                "fork": shape.fork,
                "exit": shape.exit,
                **{name: getattr(args, name) for name in names},
            },
            "environment": environment.record(),
        }
    )
    return 0


def _measure(
    base: Base,
    versions: Sequence[ProfileVersion],
    kinds: dict[Habit, Sequence[Decision]],
    args: argparse.Namespace,
    advance: Callable[[], None],
) -> dict[Habit, list[list[Turn]]]:
    """The turns of every conversation. One untimed conversation first loads every profile's adapter."""
    tokens = args.turns * (args.turn_tokens + args.answer_tokens)
    # Room for the last conversation's blocks beside this one's, so that no cached block is lost within one.
    settings = room_for(base, 2, tokens)
    engines = {habit: Engine.of(shared_copy(base), settings) for habit in HABITS}
    for engine in engines.values():
        engine.prepare(versions)
    params = SamplingParams(max_tokens=args.answer_tokens, ignore_eos=True, temperature=0.0, seed=0)
    found: dict[Habit, list[list[Turn]]] = {habit: [] for habit in HABITS}
    for repeat in range(args.repeats + 1):
        talks = {habit: Conversation(engines[habit], kinds[habit]) for habit in HABITS}
        num_turns = args.turns if repeat else max(2, args.profiles)
        questions = random_prompts(
            num_turns, args.turn_tokens if repeat else 4, vocab_size=base.vocab_size, seed=repeat
        )
        for number, question in enumerate(questions):
            start = (repeat + number) % len(HABITS)
            for habit in HABITS[start:] + HABITS[:start]:
                talks[habit].ask(question, params)
        if repeat:
            for habit in HABITS:
                found[habit].append(talks[habit].turns)
            advance()
    return found


def _cached(found: dict[Habit, list[list[Turn]]], habit: Habit) -> list[list[int]]:
    return [[turn.num_cached for turn in turns] for turns in found[habit]]


def _results(found: dict[Habit, list[list[Turn]]], args: argparse.Namespace) -> list[dict[str, Json]]:
    results: list[dict[str, Json]] = []
    for number in range(args.turns):
        own = {habit: [turns[number] for turns in found[habit]] for habit in HABITS}
        times = {habit: Quartiles.of_seconds([one.first_token_s for one in own[habit]]) for habit in HABITS}
        for habit in HABITS:
            results.append(
                {
                    "turn": number + 1,
                    "mode": habit,
                    "prompt_tokens": own[habit][0].num_prompt,
                    "cached_tokens": sorted({one.num_cached for one in own[habit]}),
                    "ttft_ms_median": round(times[habit].median, 3),
                    "ttft_ms_quartiles": [round(times[habit].lower, 3), round(times[habit].upper, 3)],
                    "over_constant": round(times[habit].median / times["constant"].median, 4),
                }
            )
    return results


def _row(result: dict[str, Json]) -> list[str]:
    cached, quartiles = result["cached_tokens"], result["ttft_ms_quartiles"]
    assert isinstance(cached, list)
    assert isinstance(quartiles, list)
    return [
        str(result["turn"]),
        str(result["mode"]),
        str(result["prompt_tokens"]),
        "-".join(map(str, cached)),
        f"{result['ttft_ms_median']:.1f}",
        f"{quartiles[0]:.1f}-{quartiles[1]:.1f}",
        f"{result['over_constant']:.3f}",
    ]
