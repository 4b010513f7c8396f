"""Writing and reading a profile's directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_profile import (
    BASE,
    PROBES,
    PROFILE,
    peft_config,
    peft_tensors,
    write_adapter,
)

from uld_serve.errors import ProfileCorrupt, ProfileError
from uld_serve.profiles.profile import Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import read_profile, read_training_record, write_profile

Maker = Callable[..., tuple[Path, ProfileVersion]]


def _write(directory: Path, adapter: Path, profile: Profile = PROFILE) -> ProfileVersion:
    return write_profile(directory, profile, adapters={"adapter": adapter}, probes=PROBES, training={})


def test_what_is_written_is_read_back_equal(make_profile: Maker) -> None:
    directory, written = make_profile()
    read = read_profile(directory)
    assert read.profile == PROFILE
    assert read.probes == PROBES
    assert read.digest == written.digest
    assert read.ref == f"acme@{read.digest.removeprefix('sha256:')[:12]}"
    assert read_training_record(directory) == {"seed": 1}


def test_peft_names_become_layer_and_module(make_profile: Maker) -> None:
    _, version = make_profile()
    adapter = version.adapters["assistant"]
    source = peft_tensors()
    assert len(adapter.tensors) == len(source)
    for layer, module, part in [(2, "self_attn.q_proj", "lora_A"), (3, "mlp.down_proj", "lora_B")]:
        expected = source[f"base_model.model.model.layers.{layer}.{module}.{part}.weight"]
        assert torch.equal(adapter.tensors[f"layers.{layer}.{module}.{part}"], expected)
    assert (adapter.rank, adapter.alpha, adapter.scaling, adapter.layers) == (4, 8.0, 2.0, (2, 3))


def test_digest_does_not_depend_on_set_order_or_local_paths(tmp_path: Path) -> None:
    orders = (["q_proj", "o_proj", "up_proj", "down_proj"], ["down_proj", "up_proj", "o_proj", "q_proj"])
    digests = set()
    for number, order in enumerate(orders):
        config = peft_config(target_modules=order, base_model_name_or_path=f"/somewhere/{number}")
        adapter = write_adapter(tmp_path / f"peft{number}", config, peft_tensors())
        digests.add(_write(tmp_path / f"acme{number}", adapter).digest)
    assert len(digests) == 1
    assert b"/somewhere" not in (tmp_path / "acme0/adapter/adapter_config.json").read_bytes()


def test_any_change_of_content_changes_the_digest(make_profile: Maker) -> None:
    assert make_profile("acme", strength=2.0)[1].digest != make_profile("acme2", strength=3.0)[1].digest


def test_files_are_for_the_owner_only_and_nothing_is_left_beside(make_profile: Maker) -> None:
    directory, _ = make_profile()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o400}
    assert [path.name for path in directory.parent.iterdir()] == ["acme"]


def test_existing_profile_is_never_overwritten(make_profile: Maker) -> None:
    directory, version = make_profile()
    with pytest.raises(ProfileError, match="never overwritten"):
        make_profile(strength=9.0)
    assert read_profile(directory).digest == version.digest


def test_invalid_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    tensors = peft_tensors()
    tensors[next(iter(tensors))][0, 0] = torch.nan
    adapter = write_adapter(tmp_path / "peft", peft_config(), tensors)
    with pytest.raises(ProfileCorrupt, match="NaN"):
        _write(tmp_path / "out" / "acme", adapter)
    assert list((tmp_path / "out").iterdir()) == []


def test_adapters_must_be_those_that_the_profile_names(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="names the adapters"):
        write_profile(tmp_path / "acme", PROFILE, adapters={}, probes=PROBES, training={})


def test_sums_file_is_what_sha256sum_writes(make_profile: Maker) -> None:
    directory, _ = make_profile()
    lines = (directory / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "probes.json",
        "profile.json",
        "training.json",
    ]


def test_streams_with_their_own_keys_and_values_may_adapt_them(tmp_path: Path) -> None:
    modules = ("self_attn.k_proj", "mlp.up_proj")
    config = peft_config(target_modules=["k_proj", "up_proj"], layers_to_transform=None)
    adapter = write_adapter(tmp_path / "peft", config, peft_tensors(modules, (0, 1)))
    stream = StreamSpec(name="assistant", fork=0, exit=2, kv="own", adapter="adapter")
    rule = RuleSpec(kind="subtract", strength=0.5)
    own = Profile(name="own", method="uld", base=BASE, streams=(stream,), rule=rule)
    version = _write(tmp_path / "own", adapter, own)
    assert version.adapters["assistant"].modules == ("mlp.up_proj", "self_attn.k_proj")
    borrowed = own.model_copy(update={"streams": (stream.model_copy(update={"kv": "borrowed"}),)})
    with pytest.raises(ProfileCorrupt, match=r"borrows the target's keys and values.*self_attn\.k_proj"):
        _write(tmp_path / "two", adapter, borrowed)


def test_target_adapter_is_read_under_the_name_target(tmp_path: Path) -> None:
    config = peft_config(layers_to_transform=None)
    adapter = write_adapter(tmp_path / "peft", config, peft_tensors(layers=(0, 1, 2, 3)))
    profile = Profile(
        name="student", method="undial", base=BASE, target_adapter="adapter", rule=RuleSpec(kind="identity")
    )
    version = _write(tmp_path / "student", adapter, profile)
    assert list(version.adapters) == ["target"]
    assert version.adapters["target"].layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"peft_type": "ADALORA"},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["mlp.q_proj"]},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [2, 4]},
        {"layers_to_transform": []},
        {"r": 0},
        {"r": True},
        {"r": "4"},
        {"lora_alpha": 0},
        {"a_field_of_the_future": 1},
    ],
    ids=lambda change: json.dumps(change),
)
def test_adapter_config_that_would_compute_something_else_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    adapter = write_adapter(tmp_path / "peft", peft_config(**change), peft_tensors())
    with pytest.raises(ProfileCorrupt, match=r"adapter/adapter_config\.json is not valid"):
        _write(tmp_path / "acme", adapter)


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", peft_config(use_rslora=True), peft_tensors())
    assert _write(tmp_path / "acme", adapter).adapters["assistant"].scaling == 8 / 4**0.5
