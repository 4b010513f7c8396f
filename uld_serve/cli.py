"""The `uld-serve` command: picks a subcommand and turns errors into one line and an exit status.

Only the chosen subcommand's module is imported, so that `--help` and `--version` do not wait for torch.
Knows nothing of what a subcommand does: each module gives add_parser(subparsers) and run(args) -> exit
status.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from uld_serve import __version__
from uld_serve.errors import UldError

COMMANDS = {
    "serve": ("uld_serve.server.command", "serve the OpenAI-compatible API"),
    "ray": ("uld_serve.fleet.command", "serve from many replicas on a Ray cluster"),
    "vllm": (
        "uld_serve.vllm_plugin.command",
        "serve profiles from inside vLLM, for all requests of one server",
    ),
    "generate": ("uld_serve.generate", "answer prompts offline, without and with a profile"),
    "train": ("uld_serve.training.command", "train a profile from forget and retain data"),
    "eval": ("uld_serve.evaluation.command", "figures that unlearning is judged by"),
    "tune": ("uld_serve.evaluation.tune", "choose a profile's strength and filter on held-out data"),
    "bench": ("uld_serve.bench.command", "measure decode, prefill or the server"),
    "model": ("uld_serve.model.command", "convert the embedded model once and print its directory"),
    "profiles": ("uld_serve.profiles.command", "list, show, verify or merge profiles"),
    "keys": ("uld_serve.server.keys_command", "make, list or revoke API keys"),
    "demo": ("uld_serve.server.demo", "one question, two answers, through a real server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 2 for an error that the user can act on, 130 for Ctrl-C."""
    # Read by GNU OpenMP when torch is imported: how long a thread spins before it sleeps. A decode step of SmolLM2 on
    # 2 cores takes 58 ms when threads sleep at once, 38 when they spin this little; on a busy machine 95 and 181, but
    # 1,780 with the library's own 30 times as much.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        parser, module = _build(chosen)
        args = parser.parse_args(arguments)
        if module is None:
            parser.print_help()
            return 0
        status: int = module.run(args)
        sys.stdout.flush()
        return status
    except UldError as error:
        print(f"uld-serve: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("uld-serve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`uld-serve profiles list | head`); keep the interpreter from writing to it
        # again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _build(chosen: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    parser = argparse.ArgumentParser(
        prog="uld-serve", description="Forgetting at decode time, per request.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"uld-serve {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    module = None
    for name, (path, summary) in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(path)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, module
