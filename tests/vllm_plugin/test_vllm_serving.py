"""The plugin inside vLLM, beside our own engine. `make vllm-test` makes the environment that VLLM_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from kept_profiles import write_kept
from tiny_base import RULES, Tiny, write_base, write_tiny_profile

from uld_serve.llm import LLM, SamplingParams
from uld_serve.model.loading import embedded_model_dir, load_base
from uld_serve.profiles.registry import BUILTIN
from uld_serve.vllm_plugin.orders import Orders, ServerArguments

PYTHON = os.environ.get("VLLM_PYTHON")
PROFILE = "harry-potter"
NUM_TOKENS = 24
# As for our own engine's replays at load, in nats: bfloat16 rounds otherwise in another engine.
REPLAY_TOLERANCE_NATS = 0.15

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM; run `make vllm-test`"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny base with heads as wide as vLLM's attention asks for on a CPU."""
    root = tmp_path_factory.mktemp("wide")
    folder = write_base(root / "wide-llama", hidden_size=64, intermediate_size=96, head_dim=32)
    base = load_base(str(folder), dtype="float32", device="cpu")
    profiles = {}
    for seed, (name, (rule, streams)) in enumerate(RULES.items()):
        path = root / "profiles" / name
        version = write_tiny_profile(path, base, folder, rule=rule, streams=streams, seed=10 * seed)
        profiles[name] = (path, version)
    profiles |= write_kept(root / "kept", base, folder).profiles
    return Tiny(folder, base, profiles)


def ask(tmp_path: Path, job: dict[str, object]) -> subprocess.CompletedProcess[str]:
    assert PYTHON is not None
    script = Path(__file__).parent / "vllm_answers.py"
    done = subprocess.run(
        [PYTHON, str(script)],
        input=json.dumps({**job, "out": str(tmp_path / "answers.json")}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ULD_SERVE_CACHE": str(embedded_model_dir().parent)},
    )
    return done


def answers(tmp_path: Path, job: dict[str, object]) -> list[dict[str, object]]:
    done = ask(tmp_path, job)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: list[dict[str, object]] = json.loads((tmp_path / "answers.json").read_text())
    return found


@pytest.mark.model
def test_fifty_greedy_answers_are_those_of_our_engine(tmp_path: Path) -> None:
    # Both in float32: in bfloat16 two engines round differently, and near ties fall either way.
    llm = LLM(dtype="float32")
    probes = llm.registry.get(PROFILE).probes
    asked = [*probes.forget[:25], *probes.retain[:25]]
    prompts = [llm.tokenizer.encode_chat([m.model_dump() for m in one.messages]) for one in asked]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    ours = [one.token_ids for one in llm.generate(prompts, params, profile=PROFILE)]
    base = [one.token_ids for one in llm.generate(prompts, params)]
    job = {
        "model": None,
        "orders": {"profiles": [PROFILE]},
        "engine": {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8},
        "prompts": prompts,
        "params": [{"max_tokens": NUM_TOKENS}] * len(prompts),
    }
    theirs = [tuple(one["token_ids"]) for one in answers(tmp_path, job)]
    assert theirs == ours
    assert sum(one != other for one, other in zip(ours, base, strict=True)) >= 20


@pytest.mark.model
def test_replay_probes_score_as_training_recorded(tmp_path: Path) -> None:
    # In bfloat16, as a server runs. Prompt log-probabilities are of fused scores.
    registry_dir = BUILTIN / PROFILE
    probes = json.loads((registry_dir / "probes.json").read_text())["replay"]
    job = {
        "model": None,
        "orders": {"profiles": [PROFILE]},
        "engine": {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 8},
        "prompts": [probe["prompt_ids"] + probe["answer_ids"] for probe in probes],
        "params": [{"max_tokens": 1, "prompt_logprobs": 0}] * len(probes),
    }
    for probe, answer in zip(probes, answers(tmp_path, job), strict=True):
        first = len(probe["prompt_ids"])
        scored = list(zip(probe["answer_ids"], answer["prompt_logprobs"][first:], strict=True))
        nll = -sum(entry[str(token)] for token, entry in scored) / len(scored)
        assert abs(nll - probe["nll_fused"]) <= max(REPLAY_TOLERANCE_NATS, 0.05 * probe["nll_fused"])


@pytest.mark.parametrize(
    "names",
    [
        ("late-fork", "all-layers"),
        ("pair",),
        ("ranked",),
        # An assistant with keys and values of its own, one that leaves early, and an adapter on the target.
        ("own-and-borrowed", "truncated", "adapted-late"),
    ],
    ids="+".join,
)
def test_every_rule_and_composition_gives_our_tokens(
    wide: Tiny, tmp_path: Path, names: tuple[str, ...]
) -> None:
    roots = [wide.profiles[name][0] for name in names]
    llm = LLM(str(wide.folder), profiles=roots, dtype="float32")
    prompts = [[256, 5 + number, 77, 130, 9 + number, 201] for number in range(6)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    ours = [one.token_ids for one in llm.generate(prompts, params, profile=list(names))]
    job = {
        "model": str(wide.folder),
        "orders": {"profiles": names, "directories": [str(root) for root in roots]},
        "engine": {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4},
        "prompts": prompts,
        "params": [{"max_tokens": 12, "ignore_eos": True}] * len(prompts),
    }
    assert [tuple(one["token_ids"]) for one in answers(tmp_path, job)] == ours


def test_vllm_does_not_start_without_orders_or_with_a_profile_that_changed(
    wide: Tiny, tmp_path: Path
) -> None:
    words = ServerArguments.of(
        str(wide.folder), Orders(profiles=("late-fork",), directories=(str(wide.profiles["late-fork"][0]),))
    ).keywords
    job = {"words": {**words, "additional_config": {}}}
    for told in (job, {"words": _pinned_to_another(words)}):
        done = ask(tmp_path, told)
        assert done.returncode != 0
        assert not (tmp_path / "answers.json").exists()
        said = done.stdout + done.stderr
        assert "was given none" in said or "on disk" in said


def _pinned_to_another(words: dict[str, object]) -> dict[str, object]:
    text = json.dumps(words["additional_config"])
    (ref,) = json.loads(text)["uld_serve"]["profiles"]
    return {**words, "additional_config": json.loads(text.replace(ref, "late-fork@000000000000"))}
