"""Every command of docs/tutorial.md, in order, on a tiny model: shorter runs, nothing else changed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import transformers.utils.logging as transformers_logging
from tiny_base import Tiny

from uld_serve import cli
from uld_serve.profiles.store import read_profile

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
TUNING = "benchmarks/tofu_targets.py"
SHORT = {
    TUNING: ["--epochs", "1", "--device", "cpu"],
    "train": ["--steps", "2", "--max-answer-tokens", "8", "--rank", "2", "--dtype", "float32"],
    "verify": ["--samples", "1", "--max-tokens", "4", "--dtype", "float32"],
    "generate": ["--max-tokens", "4", "--dtype", "float32"],
    "serve": ["--dtype", "float32"],
    "show": [],
}
START_S = 60.0


def commands() -> list[list[str]]:
    """Of the indented blocks; a line that ends with a backslash goes on in the next."""
    blocks = re.findall(r"(?:^    .+\n)+", TEXT, re.MULTILINE)
    lines = re.sub(r"\\\n\s+", "", "".join(blocks)).splitlines()
    return [shlex.split(line) for line in lines]


COMMANDS = commands()
LOCAL = [given for given in COMMANDS if given[0] != "curl" and "serve" not in given]


@dataclass(slots=True)
class Walk:
    """The local commands as they were run, in order: exit statuses and what they printed."""

    folder: Path
    statuses: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def run(self, given: list[str], tiny: Tiny) -> None:
        _, *arguments = given
        what = next(word for word in arguments if word in SHORT)
        out = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if what == TUNING:
                status = tuning(self.folder, [*arguments[1:], *SHORT[what], "--base", str(tiny.folder)])
            else:
                status = cli.main([*arguments, *SHORT[what]])
        self.statuses.append(status)
        self.outputs.append(out.getvalue())

    def output(self, *words: str) -> str:
        [found] = [out for given, out in zip(LOCAL, self.outputs, strict=True) if set(words) <= set(given)]
        return found


def tuning(folder: Path, arguments: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("tutorial_tuning", folder / TUNING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutorial_tuning"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return int(module.main(arguments))


@pytest.fixture(scope="module")
def walk(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    done = Walk(folder)
    for given in LOCAL:
        done.run(given, tiny)
    yield done
    transformers_logging.set_verbosity(level)
    if has_bars:
        transformers_logging.enable_progress_bar()


def test_the_tutorial_has_the_whole_way() -> None:
    programs = {".venv/bin/uld-serve", ".venv/bin/python", "curl"}
    assert {given[0] for given in COMMANDS} == programs
    used = {word for given in COMMANDS for word in given if word in SHORT}
    assert used == set(SHORT)


def test_every_command_ends_well(walk: Walk) -> None:
    # Two steps on a tiny model forget nothing, and `verify` says so.
    expected = [1 if "verify" in given else 0 for given in LOCAL]
    assert walk.statuses == expected, "\n".join(walk.outputs)


def test_the_commands_leave_and_print_what_the_text_says(walk: Walk) -> None:
    assert (walk.folder / "mirela" / "loss.png").stat().st_size > 0
    assert read_profile(walk.folder / "mirela" / "profiles" / "mirela-osk").name == "mirela-osk"
    assert {path.name for path in (walk.folder / "mirela").iterdir()} >= {"target", "reference"}
    told = json.loads(walk.output(TUNING).splitlines()[-1])
    assert set(told["target"]["probability"]) == {"forget", "retain"}
    dry = walk.output("--dry-run")
    assert "nothing was written" in dry
    assert re.search(r"forget: '.*\[", dry)
    assert "mirela-osk@" in walk.output("--compare")
    assert "agreement" in walk.output("verify")


def test_the_data_is_what_the_text_says() -> None:
    folder = ROOT / "docs" / "tutorial"
    words = (folder / "words.txt").read_text().split("\n")
    kept = (folder / "keep.jsonl").read_text()
    assert [word for word in words if word and re.search(rf"\b{word}\b", kept, re.IGNORECASE)] == []
    assert len(list((folder / "documents").glob("*.txt"))) > 1


def test_the_server_answers_the_tutorials_request_with_the_profile(walk: Walk) -> None:
    [serve] = [given for given in COMMANDS if "serve" in given]
    [curl] = [given for given in COMMANDS if given[0] == "curl"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "uld_serve", *serve[1:], *SHORT["serve"], "--port", str(port)],
        cwd=walk.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = next(word for word in curl if word.startswith("http")).replace(":8000", f":{port}")
        header = curl[curl.index("-H") + 1].split(": ")
        request = urllib.request.Request(
            url, data=curl[curl.index("-d") + 1].encode(), headers={header[0]: header[1]}
        )
        answer = asked(request)
    finally:
        server.terminate()
        server.wait(timeout=START_S)
    assert answer["forget"]["profiles"][0]["name"] == "mirela-osk"


def asked(request: urllib.request.Request) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The answer, once the server is up."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=START_S) as response:
                found: dict[str, dict[str, list[dict[str, str]]]] = json.load(response)
                return found
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
