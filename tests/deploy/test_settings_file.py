"""deploy/server.toml shows every setting there is, with the value that it has when it is left out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from uld_serve.server.fine_tuning.settings import FineTuningSettings, GateSettings
from uld_serve.server.settings import (
    AdminSettings,
    AuditSettings,
    CacheSettings,
    KeySettings,
    Limits,
    LogSettings,
    ServerSettings,
    read_settings,
)

FILE = Path(__file__).parent.parent.parent / "deploy" / "server.toml"
SETTING = re.compile(r"^# ?(\w+ = .+|\[\[?\w+\]\]?.*)$")
TABLES: dict[str, type[BaseModel]] = {
    "admin": AdminSettings,
    "audit": AuditSettings,
    "cache": CacheSettings,
    "fine_tuning": FineTuningSettings,
    "limits": Limits,
    "log": LogSettings,
}
# Set for the container, or an example since the value depends on the machine, the model or the operator.
NOT_THE_DEFAULT = {
    *("host", "profiles", "model", "keys_file", "audit_log", "admin.host", "admin.port"),
    *("max_model_len", "max_num_seqs", "kv_cache_bytes", "own_kv_bytes", "adapter_bytes", "sampler_bytes"),
    "tensor_parallel",
    *(f"fine_tuning.{name}" for name in ("folder", "device", "threads", "gate")),
    *(f"keys.{name}" for name in ("name", "sha256", "mandatory", "logprobs", "max_concurrency")),
}


@pytest.fixture(scope="module")
def shown() -> dict[str, object]:
    """Everything in the file, what is commented out too, as `table.name`."""
    lines = [SETTING.sub(r"\1", line) for line in FILE.read_text("utf-8").splitlines()]
    # The example key stands among the settings above the tables.
    start = lines.index(next(line for line in lines if line.startswith("[[keys]]")))
    end = lines.index("[admin]")
    data = tomllib.loads("\n".join(lines[:start] + lines[end:]) + "\n" + "\n".join(lines[start:end]))
    (data["keys"],) = data["keys"]
    flat: dict[str, object] = {}
    for name, value in data.items():
        flat |= (
            {f"{name}.{inner}": one for inner, one in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def fields() -> dict[str, object]:
    """Every setting of the model, as `table.name`, with its default."""
    known = {**TABLES, "keys": KeySettings}
    flat = {name: field.default for name, field in ServerSettings.model_fields.items() if name not in known}
    for table, model in known.items():
        flat |= {f"{table}.{name}": field.default for name, field in model.model_fields.items()}
    return flat


def test_every_setting_is_shown_and_no_other(shown: dict[str, object]) -> None:
    assert shown.keys() == fields().keys()
    assert shown["fine_tuning.gate"].keys() == GateSettings.model_fields.keys()  # type: ignore[attr-defined]


def test_all_tables_are_known_here() -> None:
    nested = {
        name
        for name, field in ServerSettings.model_fields.items()
        for one in (field.annotation, *get_args(field.annotation))
        if isinstance(one, type) and issubclass(one, BaseModel) and one is not KeySettings
    }
    assert nested == TABLES.keys()


def test_what_is_shown_is_the_default_unless_it_says_so(shown: dict[str, object]) -> None:
    defaults = fields()
    assert {name for name, value in shown.items() if value != defaults[name]} == NOT_THE_DEFAULT
    assert PydanticUndefined in (defaults["keys.name"], defaults["keys.sha256"])


def test_file_is_accepted_as_it_is_and_with_everything_in_it(
    tmp_path: Path, shown: dict[str, object]
) -> None:
    keys = tmp_path / "keys" / "keys.toml"
    keys.parent.mkdir()
    keys.touch()
    (tmp_path / "server.toml").write_text(FILE.read_text("utf-8"), "utf-8")
    assert read_settings(tmp_path / "server.toml").admin.port == 8001
    whole: dict[str, object] = {}
    key: dict[str, object] = {}
    for path, value in shown.items():
        table, _, name = path.rpartition(".")
        if table == "keys":
            key[name] = value
        elif table:
            whole.setdefault(table, {})[name] = value  # type: ignore[index]
        else:
            whole[name] = value
    key["sha256"] = "0" * 64
    settings = ServerSettings.model_validate(whole | {"keys": [key]})
    assert settings.keys[0].policy.mandatory == {"harry-potter"}
