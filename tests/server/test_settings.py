"""server.toml, keys and the start's refusals, without loading a model."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest
from fake_engine import registry

from uld_serve.config import EngineSettings
from uld_serve.errors import InvalidRequest, ProfileError
from uld_serve.server import command, key_sources
from uld_serve.server.keys import KeyRing, sha256_of
from uld_serve.server.listener import bound_socket, is_loopback
from uld_serve.server.settings import KeySettings, ServerSettings, check_profiles_exist, read_settings

HASH = "ab" * 32
GOOD = f"""
host = "0.0.0.0"
port = 9000
profiles = ["/srv/profiles"]
max_model_len = 2048
max_num_seqs = 7
adapter_bytes = 5000

[limits]
body_bytes = 65536
grace_s = 5

[[keys]]
name = "tenant"
sha256 = "{HASH}"
mandatory = ["secret"]
allowed = ["acme"]
max_concurrency = 4

[[keys]]
name = "operator"
sha256 = "{"cd" * 32}"
allow_base = true
"""


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *arguments])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(GOOD)
    return path


def test_file_is_read(config: Path) -> None:
    settings = read_settings(config)
    assert (settings.host, settings.port) == ("0.0.0.0", 9000)
    assert settings.engine == EngineSettings(
        max_model_len=2048, max_num_seqs=7, adapter_bytes=5000, measure_every=32
    )
    assert settings.limits.body_bytes == 65536
    tenant, operator = (key.policy for key in settings.keys)
    assert tenant.mandatory == {"secret"}
    assert tenant.allowed == {"acme"}
    assert (tenant.allow_base, tenant.logprobs, tenant.max_concurrency) == (False, False, 4)
    assert (operator.allow_base, operator.logprobs, operator.allowed) == (True, True, "*")


def test_log_probabilities_for_a_bound_key_are_the_operators_choice() -> None:
    key = KeySettings(name="k", sha256=HASH, mandatory=["secret"], logprobs="fused")
    assert key.policy.logprobs


@pytest.mark.parametrize(
    "text",
    [
        "port = 'x'",
        "prot = 8000",
        "host = ",
        f"[[keys]]\nname = 'k'\nsha256 = '{HASH}'\nmandatry = ['a']",
        f"[[keys]]\nname = 'k'\nsha256 = '{HASH}'\nmandatory = ['a']\nallow_base = true",
        f"[[keys]]\nname = 'k'\nsha256 = '{HASH}'\nallowed = []",
        f"[[keys]]\nname = 'k'\nsha256 = '{HASH}'\nallowed = ['../x']",
        "[[keys]]\nname = 'k'\nsha256 = 'short'",
        f"[[keys]]\nname = 'k'\nsha256 = '{HASH}'\n[[keys]]\nname = 'l'\nsha256 = '{HASH}'",
        "[limits]\nbody_bytes = nan",
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"server\.toml"):
        read_settings(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_settings(tmp_path / "nothing.toml")


def test_command_line_wins_over_the_file(config: Path) -> None:
    settings = command.settings_of(
        parsed("--config", str(config), "--port", "0", "--profiles", "p", "--profiles", "q")
    )
    assert (settings.port, settings.host) == (0, "0.0.0.0")
    assert settings.profiles == [Path("p"), Path("q")]
    assert len(settings.keys) == 2


def test_defaults_without_a_file() -> None:
    assert command.settings_of(parsed()) == ServerSettings()


def test_wrong_option_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="port"):
        command.settings_of(parsed("--port", "99999"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(InvalidRequest, match="without keys"):
        key_sources.require_safe_address(host, KeyRing())
    key_sources.require_safe_address(
        host, key_sources.key_ring(ServerSettings(), {key_sources.KEY_VARIABLE: "k" * 32})
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    key_sources.require_safe_address(host, KeyRing())


def test_key_from_the_environment_is_kept_as_a_hash() -> None:
    ring = key_sources.key_ring(ServerSettings(), {key_sources.KEY_VARIABLE: "k" * 32})
    assert list(ring.policies) == [sha256_of(b"k" * 32)]
    assert "kkk" not in repr(ring)
    for weak in ("", "short"):
        with pytest.raises(InvalidRequest, match="at least"):
            key_sources.key_ring(ServerSettings(), {key_sources.KEY_VARIABLE: weak})


def test_keys_must_name_loaded_profiles() -> None:
    check_profiles_exist([KeySettings(name="k", sha256=HASH, mandatory=["secret"])], registry())
    for field in ("mandatory", "allowed", "default"):
        key = KeySettings.model_validate({"name": "k", "sha256": HASH, field: ["gone"]})
        with pytest.raises(ProfileError, match=r"key 'k'.*gone"):
            check_profiles_exist([key], registry())


def test_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidRequest, match="cannot listen on"):
            bound_socket("127.0.0.1", taken.getsockname()[1])


def test_a_key_of_the_environment_takes_nothing_from_the_file_s(tmp_path: Path) -> None:
    """Else a key with mandatory profiles would become one that sees everything."""
    key = "k" * 32
    path = tmp_path / "server.toml"
    path.write_text(
        f'[[keys]]\nname = "bound"\nsha256 = "{sha256_of(key.encode()).hex()}"\nmandatory = ["secret"]\n'
    )
    with pytest.raises(InvalidRequest, match="'bound'"):
        key_sources.key_ring(read_settings(path), {key_sources.KEY_VARIABLE: key})
    both = {key_sources.KEY_VARIABLE: key, key_sources.ADMIN_KEY_VARIABLE: key}
    with pytest.raises(InvalidRequest, match=key_sources.ADMIN_KEY_VARIABLE):
        key_sources.key_ring(ServerSettings(), both)
