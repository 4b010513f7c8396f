"""What a vLLM server is told to forget, and what is refused before it starts. Needs no vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_base import Tiny

from uld_serve.cli import main
from uld_serve.engine.streams import StreamPlan
from uld_serve.errors import (
    InvalidRequest,
    ModelUnsupported,
    ProfileCorrupt,
    ProfileMismatch,
    UnknownProfile,
)
from uld_serve.vllm_plugin.bans import banned_by
from uld_serve.vllm_plugin.limits import check_limits
from uld_serve.vllm_plugin.lineup import Lineup, seatings
from uld_serve.vllm_plugin.orders import KEY, Orders, ServerArguments
from uld_serve.vllm_plugin.register import GUARD


def orders(tiny: Tiny, *names: str, **fields: object) -> Orders:
    directories = tuple(str(path) for path, _ in tiny.profiles.values())
    return Orders(profiles=names, directories=directories, **fields)


def test_arguments_name_the_architecture_the_profiles_by_digest_and_the_guard(tiny: Tiny) -> None:
    words = ServerArguments.of(str(tiny.folder), orders(tiny, "late-fork")).keywords
    assert words["hf_overrides"] == {"architectures": ["UldLlamaForCausalLM"]}
    assert words["logits_processors"] == [GUARD]
    told = words["additional_config"]
    assert told[KEY]["profiles"] == [tiny.version("late-fork").ref]
    assert Orders.of(json.loads(json.dumps(told))) == orders(tiny, tiny.version("late-fork").ref)


def test_the_command_listens_on_this_machine_unless_told_otherwise(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vllm", "--model", str(tiny.folder), "--profile", "late-fork", "--print"]
    command += ["--profiles", str(tiny.profiles["late-fork"][0])]
    assert main([*command, "--", "--port", "8001"]) == 0
    assert "--host 127.0.0.1 --port 8001" in capsys.readouterr().out
    assert main([*command, "--", "--host=::1"]) == 0
    assert "127.0.0.1" not in capsys.readouterr().out


def test_an_architecture_that_the_plugin_does_not_know_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelUnsupported, match="MambaForCausalLM"):
        ServerArguments.of(str(tmp_path / "other"), orders(tiny, "late-fork"))


@pytest.mark.parametrize(
    "told",
    [None, {}, {"other": 1}, {KEY: {}}, {KEY: {"profiles": []}}, {KEY: {"profiles": ["a"], "strenght": 1}},
     {KEY: {"profiles": ["a"], "strength": float("nan")}}, {KEY: {"profiles": ["a"], "strength": 0}}],
)  # fmt: skip
def test_a_server_that_is_told_nothing_or_nonsense_does_not_start(told: object) -> None:
    with pytest.raises(InvalidRequest):
        Orders.of(told)


def test_a_profile_that_is_missing_changed_or_damaged_does_not_start(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UnknownProfile):
        orders(tiny, "gone").versions()
    with pytest.raises(ProfileMismatch, match="on disk"):
        orders(tiny, "late-fork@000000000000").versions()
    copy = tmp_path / "late-fork"
    shutil.copytree(tiny.profiles["late-fork"][0], copy)
    weights = copy / "assistant" / "adapter_model.safetensors"
    weights.chmod(0o600)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ProfileCorrupt):
        Orders(profiles=("late-fork",), directories=(str(copy),)).versions()


def test_a_profile_of_another_base_does_not_start(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.folder, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ProfileMismatch, match="fingerprint"):
        Lineup.of(orders(tiny, "late-fork"), tmp_path / "other", defers_logits=False)


def test_a_lineup_has_every_stream_adapter_and_rule(tiny: Tiny) -> None:
    lineup = Lineup.of(orders(tiny, "late-fork", "pair"), tiny.folder, defers_logits=False)
    assert [(one.fork, one.exit) for one in lineup.plan.streams] == [(2, 4), (1, 4), (2, 4)]
    assert len(lineup.adapters) == 3
    assert [seating.streams for seating in lineup.seatings] == [(), (1,), (0, 1, 2), (0, 1, 2), ()]
    assert set(lineup.adapters_of(2)) == {1, 2, 3}
    assert set(lineup.adapters_of(0)) == set()
    assert lineup.vocab_size == tiny.base.vocab_size
    assert set(lineup.protected_ids) == {256, 257, 258}


def test_rows_enter_as_copies_of_the_target_and_leave_with_their_own_state() -> None:
    streams = [StreamPlan(1, 3, None), StreamPlan(2, 4, None), StreamPlan(0, 2, None)]
    found = seatings(streams, 4)
    assert [one.streams for one in found] == [(2,), (0, 2), (0, 1), (1,), ()]
    assert found[1].picks == (0, 0, 1)  # stream 0 enters, stream 2 goes on
    assert found[2].picks == (0, 1, 0)
    assert found[2].leaving == ((2, 2),)
    assert found[3].leaving == ((0, 1),)
    assert found[3].picks == (0, 2)
    assert found[4].leaving == ((1, 1),)


def vllm_config(folder: Path, **changes: object) -> SimpleNamespace:
    fields = {
        "model_config": SimpleNamespace(
            enable_sleep_mode=False, runner_type="generate", tokenizer=str(folder), model=str(folder),
            logits_processors=[GUARD],
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        "lora_config": None, "speculative_config": None, "kv_transfer_config": None,
        "weight_transfer_config": None, "quant_config": None,
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "load_config": SimpleNamespace(load_format="auto"), "compilation_config": SimpleNamespace(mode=0),
    }  # fmt: skip
    config = SimpleNamespace(**fields)
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("parallel_config__tensor_parallel_size", 2, "tensor parallelism"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config__decode_context_parallel_size", 2, "context parallelism"),
        ("compilation_config__mode", 3, "--enforce-eager"),
        ("lora_config", object(), "--enable-lora"),
        ("speculative_config", object(), "speculative"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
        ("weight_transfer_config", object(), "--weight-transfer-config"),
        ("quant_config", object(), "quantization"),
        ("model_config__enable_sleep_mode", True, "sleep mode"),
        ("cache_config__kv_sharing_fast_prefill", True, "fast-prefill"),
        ("load_config__load_format", "dummy", "--load-format dummy"),
        ("model_config__runner_type", "pooling", "--runner pooling"),
        ("model_config__tokenizer", "elsewhere", "another tokenizer"),
        ("model_config__model", "org/name", "name its directory"),
        ("model_config__logits_processors", None, "--logits-processors"),
    ],
)
def test_what_would_bypass_the_fused_logits_ends_the_start(
    tiny: Tiny, field: str, value: object, said: str
) -> None:
    assert check_limits(vllm_config(tiny.folder)) == tiny.folder
    with pytest.raises(ModelUnsupported, match=said):
        check_limits(vllm_config(tiny.folder, **{field: value}))


def test_a_configuration_without_a_known_field_ends_the_start_too(tiny: Tiny) -> None:
    config = vllm_config(tiny.folder)
    del config.speculative_config
    with pytest.raises(AttributeError):
        check_limits(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("structured_outputs", object()), ("allowed_token_ids", [1]), ("bad_words", ["a"]), ("min_tokens", 1),
     ("logit_bias", {1: float("-inf")})],
)  # fmt: skip
def test_requests_that_ban_tokens_behind_the_filters_are_refused(field: str, value: object) -> None:
    plain = {
        "structured_outputs": None, "allowed_token_ids": None, "bad_words": [], "min_tokens": 0,
        "logit_bias": {5: -100.0},
    }  # fmt: skip
    assert banned_by(SimpleNamespace(**plain)) == []
    assert len(banned_by(SimpleNamespace(**{**plain, field: value}))) == 1


def test_without_vllm_the_command_says_what_to_install(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from uld_serve.vllm_plugin import command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.os, "execv", lambda *_: pytest.fail("vLLM was started"))
    words = ["vllm", "--model", str(tiny.folder), "--profile", "late-fork"]
    words += ["--profiles", str(tiny.profiles["late-fork"][0])]
    assert main(words) == 2
