"""`uld-serve keys new | list | revoke`: API keys in server.toml, or in the file that it names as keys_file, as hashes.
A part of the command line; a running server learns of a change by SIGHUP."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

from uld_serve.server.key_file import add_key, file_of_keys, keys_of, remove_key
from uld_serve.server.keys import sha256_of
from uld_serve.server.settings import KeySettings, checked

SUMMARY = "make, list or revoke API keys"
PREFIX = "uld-"
NUM_RANDOM_BYTES = 32
SHOWN_HEX_DIGITS = 12
RELOAD = "a running server reads it on SIGHUP: kill -HUP PID"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("keys", help=SUMMARY, description=SUMMARY)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a key, print it once and keep its hash")
    listing = actions.add_parser("list", help="one line a key: what it may do")
    revoke = actions.add_parser("revoke", help="take a key out")
    for action in (new, revoke):
        action.add_argument("name")
    for action in (new, listing, revoke):
        action.add_argument(
            "--config",
            type=Path,
            default=Path("server.toml"),
            metavar="FILE",
            help="the settings that keys belong to (default: server.toml)",
        )
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_policy(new)


def _add_policy(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--mandatory", nargs="+", metavar="PROFILE", help="added to every request, whatever it asks"
    )
    new.add_argument(
        "--allowed", nargs="*", metavar="PROFILE", help="what it may ask for besides (default: any); or none"
    )
    new.add_argument("--default", nargs="+", metavar="PROFILE", help="applied where a request names nothing")
    new.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="may ask the base without a profile (default: no)",
    )
    new.add_argument("--logprobs", choices=("off", "fused"), help="default: only with --base")
    new.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at once")
    new.add_argument("--admin", action="store_true", default=None, help="for the admin listener")
    new.add_argument("--metrics", action="store_true", default=None, help="may read /metrics there")
    new.add_argument(
        "--fine-tune",
        action="store_true",
        default=None,
        help="may upload files and have profiles made of them",
    )


def run(args: argparse.Namespace) -> int:
    """0. Raises UldError for a name that is taken or unknown, or a file that cannot be written."""
    return {"new": _new, "list": _list, "revoke": _revoke}[args.action](args)


def _new(args: argparse.Namespace) -> int:
    key = PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)
    given = {
        "name": args.name,
        "sha256": sha256_of(key.encode()).hex(),
        "mandatory": args.mandatory,
        "allowed": args.allowed,
        "default": args.default,
        "allow_base": args.base,
        "logprobs": args.logprobs,
        "max_concurrency": args.max_concurrency,
        "admin": args.admin,
        "metrics": args.metrics,
        "fine_tune": args.fine_tune,
    }
    stated = {field: value for field, value in given.items() if value is not None}
    path = add_key(args.config, checked(KeySettings, stated, source="command line"))
    print(key)
    print(f"this key is shown only now; {path} has its hash; {RELOAD}", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    keys = keys_of(args.config)
    for key in keys:
        print(json.dumps(_shown(key)) if args.json else _line(key))
    if not keys:
        print(f"{file_of_keys(args.config)} has no keys", file=sys.stderr)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    path = remove_key(args.config, args.name)
    print(f"'{args.name}' is no longer in {path}; {RELOAD}", file=sys.stderr)
    return 0


def _shown(key: KeySettings) -> dict[str, object]:
    """What it may do, and enough of its hash to tell it from others."""
    policy = key.policy
    return {
        "name": key.name,
        "sha256": key.sha256[:SHOWN_HEX_DIGITS],
        "mandatory": sorted(policy.mandatory),
        "allowed": key.allowed,
        "default": sorted(policy.default),
        "allow_base": policy.allow_base,
        "logprobs": "fused" if policy.logprobs else "off",
        "max_concurrency": policy.max_concurrency,
        "admin": policy.is_admin,
        "metrics": policy.may_read_metrics,
        "fine_tune": policy.may_fine_tune,
    }


def _line(key: KeySettings) -> str:
    parts = _shown(key)
    told = [
        f"{field}={_words(parts[field])}"
        for field in list(parts)[2:]
        if parts[field] not in (None, [], False)
    ]
    return f"{key.name}  {parts['sha256']}…  {'  '.join(told)}"


def _words(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()
