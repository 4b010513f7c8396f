"""From options to the variants that are timed: the base, the profiles, one engine a mode. Called by decode and
prefill. Knows no clock and no report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_serve.assembly import facts_of
from uld_serve.bench.naive import naive_engine, naive_version, shared_copy
from uld_serve.bench.random_profiles import AdapterShape, random_profile
from uld_serve.bench.target import (
    add_random_options,
    add_target_options,
    kv_bytes_per_token,
    random_shape,
    room_for,
    target_of,
)
from uld_serve.bench.variant import MODE_HELP, MODES, Mode, Variant
from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import Base
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import BUILTIN, Registry, check_base

DEFAULT_PROFILE = "harry-potter"


def add_options(parser: argparse.ArgumentParser, *, modes: Sequence[Mode]) -> None:
    """The options of `Subjects.of`."""
    what = add_target_options(parser)
    what.add_argument("--modes", nargs="+", choices=MODES, default=list(modes), help=MODE_HELP)
    profile = parser.add_argument_group("with which profile")
    profile.add_argument("--profile", metavar="NAME", help=f"default: {DEFAULT_PROFILE}")
    profile.add_argument("--profiles", type=Path, metavar="DIR", help="default: the built-in ones")
    add_random_options(profile, "instead (with a profile, K is only naive's number of layers)")
    profile.add_argument(
        "--profiles-in-batch",
        type=int,
        metavar="P",
        help="adds mode many with P random profiles (default: 32)",
    )


@dataclass(frozen=True, slots=True)
class Subjects:
    """What a run measures. `description` is for its record."""

    base: Base
    modes: tuple[Mode, ...]
    versions: tuple[ProfileVersion, ...]
    naive_layers: int
    description: dict[str, str | int | list[str] | None]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Subjects:
        """Raises InvalidRequest for options that do not go together, ProfileError, ModelUnsupported."""
        modes = _modes(args)
        base = target_of(args)
        versions = _versions(args, base, modes)
        # A profile that is only an adapter on the target itself has none.
        stream = next(iter(versions[0].profile.streams), None)
        if stream is None and (beside := set(modes) & {"naive", "all-layers", "own-kv"}):
            raise InvalidRequest(
                f"'{versions[0].name}' has no assistant to vary; leave {', '.join(sorted(beside))} out of --modes"
            )
        naive_layers = args.assistant_layers or (
            base.num_layers if stream is None else stream.exit - stream.fork
        )
        if not 0 < naive_layers <= base.num_layers:
            raise InvalidRequest(f"--assistant-layers must be 1 to {base.num_layers}, not {naive_layers}")
        adapter = next(iter(versions[0].adapters.values()))
        return cls(
            base=base,
            modes=modes,
            versions=versions,
            naive_layers=naive_layers,
            description={
                "model": base.id,
                "dtype": str(base.dtype).removeprefix("torch."),
                "profile": versions[0].ref,
                "profiles_in_batch": len(versions),
                "fork": None if stream is None else stream.fork,
                "exit": None if stream is None else stream.exit,
                "kv": None if stream is None else stream.kv,
                "rank": adapter.rank,
                "modules": list(adapter.modules),
                "rule": versions[0].profile.rule.kind,
                "filter": versions[0].profile.rule.filter.mode,
                "naive_layers": naive_layers,
            },
        )

    def variant(self, mode: Mode, settings: EngineSettings) -> Variant:
        """An engine of its own, so that none pays for another's adapters. Weights are shared where the engine
        does not lay them out anew."""
        base, num_bytes = shared_copy(self.base), kv_bytes_per_token(self.base)
        if mode == "naive":
            engine = naive_engine(base, settings, num_layers=self.naive_layers)
            num_bytes += num_bytes // self.base.num_layers * self.naive_layers
        else:
            engine = Engine.of(base, settings)
        decisions = self._decisions(mode)
        engine.prepare([applied.version for decision in decisions for applied in decision.applied])
        return Variant(mode, engine, decisions, num_bytes)

    def _decisions(self, mode: Mode) -> tuple[Decision, ...]:
        one = Decision.of_version(self.versions[0])
        if mode in ("all-layers", "own-kv"):
            return (Decision.of_version(self._relative(mode)),)
        if mode in ("plain", "crowded"):
            return (Decision.base(),)
        if mode == "naive":
            return (Decision.of_version(naive_version(self.versions[0], num_layers=self.naive_layers)),)
        if mode == "mixed":
            return (one, Decision.base())
        if mode == "many":
            return tuple(Decision.of_version(version) for version in self.versions)
        return (one,)

    def _relative(self, mode: Mode) -> ProfileVersion:
        """A random profile that differs from unlearned's in one thing: the layers, or whose keys and values."""
        profile, adapter = self.versions[0].profile, next(iter(self.versions[0].adapters.values()))
        stream = profile.streams[0]
        is_all = mode == "all-layers"
        shape = AdapterShape(
            fork=0 if is_all else stream.fork,
            exit=self.base.num_layers if is_all else stream.exit,
            rank=adapter.rank,
            kv=stream.kv if is_all else "own",
            rule="subtract" if profile.rule.kind == "subtract" else "relu_difference",
        )
        return random_profile(self.base, shape, 0)

    def settings(self, batch: int, tokens: int) -> EngineSettings:
        """An engine with room for `batch` requests of `tokens` tokens and no more."""
        return room_for(self.base, batch, tokens)

    @property
    def weight_bytes(self) -> int:
        """What a step must read of the weights at least: all but an embedding that is not the head too."""
        model = self.base.model
        total = sum(parameter.nbytes for parameter in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return int(total if embedding is head else total - embedding.nbytes)

    def floor_s(self, batch: int, context: int, *, bytes_per_s: float) -> float:
        """Seconds that reading weights and KV once takes: what a plain step cannot beat."""
        return (self.weight_bytes + batch * context * kv_bytes_per_token(self.base)) / bytes_per_s


def _modes(args: argparse.Namespace) -> tuple[Mode, ...]:
    chosen = set(args.modes) | ({"many"} if args.profiles_in_batch is not None else set())
    return tuple(mode for mode in MODES if mode in chosen)


def _versions(args: argparse.Namespace, base: Base, modes: Sequence[Mode]) -> tuple[ProfileVersion, ...]:
    """The one profile, or as many random ones as mode many needs."""
    count = (32 if args.profiles_in_batch is None else args.profiles_in_batch) if "many" in modes else 1
    if count < 1:
        raise InvalidRequest("--profiles-in-batch must be at least 1")
    wants_named = args.profile is not None or args.profiles is not None
    random_options = (args.fork, args.rank, args.rule, args.kv)
    is_random = args.shape is not None or count > 1 or any(one is not None for one in random_options)
    is_random = is_random or (args.assistant_layers is not None and not wants_named)
    if is_random and wants_named:
        raise InvalidRequest(
            "--profile names one profile; --shape, --fork, --rank, --rule, --kv and mode many make random ones"
        )
    if not is_random:
        version = Registry.load_all(args.profiles or BUILTIN).get(args.profile or DEFAULT_PROFILE)
        check_base(version, facts_of(base))
        return (version,)
    shape = random_shape(args, base)
    return tuple(random_profile(base, shape, number) for number in range(count))
