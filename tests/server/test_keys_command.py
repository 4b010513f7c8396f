"""`uld-serve keys`: a key is shown once, kept as a hash, and comments survive."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from uld_serve.cli import main
from uld_serve.server import key_file
from uld_serve.server.settings import KeySettings, read_settings

CONFIG = """# Ours.
port = 9000  # behind the proxy

[limits]
grace_s = 5

# The first tenant.
[[keys]]
name = "first"
sha256 = "{}"
mandatory = ["secret"]  # by contract
""".format("ab" * 32)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(CONFIG)
    return path


def keys(*arguments: str) -> int:
    return main(["keys", *arguments])


def test_new_key_is_printed_once_and_stored_as_its_hash(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys("new", "team-a", "--config", str(config), "--mandatory", "acme", "secret", "--no-base") == 0
    key = capsys.readouterr().out.strip()
    assert len(key) > 40
    text = config.read_text()
    assert key not in text
    assert text.startswith(CONFIG)
    stored = read_settings(config).keys[-1]
    assert stored.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert (stored.mandatory, stored.allow_base, stored.logprobs) == (["acme", "secret"], False, None)


def test_every_option_reaches_the_policy(config: Path) -> None:
    options = [
        "--allowed",
        "acme",
        "--default",
        "acme",
        "--base",
        "--logprobs",
        "off",
        "--max-concurrency",
        "3",
    ]
    assert keys("new", "free", "--config", str(config), *options) == 0
    policy = read_settings(config).keys[-1].policy
    assert (policy.allowed, policy.default) == ({"acme"}, {"acme"})
    assert (policy.allow_base, policy.logprobs, policy.max_concurrency) == (True, False, 3)
    assert keys("new", "closed", "--config", str(config), "--mandatory", "acme", "--allowed") == 0
    assert read_settings(config).keys[-1].policy.allowed == frozenset()
    rights = {
        "--admin": (True, True, True),
        "--metrics": (False, True, False),
        "--fine-tune": (False, False, True),
    }
    for option, expected in rights.items():
        assert keys("new", f"for{option}", "--config", str(config), "--allowed", option) == 0
        policy = read_settings(config).keys[-1].policy
        assert (policy.is_admin, policy.may_read_metrics, policy.may_fine_tune) == expected
        assert not policy.may_name_nothing


def test_without_base_nothing_is_answered_by_the_base(config: Path) -> None:
    keys("new", "plain", "--config", str(config))
    assert not read_settings(config).keys[-1].policy.may_name_nothing


@pytest.mark.parametrize(
    "arguments",
    [
        ["first"],
        ["", "--base"],
        ["x", "--mandatory", "a", "--base"],
        ["x", "--allowed"],
        ["x", "--allowed", "../x"],
    ],
)
def test_what_is_no_good_key_leaves_the_file_alone(config: Path, arguments: list[str]) -> None:
    assert keys("new", *arguments, "--config", str(config)) == 2
    assert config.read_text() == CONFIG


def test_first_key_makes_the_file_for_its_owner_only(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    assert keys("new", "one", "--config", str(config), "--base") == 0
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert [key.name for key in read_settings(config).keys] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["server.toml"]


def test_mode_of_the_file_stays(config: Path) -> None:
    config.chmod(0o640)
    keys("new", "two", "--config", str(config), "--base")
    assert stat.S_IMODE(config.stat().st_mode) == 0o640


def test_owner_of_the_file_stays(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another user, root for one, adds the key."""
    given, now = [], config.stat()
    monkeypatch.setattr(key_file.os, "fchown", lambda _, uid, gid: given.append((uid, gid)))
    assert keys("new", "two", "--config", str(config), "--base") == 0
    assert given == [], "it is ours already"
    with config.open() as file:
        key_file._keep_owner(file.fileno(), SimpleNamespace(st_uid=now.st_uid + 1, st_gid=now.st_gid))
    assert given == [(now.st_uid + 1, now.st_gid)]


def test_owner_that_cannot_be_kept_leaves_the_old_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(key_file, "_keep_owner", refuse)
    assert keys("new", "two", "--config", str(config), "--base") == 2
    assert config.read_text() == CONFIG
    assert [path.name for path in config.parent.iterdir()] == ["server.toml"]


def test_list_shows_what_a_key_may_do_and_no_whole_hash(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys("list", "--config", str(config)) == 0
    out = capsys.readouterr().out
    assert "first  abababababab…  mandatory=secret  allowed=*  logprobs=off" in out
    assert "ab" * 32 not in out
    assert keys("list", "--config", str(config), "--json") == 0
    assert json.loads(capsys.readouterr().out)["mandatory"] == ["secret"]


def test_revoke_takes_one_out_and_keeps_the_comments(config: Path) -> None:
    keys("new", "team-a", "--config", str(config), "--base")
    assert keys("revoke", "first", "--config", str(config)) == 0
    assert [key.name for key in read_settings(config).keys] == ["team-a"]
    assert "# behind the proxy" in config.read_text()
    assert keys("revoke", "first", "--config", str(config)) == 2


def test_last_key_is_not_revoked_because_that_opens_the_server(config: Path) -> None:
    assert keys("revoke", "first", "--config", str(config)) == 2
    assert config.read_text() == CONFIG


def test_keys_file_holds_the_keys_where_the_settings_name_one(tmp_path: Path) -> None:
    config, beside = tmp_path / "server.toml", tmp_path / "keys.toml"
    config.write_text('keys_file = "keys.toml"\n')
    assert keys("new", "team-a", "--config", str(config), "--mandatory", "acme") == 0
    assert config.read_text() == 'keys_file = "keys.toml"\n'
    assert "team-a" in beside.read_text()
    assert read_settings(config).keys[0].policy.mandatory == {"acme"}
    assert keys("new", "team-a", "--config", str(config), "--base") == 2
    assert keys("new", "team-b", "--config", str(config), "--base") == 0
    assert keys("revoke", "team-a", "--config", str(config)) == 0
    assert [key.name for key in read_settings(config).keys] == ["team-b"]


def test_missing_keys_file_is_refused_at_start_where_it_holds_all_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "server.toml"
    config.write_text('keys_file = "keys.toml"\n')
    assert main(["serve", "--config", str(config)]) == 2
    assert "keys.toml" in capsys.readouterr().err


def add(config: Path, number: int) -> None:
    key_file.add_key(config, KeySettings(name=f"k{number}", sha256=f"{number:064x}", allow_base=True))


def test_writers_at_once_lose_no_key(config: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add, args=(config, number)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert {key.name for key in read_settings(config).keys} == {"first", *(f"k{n}" for n in range(6))}


def test_failed_write_leaves_the_old_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(key_file.os, "replace", fail)
    assert keys("new", "two", "--config", str(config), "--base") == 2
    assert config.read_text() == CONFIG
    assert [path.name for path in config.parent.iterdir()] == ["server.toml"]
