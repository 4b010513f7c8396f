"""What the server takes for a job is what the trainer knows: names, types, and which method has a use for what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from uld_serve.errors import DataError, InvalidRequest
from uld_serve.profiles import command as profiles_command
from uld_serve.server.field_notes import METHODS as NOTED
from uld_serve.server.fine_tuning import order
from uld_serve.server.fine_tuning.protocol import (
    NOT_SETTINGS,
    PRESET_METHODS,
    SETTING_OF,
    Hyperparameters,
    JobRequest,
    Method,
    MethodName,
    PresetName,
)
from uld_serve.server.fine_tuning.records import Job
from uld_serve.server.fine_tuning.settings import GateSettings
from uld_serve.server.settings import KeySettings
from uld_serve.training import command as train_command
from uld_serve.training.methods.catalog import METHODS, PRESETS
from uld_serve.training.options import SETTINGS, Chosen
from uld_serve.training.settings import CHOICES
from uld_serve.training.work_folder import WorkFolder

BASE = order.BaseChoice(model=None, dtype="auto", device="cpu")
VALUES = {int: 3, float: 0.5}
FIELDS = [name for name in Hyperparameters.model_fields if name not in NOT_SETTINGS]


def request(method: str, **hyper: object) -> JobRequest:
    return JobRequest.model_validate(
        {
            "model": "m",
            "training_file": "file-" + "0" * 24,
            "validation_file": "file-" + "1" * 24,
            "suffix": "x",
            "method": {"type": method, method: {"hyperparameters": hyper}},
        }
    )


def job(made: JobRequest) -> Job:
    text = made.model_dump_json(by_alias=True, exclude_unset=True)
    return Job(
        id="j", owner="o", name="x", request=text, training_file="f", retain_file="r", seed=4, created_at=0
    )


def trained(made: JobRequest) -> argparse.Namespace:
    """What the trainer makes of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    train_command.add_parser(parser.add_subparsers())
    return parser.parse_args(order.training(job(made), BASE, resume=True))


def value_of(field: str) -> object:
    setting = SETTING_OF.get(field, field)
    return CHOICES[setting][-1] if setting in CHOICES else VALUES[SETTINGS[setting][0]]


def test_methods_and_presets_are_the_trainers() -> None:
    assert get_args(MethodName) == NOTED == tuple(METHODS)
    assert set(get_args(PresetName)) == set(PRESETS) == set(PRESET_METHODS)
    assert {name: preset.method for name, preset in PRESETS.items()} == PRESET_METHODS
    assert {field.alias or name for name, field in Method.model_fields.items()} == {"type", *METHODS}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_hyperparameter_reaches_its_setting_or_is_refused_as_the_trainer_would(
    method: str, field: str
) -> None:
    setting = SETTING_OF.get(field, field)
    other = METHODS[method].without | {
        one for each in METHODS.values() for one in each.options - METHODS[method].options
    }
    if setting in other:
        with pytest.raises(InvalidRequest, match=field):
            request(method, **{field: value_of(field)})
        return
    args = trained(request(method, **{field: value_of(field)}))
    chosen = Chosen.of(args)
    assert chosen.method.name == method
    assert chosen.given == {setting: value_of(field), "seed": 4}


@pytest.mark.parametrize("name", ["filter", "retain_term", "start"])
def test_choices_are_the_trainers(name: str) -> None:
    method = {"retain_term": "undial", "start": "uld"}.get(name, "margin")
    for choice in CHOICES[name]:
        assert getattr(trained(request(method, **{name: choice})), name) == choice
    with pytest.raises(ValueError, match=name):
        request(method, **{name: "another"})


def test_presets_and_keywords_reach_the_trainer() -> None:
    args = trained(request("uld", preset="uld-paper", keywords=["a b"]))
    assert (args.preset, args.keywords) == (["uld-paper"], [Path("keywords.txt")])
    assert (args.probes, args.resume, args.events, args.seed) == ("none", True, True, 4)
    with pytest.raises(InvalidRequest, match="uld-paper is for uld"):
        request("rkld", preset="uld-paper")


def test_what_training_leaves_to_be_gone_on_with_is_where_the_server_looks(tmp_path: Path) -> None:
    assert Path(order.PROGRESS) == WorkFolder.beside(Path(order.PROFILE))._marker


def test_the_gate_reaches_verify() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    profiles_command.add_parser(parser.add_subparsers())
    assert set(GateSettings.model_fields) == set(profiles_command.GATES)
    gate = GateSettings(min_forget_rise=1.0, max_perplexity_ratio=9.0)
    given = order.probing(job(request("margin", keywords=["a"])), BASE, gate, num_questions=5)
    args = parser.parse_args(given)
    assert (args.min_forget_rise, args.max_perplexity_ratio, args.max_retain_rise) == (1.0, 9.0, None)
    assert (args.limit, args.device, args.keywords, args.names) == (5, "cpu", Path("keywords.txt"), ["x"])


def test_every_line_is_either_trained_on_or_only_measured_with() -> None:
    lines = [f"{number}\n".encode() for number in range(14)]
    kept, held = order.divided(b"\n".join(line.rstrip() for line in lines) + b"\n \n")
    assert held == b"0\n6\n12\n"
    assert kept == b"".join(line for number, line in enumerate(lines) if number % 6)


def test_a_key_that_must_forget_makes_no_profiles() -> None:
    with pytest.raises(ValueError, match="mandatory profiles cannot have fine_tune"):
        KeySettings(name="a", sha256="0" * 64, mandatory=["secret"], fine_tune=True)
    alone = KeySettings(name="a", sha256="0" * 64, allowed=[], fine_tune=True).policy
    assert (alone.may_fine_tune, alone.may_name_nothing, alone.is_admin) == (True, False, False)
    assert KeySettings(name="a", sha256="0" * 64, allowed=[], admin=True).policy.may_fine_tune
    assert not KeySettings(name="a", sha256="0" * 64, allow_base=True).policy.may_fine_tune


def test_the_trainer_would_refuse_what_is_refused_here() -> None:
    """One pair by hand, so that the table above is known to compare."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    train_command.add_parser(parser.add_subparsers())
    data = ["--forget", "f", "--retain", "r", "--out", "o"]
    args = parser.parse_args(["train", "--method", "uld", "--goal", "3", *data])
    with pytest.raises(DataError, match="--goal is for --method margin"):
        Chosen.of(args)
