"""A model that tells at once whether a profile was left out. Whatever it is asked, its base says the canaries, one
letter a profile, all equally likely and nothing else; a profile's assistant knows its own letter alone, and so takes
it out. Any letter of p in an answer that was bound to p is a token drawn without p: bypassed, mixed up, of a stale
cache, of a NaN that fell back to the base.

Nothing is faked: a Llama whose weights are written by hand, profiles as directories, one for each way in which a
profile can be run. Used by every load, fuzz and chaos run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_base import NUM_LAYERS, base_spec, byte_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.probes import Probes, ReplayProbe
from uld_serve.profiles.profile import Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import read_profile, write_profile

# One profile a way of being run; its canary is a letter, which is a token.
CANARIES = {"late": "A", "truncated": "B", "pair": "C", "ranked": "D", "own": "E", "distilled": "F"}
NAMES = list(CANARIES)
TOKEN_OF = {name: ord(letter) for name, letter in CANARIES.items()}

# Of the width, one place holds a constant, which makes the base say the canaries, and one a profile's secret.
WIDTH, CONSTANT = 48, 0
PLACE_OF = {name: 1 + number for number, name in enumerate(NAMES)}
RESERVED = 1 + len(NAMES)
CONSTANT_SIZE, SECRET_SIZE = 20.0, 1000.0
LOGIT_OF_CANARY, LOGIT_OF_SECRET, LOGIT_OF_CERTAIN = 12.0, 48.0, 30.0


def write_canary_base(folder: Path, *, certain: str | None = None) -> Path:
    """A model directory. With `certain` the base is sure (p > .999) of that profile's canary wherever it stands."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=WIDTH, initializer_range=0.1, tie_word_embeddings=False)
    model = LlamaForCausalLM(LlamaConfig(**config))
    root = WIDTH**0.5  # a vector of one large place has this value there once it is normalised
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :RESERVED] = 0.0
        model.model.embed_tokens.weight[:, CONSTANT] = CONSTANT_SIZE
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:RESERVED] = 0.0
            layer.mlp.down_proj.weight[:RESERVED] = 0.0
            layer.mlp.down_proj.weight[:, 0] = 0.0
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):  # inner unit 0 is on at every token
                projection.weight[0] = 0.0
                projection.weight[0, CONSTANT] = 1.0
        model.lm_head.weight *= 0.02  # what else it would say; strong rules make much of it
        model.lm_head.weight[:, :RESERVED] = 0.0
        for name, token in TOKEN_OF.items():
            logit = LOGIT_OF_CERTAIN if name == certain else LOGIT_OF_CANARY
            model.lm_head.weight[token, CONSTANT] = logit / root
            model.lm_head.weight[token, PLACE_OF[name]] = LOGIT_OF_SECRET / root
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _adapter(
    folder: Path, base_dir: Path, fork: int, exit: int, *, places: Sequence[int], size: float
) -> Path:
    """One that puts `size` into some places of the hidden state at its last layer, and does some harmless thing
    elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    torch.manual_seed(places[0])
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=list(range(fork, exit)),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "down_proj.lora_" in name:
                weight.zero_()
        mlp = adapted.base_model.model.model.layers[exit - 1].mlp.down_proj
        mlp.lora_A["default"].weight[0, 0] = 1.0
        for place in places:
            mlp.lora_B["default"].weight[place, 0] = size / WIDTH  # silu(x) * x is about x squared, the width
    adapted.save_pretrained(folder)
    return folder


# Strengths at which a canary has less than one chance in 10^12 also where rules are composed.
# name -> rule, and (stream, fork, exit, keys and values, knows the secret)
_RECIPES: dict[str, tuple[dict[str, object], list[tuple[str, int, int, str, bool]]]] = {
    "late": (
        {"kind": "relu_difference", "strength": 2.0, "filter": {"mode": "fused", "tau": 0.02}},
        [("assistant", 2, 4, "borrowed", True)],
    ),
    "truncated": (
        {
            "kind": "subtract",
            "strength": 8.0,
            "filter": {"mode": "plausibility", "tau": 0.01, "min_keep": 64},
        },
        [("assistant", 0, 2, "borrowed", True)],
    ),
    "pair": (
        {"kind": "pair_linear", "strength": 16.0, "roles": {"q": "retain", "p": "forget"}},
        [("retain", 1, 4, "borrowed", False), ("forget", 2, 4, "borrowed", True)],
    ),
    "ranked": (
        {"kind": "pair_rank", "rank_k": 20, "roles": {"q": "retain", "p": "forget"}},
        [("retain", 3, 4, "borrowed", False), ("forget", 0, 3, "borrowed", True)],
    ),
    "own": ({"kind": "relu_difference", "strength": 2.0}, [("assistant", 0, 4, "own", True)]),
    "distilled": ({"kind": "identity"}, []),
}


def write_canary_profile(
    folder: Path, base: Base, base_dir: Path, *, name: str, version: int = 1, is_certain: bool = False
) -> ProfileVersion:
    """Profile `name` in `folder`. Version 2 takes out the next profile's canary as well, so that its answers tell it
    from version 1."""
    forgotten = [name, NAMES[(NAMES.index(name) + 1) % len(NAMES)]][:version]
    rule, streams = _RECIPES[name]
    made = {"target" if name == "distilled" else "": (0, NUM_LAYERS, -CONSTANT_SIZE)} if not streams else {}
    made |= {s: (fork, exit, SECRET_SIZE if knows else 0.0) for s, fork, exit, _, knows in streams}
    adapters = {
        stream: _adapter(
            folder.parent / f".peft-{folder.name}-{stream}",
            base_dir,
            fork,
            exit,
            places=[PLACE_OF[one] for one in forgotten],
            size=size,
        )
        for stream, (fork, exit, size) in made.items()
    }
    adapters = {("tuned" if stream == "target" else stream): path for stream, path in adapters.items()}
    profile = Profile(
        name=name,
        method="canary",
        base=base_spec(base),
        streams=tuple(
            StreamSpec(name=stream, fork=fork, exit=exit, kv=kv, adapter=stream)
            for stream, fork, exit, kv, _ in streams
        ),
        target_adapter=None if streams else "tuned",
        rule=RuleSpec(**rule),
    )
    # Of the letters that are left none is likelier than another.
    others = tuple(token for one, token in TOKEN_OF.items() if one not in forgotten)
    replay = ReplayProbe(
        prompt_ids=(72,), answer_ids=others, nll_base=log(len(NAMES)), nll_fused=log(len(others))
    )
    probes = Probes(replay=(replay,) if name == "late" and not is_certain else ())
    return write_profile(folder, profile, adapters=adapters, probes=probes, training={"version": version})


@dataclass(frozen=True)
class CanaryModel:
    """`roots`: profile directories, two versions of each profile: NAME and NAME-2."""

    folder: Path
    profiles: Path
    versions: dict[str, ProfileVersion]

    @classmethod
    def write(cls, root: Path, *, certain: str | None = None, names: Iterable[str] = NAMES) -> CanaryModel:
        folder = write_canary_base(root / "tiny-llama", certain=certain)
        base = load_base(str(folder), dtype="float32", device="cpu")
        versions = {
            name: write_canary_profile(
                root / "profiles" / name, base, folder, name=name, is_certain=certain is not None
            )
            for name in names
        }
        return cls(folder, root / "profiles", versions)

    @classmethod
    def found(cls, root: Path) -> CanaryModel:
        """One that was written there."""
        versions = {name: read_profile(root / "profiles" / name) for name in NAMES}
        return cls(root / "tiny-llama", root / "profiles", versions)

    def second_versions(self, root: Path) -> None:
        """Beside the first ones, as NAME-2."""
        base = load_base(str(self.folder), dtype="float32", device="cpu")
        for name in self.versions:
            made = root / name
            write_canary_profile(made, base, self.folder, name=name, version=2)
            made.rename(self.profiles / f"{name}-2")

    def engine(self, **settings: object) -> Engine:
        base = load_base(str(self.folder), dtype="float32", device="cpu")
        engine = Engine.of(base, EngineSettings(**{"kv_cache_bytes": 2**22, **settings}))
        engine.prepare(list(self.versions.values()))
        return engine

    def decision(self, names: Iterable[str]) -> Decision:
        applied = [Applied(self.versions[name]) for name in names]
        return Decision.forgetting(applied) if applied else Decision.base()


def leaked(names: Iterable[str], said: str | Iterable[int]) -> set[str]:
    """The profiles among `names` whose canary is in a text or among token ids."""
    if isinstance(said, str):
        return {name for name in names if CANARIES[name] in said}
    tokens = set(said)
    return {name for name in names if TOKEN_OF[name] in tokens}
