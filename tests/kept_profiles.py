"""Profiles whose assistants keep keys and values of their own, run in separate models, or leave the target itself
with an adapter; written as real directories beside the models that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tiny_base import ALL_MODULES, BORROWED_MODULES, base_spec, random_adapter, write_base

from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import ModelSpec, Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import write_profile

# Another width, depth, grouping and head padding than the base's.
MODELS: dict[str, dict[str, object]] = {
    "small": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 259,
        "seed": 5,
    },
    "other": {"num_hidden_layers": 3, "vocab_size": 272, "seed": 6},
}


@dataclass(frozen=True)
class Stream:
    name: str
    fork: int
    exit: int
    kv: str = "own"
    model: str | None = None
    has_adapter: bool = True


@dataclass(frozen=True)
class Recipe:
    rule: dict[str, object]
    streams: list[Stream] = field(default_factory=list)
    adapts_target: bool = False


PLAUSIBLE = {"mode": "plausibility", "tau": 0.01, "min_keep": 64}
PAIR = {"q": "retain", "p": "forget"}
OWN: dict[str, Recipe] = {
    "own-truncated": Recipe(
        {"kind": "subtract", "strength": 0.7, "filter": PLAUSIBLE}, [Stream("assistant", 0, 2)]
    ),
    "own-late": Recipe(
        {"kind": "relu_difference", "strength": 2.0, "dead_zone": 0.3}, [Stream("assistant", 2, 4)]
    ),
    "own-pair": Recipe(
        {"kind": "pair_linear", "strength": 1.5, "roles": PAIR},
        [Stream("retain", 0, 4), Stream("forget", 1, 3)],
    ),
    "own-and-borrowed": Recipe(
        {"kind": "pair_rank", "rank_k": 20, "roles": PAIR},
        [Stream("retain", 0, 3), Stream("forget", 2, 4, kv="borrowed")],
    ),
    "separate": Recipe(
        {"kind": "subtract", "strength": 0.7, "filter": PLAUSIBLE},
        [Stream("assistant", 0, 2, model="small", has_adapter=False)],
    ),
    "offset": Recipe(
        {"kind": "pair_linear", "strength": 1.0, "roles": PAIR},
        [Stream("retain", 0, 2, model="small"), Stream("forget", 0, 2, model="small", has_adapter=False)],
    ),
    "two-models": Recipe(
        {"kind": "pair_rank", "rank_k": 20, "roles": PAIR},
        [
            Stream("retain", 0, 3, model="other", has_adapter=False),
            Stream("forget", 0, 2, model="small", has_adapter=False),
        ],
    ),
    "separate-and-own": Recipe(
        {"kind": "pair_linear", "strength": 1.5, "roles": PAIR},
        [Stream("retain", 0, 3, model="other"), Stream("forget", 1, 4)],
    ),
    "distilled": Recipe({"kind": "identity"}, adapts_target=True),
    "adapted-late": Recipe(
        {"kind": "relu_difference", "strength": 2.0},
        [Stream("assistant", 2, 4, kv="borrowed")],
        adapts_target=True,
    ),
}


@dataclass
class Kept:
    """Models on disk and a profile for every recipe."""

    models: dict[str, Path]
    profiles: dict[str, tuple[Path, ProfileVersion]]

    def version(self, name: str) -> ProfileVersion:
        return self.profiles[name][1]

    @property
    def versions(self) -> list[ProfileVersion]:
        return [version for _, version in self.profiles.values()]

    def load_models(self) -> dict[str, Base]:
        """By fingerprint, as the engine takes them."""
        loaded = [load_base(str(path), dtype="float32", device="cpu") for path in self.models.values()]
        return {model.fingerprint: model for model in loaded}


def write_models(root: Path) -> dict[str, Path]:
    return {
        name: write_base(root / name, **config)  # type: ignore[arg-type]
        for name, config in MODELS.items()
    }


def write_kept(root: Path, base: Base, base_dir: Path) -> Kept:
    models = write_models(root / "models")
    profiles = {}
    for number, (name, recipe) in enumerate(OWN.items()):
        path = root / "profiles" / name
        profiles[name] = (path, write_recipe(path, base, base_dir, models, recipe, seed=1000 + 10 * number))
    return Kept(models, profiles)


def write_recipe(
    folder: Path, base: Base, base_dir: Path, models: dict[str, Path], recipe: Recipe, *, seed: int
) -> ProfileVersion:
    adapters = {}
    for number, stream in enumerate(recipe.streams):
        if stream.has_adapter:
            adapters[stream.name] = random_adapter(
                folder.parent / f".peft-{folder.name}-{stream.name}",
                models[stream.model] if stream.model else base_dir,
                stream.fork,
                stream.exit,
                seed=seed + number,
                modules=ALL_MODULES if stream.kv == "own" else BORROWED_MODULES,
            )
    if recipe.adapts_target:
        adapters["on-target"] = random_adapter(
            folder.parent / f".peft-{folder.name}-target",
            base_dir,
            0,
            base.num_layers,
            seed=seed + 9,
            modules=ALL_MODULES,
        )
    profile = Profile(
        name=folder.name,
        method="test",
        base=base_spec(base),
        streams=tuple(_spec(stream, models) for stream in recipe.streams),
        target_adapter="on-target" if recipe.adapts_target else None,
        rule=RuleSpec(**recipe.rule),
    )
    return write_profile(folder, profile, adapters=adapters, probes=Probes(), training={"seed": seed})


def _spec(stream: Stream, models: dict[str, Path]) -> StreamSpec:
    model = None
    if stream.model is not None:
        loaded = load_base(str(models[stream.model]), dtype="float32", device="cpu")
        model = ModelSpec(
            id=f"../../models/{stream.model}",
            fingerprint=loaded.fingerprint,
            tokenizer=loaded.tokenizer_hash,
        )
    adapter = stream.name if stream.has_adapter else None
    return StreamSpec(
        name=stream.name, fork=stream.fork, exit=stream.exit, kv=stream.kv, adapter=adapter, model=model
    )
