"""Compiles, while the image is built, the one C file that Triton would need a compiler for at run time. Run by the
Dockerfile. Needs no GPU: an empty libcuda.so.1 is linked against, and the real one is loaded in its place later.

In Triton 3.7.1 (which PyTorch 2.13 for CUDA asks for) and 3.9.0, backends/nvidia/driver.py compiles its driver.c as
`cuda_utils` before the first launch, and nothing else. 3.6.0 also compiled a launcher for every signature of a kernel,
which nobody can do beforehand. Kernels themselves need no C compiler: LLVM and ptxas come in Triton's wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIBCUDA = "libcuda.so.1"


def main() -> int:
    """0 when the library lies in $TRITON_CACHE_DIR under the name that Triton looks for."""
    link_against_nothing(Path(os.environ["TRITON_LIBCUDA_PATH"]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CC"] = str(compiler_that_keeps_libraries(Path(folder)))
        compile_driver()
    found = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("cuda_utils*.so"))
    print(*found, sep="\n")
    return 0 if len(found) == 1 else 1


def link_against_nothing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"-Wl,-soname,{LIBCUDA}"
    command = ["gcc", "-shared", "-fPIC", name, "-x", "c", os.devnull, "-o", str(folder / LIBCUDA)]
    subprocess.run(command, check=True)


def compiler_that_keeps_libraries(folder: Path) -> Path:
    """gcc, but that it writes down that libcuda is needed although the empty one gives it nothing."""
    path = folder / "cc"
    path.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n')
    path.chmod(0o755)
    return path


def compile_driver() -> None:
    """Raises ImportError, unless all that is wrong with the library is that there is no driver here."""
    from triton.backends.nvidia import driver

    try:
        driver.CudaUtils()
    except ImportError as error:
        if f"{LIBCUDA}: cannot open" not in str(error):
            raise


if __name__ == "__main__":
    sys.exit(main())
