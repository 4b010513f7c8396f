"""`uld-serve bench`: picks one of its measurements. Called by cli; each module gives SUMMARY, add_arguments(parser)
and run(args) -> exit status."""

from __future__ import annotations

import argparse

from uld_serve.bench import decode, growth, memory, prefill, sampler, serve, turns

MEASUREMENTS = {
    "decode": decode,
    "prefill": prefill,
    "sampler": sampler,
    "turns": turns,
    "growth": growth,
    "memory": memory,
    "serve": serve,
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("bench", help="measure decode, prefill, the sampler or the server")
    chosen = parser.add_subparsers(metavar="WHAT", required=True)
    for name, module in MEASUREMENTS.items():
        own = chosen.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(own)
        own.set_defaults(measure=module.run)


def run(args: argparse.Namespace) -> int:
    status: int = args.measure(args)
    return status
