"""`make deploy-test`: deploy/README.md's first start, command by command, and what the container may do. In a Debian
root made by debootstrap, on a Docker engine of its own that ends with it. Needs root; standard library only.

    python3 deploy/try_in_root.py [--work FOLDER]

First, with a network: two roots and the wheels of the locks, into the work folder. Then, in namespaces of its own and
without a network: the engine, the build, and the steps."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import engine_of_its_own
import first_start

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SUITE = "bookworm"
NEEDED = {"debootstrap": "debootstrap", "dockerd": "docker.io", "ip": "iproute2", "unshare": "util-linux"}
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
# No service may start while packages are installed.
POLICY = "#!/bin/sh\nexit 101\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "deploy-test", metavar="FOLDER")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.inside:
        return inside(work)
    missing = [package for command, package in NEEDED.items() if shutil.which(command) is None]
    if os.geteuid() != 0 or missing:
        print(
            f"needs root, and these Debian packages: {' '.join(missing) or 'all are there'}", file=sys.stderr
        )
        return 2
    work.mkdir(parents=True, exist_ok=True)
    once(work / "python", make_python_root)
    once(work / "services", make_services_root)
    get_wheels(work / "wheels")
    copy_tree(work / "tree")
    return subprocess.run([*NAMESPACES, sys.executable, __file__, "--inside", "--work", str(work)]).returncode


def inside(work: Path) -> int:
    # The program itself: the script that the package installs loses its exit status.
    compose = Path(sysconfig.get_path("purelib")) / "compose" / "docker-compose"
    with engine_of_its_own.running(work, compose=compose) as environment:
        engine_of_its_own.import_images(work, environment)
        return first_start.run(work / "tree", environment)


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """A root that is whole has its name; one that was broken off has another."""
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)


def make_python_root(folder: Path) -> None:
    """Stands in for python:3.11-slim."""
    packages = "--include=ca-certificates,python3,python3-venv"
    call("debootstrap", "--variant=minbase", packages, SUITE, str(folder))


def make_services_root(folder: Path) -> None:
    """Stands in for the images of Prometheus and nginx."""
    call("cp", "--archive", str(folder.with_name("python")), str(folder))
    policy = folder / "usr" / "sbin" / "policy-rc.d"
    policy.write_text(POLICY)
    policy.chmod(0o755)
    for command in (
        ["apt-get", "-q", "update"],
        ["apt-get", "-qy", "--no-install-recommends", "install", "prometheus", "nginx-light"],
    ):
        call("chroot", str(folder), "env", "DEBIAN_FRONTEND=noninteractive", *command)
    data = folder / "prometheus"  # whose owner a new volume takes over, as with Prometheus' own image
    data.mkdir()
    os.chown(data, 65534, 65534)


def get_wheels(folder: Path) -> None:
    """pip as it is set up here; the hashes are the locks'."""
    locks = {name: ROOT / "deploy" / "locks" / f"{name}.txt" for name in ("cpu", "build", "model")}
    wanted = "".join(lock.read_text("utf-8") for lock in locks.values())
    whole = folder / "locks.txt"
    if whole.exists() and whole.read_text("utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for lock in locks.values():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        what = ["--require-hashes", "--only-binary", ":all:", "--no-deps", "-r", str(lock)]
        call(*pip, *what, "-d", str(folder))
    whole.write_text(wanted, "utf-8")


def copy_tree(folder: Path) -> None:
    """What git knows of, as it lies here."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def call(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
