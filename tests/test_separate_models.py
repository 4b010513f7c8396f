"""Profiles that name a separate model, from their directories to their answers: the model is found, known by its
fingerprint, loaded once, and refused when it is another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kept_profiles import Kept, Recipe, Stream, write_models, write_recipe
from oracle import Oracle
from tiny_base import Tiny, write_base

from uld_serve import assembly
from uld_serve.cli import main
from uld_serve.config import EngineSettings
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import ModelUnsupported, ProfileMismatch
from uld_serve.evaluation.unfiltered import unfiltered_copy
from uld_serve.llm import LLM
from uld_serve.profiles.store import read_profile

SMALL = EngineSettings(kv_cache_bytes=2**22)
PROMPT = list(b"Who was it that")


def load(tiny: Tiny, *profiles: Path) -> LLM:
    return LLM(str(tiny.folder), profiles=profiles, dtype="float32", device="cpu", settings=SMALL)


def test_profiles_bring_their_models_along_and_share_them(
    tiny: Tiny, kept: Kept, kept_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_base = assembly.load_base
    monkeypatch.setattr(
        assembly, "load_base", lambda ref, **kwargs: loaded.append(str(ref)) or load_base(ref, **kwargs)
    )
    names = ["separate", "offset", "two-models", "own-late"]
    llm = load(tiny, *(kept.profiles[name][0] for name in names))
    assert sorted(loaded) == sorted(str(path) for path in (tiny.folder, *kept.models.values()))
    params = SamplingParams(max_tokens=8, temperature=0)
    for name in names:
        [answer] = llm.generate([PROMPT], params, profile=name)
        expected = kept_oracle.generate(PROMPT, 8, [name], eos_ids=(257,))
        assert list(answer.token_ids) == [token.token_id for token in expected]
        assert [entry.name for entry in answer.receipt.profiles] == [name]


def copied(kept: Kept, tmp_path: Path) -> Path:
    """The profile "separate" beside copies of the models."""
    shutil.copytree(kept.profiles["separate"][0], tmp_path / "profiles" / "separate")
    for name, path in kept.models.items():
        shutil.copytree(path, tmp_path / "models" / name)
    return tmp_path / "profiles" / "separate"


def test_another_model_in_its_place_is_refused(tiny: Tiny, kept: Kept, tmp_path: Path) -> None:
    profile = copied(kept, tmp_path)
    load(tiny, profile)
    shutil.rmtree(tmp_path / "models" / "small")
    with pytest.raises(ModelUnsupported, match="models/small' does not exist"):
        load(tiny, profile)
    write_base(tmp_path / "models" / "small", seed=77, num_hidden_layers=2)
    with pytest.raises(ProfileMismatch, match="'separate' was made with model"):
        load(tiny, profile)


def test_a_stream_that_exits_elsewhere_than_its_model_ends_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    recipe = Recipe(
        {"kind": "relu_difference"}, [Stream("assistant", 0, 3, model="small", has_adapter=False)]
    )
    folder = tmp_path / "profiles" / "too-deep"
    write_recipe(folder, tiny.base, tiny.folder, models, recipe, seed=1)
    with pytest.raises(ProfileMismatch, match="exits at layer 3; its model has 2"):
        load(tiny, folder)


def test_a_profile_is_listed_and_copied_with_its_model(
    kept: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, version = kept.profiles["two-models"]
    assert main(["profiles", "list", "--profiles", str(directory)]) == 0
    assert "0-3 own in ../../models/other, 0-2 own in ../../models/small" in capsys.readouterr().out
    assert main(["profiles", "list", "--profiles", str(kept.profiles["distilled"][0])]) == 0
    assert "target adapter" in capsys.readouterr().out
    with unfiltered_copy(directory, version) as copy:
        assert copy is not None
        other = read_profile(copy)
        found = [Path(other.locate(model)) for model in other.models.values()]
        assert sorted(found) == sorted(kept.models.values())
