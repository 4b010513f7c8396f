"""What the CUDA image's build compiles is what Triton loads where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "triton_driver.py"
LOAD = "from triton.backends.nvidia import driver; print(driver.CudaUtils().launch)"

pytestmark = [
    pytest.mark.skipif(
        shutil.which("gcc") is None, reason="the build stage has gcc, and this machine has not"
    ),
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils to make a libcuda to load"),
]


@pytest.fixture
def built(tmp_path: Path) -> dict[str, str]:
    """The environment of a server whose image was built here."""
    folders = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path / "libcuda")}
    environment = {**os.environ, **folders}
    ran = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(tmp_path / "libcuda")  # the final stage has none of it
    return environment


def without_a_compiler(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """A PATH with nothing but what the interpreter asks of its platform, and a driver that has every function."""
    commands = folder / "bin"
    commands.mkdir()
    for name in ("file", "uname"):
        if (found := shutil.which(name)) is not None:
            (commands / name).symlink_to(found)
    return {**environment, "PATH": str(commands), "CC": "/nonexistent/cc", "LD_LIBRARY_PATH": str(folder)}


def make_driver(library: Path, folder: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    functions = re.findall(r" U (cu\w+)", listed.stdout)
    assert functions
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions))
    target = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", target], check=True)


def test_library_that_was_compiled_beforehand_is_loaded_without_a_compiler(
    built: dict[str, str], tmp_path: Path
) -> None:
    (library,) = Path(built["TRITON_CACHE_DIR"]).rglob("cuda_utils*.so")
    make_driver(library, tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=without_a_compiler(built, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "built-in" in ran.stdout


def test_without_it_a_compiler_is_asked_for(built: dict[str, str], tmp_path: Path) -> None:
    """So the test above passes for the reason it gives."""
    shutil.rmtree(built["TRITON_CACHE_DIR"])
    ran = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=without_a_compiler(built, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode != 0
    assert "/nonexistent/cc" in ran.stderr
