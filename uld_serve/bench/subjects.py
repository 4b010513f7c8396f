"""From options to the variants that are timed: the base, the profiles, one engine a mode. Called by decode and
prefill. Knows no clock and no report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from uld_serve.assembly import facts_of
from uld_serve.bench.naive import naive_engine, naive_version, shared_copy
from uld_serve.bench.random_profiles import STRENGTHS, AdapterShape, random_profile
from uld_serve.bench.shapes import SHAPES, random_base
from uld_serve.bench.variant import MODE_HELP, MODES, Mode, Variant
from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.errors import InvalidRequest
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import BUILTIN, Registry, check_base

DEFAULT_PROFILE = "harry-potter"
DEFAULT_LAYERS, DEFAULT_RANK = 8, 16
BLOCK_SIZE = 16
SPARE_BLOCKS = 8


def add_options(parser: argparse.ArgumentParser, *, modes: Sequence[Mode]) -> None:
    """The options of `Subjects.of`."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", metavar="ID_OR_PATH", help="default: the embedded one")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    what.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    what.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    what.add_argument("--modes", nargs="+", choices=MODES, default=list(modes), help=MODE_HELP)
    profile = parser.add_argument_group("with which profile")
    profile.add_argument("--profile", metavar="NAME", help=f"default: {DEFAULT_PROFILE}")
    profile.add_argument("--profiles", type=Path, metavar="DIR", help="default: the built-in ones")
    profile.add_argument(
        "--assistant-layers",
        type=int,
        metavar="K",
        help=f"a random adapter on K layers instead (default with --shape, or for many: {DEFAULT_LAYERS}); "
        "with a profile, only the layers of naive's model",
    )
    profile.add_argument(
        "--fork", type=int, metavar="LAYER", help="where it forks (default: K before the end)"
    )
    profile.add_argument("--rank", type=int, help=f"of the random adapter (default: {DEFAULT_RANK})")
    profile.add_argument("--rule", choices=STRENGTHS, help="default: relu_difference")
    profile.add_argument("--kv", choices=("borrowed", "own"), help="default: borrowed")
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
    description: dict[str, str | int | list[str]]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Subjects:
        """Raises InvalidRequest for options that do not go together, ProfileError, ModelUnsupported."""
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        modes = _modes(args)
        base = _base(args)
        versions = _versions(args, base, modes)
        stream = versions[0].profile.streams[0]
        naive_layers = args.assistant_layers or stream.exit - stream.fork
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
                "fork": stream.fork,
                "exit": stream.exit,
                "kv": stream.kv,
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
        base, decisions = shared_copy(self.base), self._decisions(mode)
        if mode == "naive":
            return Variant(mode, naive_engine(base, settings, num_layers=self.naive_layers), decisions)
        return Variant(mode, Engine.of(base, settings), decisions)

    def _decisions(self, mode: Mode) -> tuple[Decision, ...]:
        one = Decision.of_version(self.versions[0])
        if mode == "plain":
            return (Decision.base(),)
        if mode == "naive":
            return (Decision.of_version(naive_version(self.versions[0], num_layers=self.naive_layers)),)
        if mode == "mixed":
            return (one, Decision.base())
        if mode == "many":
            return tuple(Decision.of_version(version) for version in self.versions)
        return (one,)

    def settings(self, batch: int, tokens: int) -> EngineSettings:
        """An engine with room for `batch` requests of `tokens` tokens and no more."""
        limit = int(self.base.model.config.get_text_config().max_position_embeddings)
        if tokens > limit:
            raise InvalidRequest(f"{tokens} tokens a request; {self.base.id} has {limit} positions")
        blocks = batch * -(-tokens // BLOCK_SIZE) + SPARE_BLOCKS
        return EngineSettings(
            kv_cache_bytes=blocks * BLOCK_SIZE * self.kv_bytes_per_token,
            block_size=BLOCK_SIZE,
            max_num_seqs=max(batch, 64),
            # A prompt that is in the cache has up to a block of tokens left to run; see Variant.fill.
            max_step_rows=max((BLOCK_SIZE + 2) * batch, 512),
            max_waiting=max(batch, 256),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.base.model.config.get_text_config()
        heads = config.num_attention_heads
        return KVCache.bytes_per_token(
            self.base.num_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.base.dtype,
        )

    @property
    def weight_bytes(self) -> int:
        """What a step must read of the weights at least: all but an embedding that is not the head too."""
        model = self.base.model
        total = sum(parameter.nbytes for parameter in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return int(total if embedding is head else total - embedding.nbytes)

    def floor_s(self, batch: int, context: int, *, bytes_per_s: float) -> float:
        """Seconds that reading weights and KV once takes: what a plain step cannot beat."""
        return (self.weight_bytes + batch * context * self.kv_bytes_per_token) / bytes_per_s


def _modes(args: argparse.Namespace) -> tuple[Mode, ...]:
    chosen = set(args.modes) | ({"many"} if args.profiles_in_batch is not None else set())
    return tuple(mode for mode in MODES if mode in chosen)


def _base(args: argparse.Namespace) -> Base:
    if args.shape is None:
        return load_base(args.model, dtype=args.dtype, device=args.device)
    if args.model is not None:
        raise InvalidRequest("--shape and --model exclude each other")
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return random_base(args.shape, dtype=args.dtype, device=torch.device(name))


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
    layers = min(DEFAULT_LAYERS, base.num_layers) if args.assistant_layers is None else args.assistant_layers
    fork = base.num_layers - layers if args.fork is None else args.fork
    shape = AdapterShape(
        fork=fork,
        exit=fork + layers,
        rank=DEFAULT_RANK if args.rank is None else args.rank,
        kv=args.kv or "borrowed",
        rule=args.rule or "relu_difference",
    )
    return tuple(random_profile(base, shape, number) for number in range(count))
