"""Times uld-serve and what a user would pick instead in one run, job by job in turn, on the same prompts; prints a
table and, with --json, one JSON line last. `python benchmarks/peers/run.py --json`; see README.md."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path

import torch
from peer import Job
from roster import PEERS, PROFILE, VLLM
from transformers import AutoTokenizer
from worker import Speed, Unavailable, Worker

from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Json, Reporter
from uld_serve.model.loading import cache_dir, embedded_model_dir

HERE = Path(__file__).parent
OURS = "ours-unlearned"
WARM_UP_TOKENS = 4
COLUMNS = ("peer", "batch", "tokens/s", "slowest-fastest", f"{OURS} over it", "note")
TOPICS = (
    "the sea", "a railway", "two brothers", "a garden in winter", "the first aeroplane", "bread", "a lighthouse",
    "mathematics", "a lost dog", "the moon", "an old library", "rivers", "a violin", "chess", "the desert", "trade",
)  # fmt: skip

Runs = dict[str, dict[int, list[Speed]]]
"""Peer -> batch size -> one speed a round."""


def main() -> int:
    args = _arguments()
    reporter = Reporter(as_json=args.json)
    environment = Environment.look(torch.device("cpu"))
    reporter.begin(environment)
    runs, reasons = _run_all(args, reporter)
    results = [_result(name, batch, runs[name].get(batch, [])) for batch in args.batch for name in args.peers]
    ratios = {str(batch): _ratios(batch, runs) for batch in args.batch}
    title = f"{args.new_tokens} tokens, greedy, {args.rounds} rounds in turn"
    reporter.table(title, COLUMNS, [_row(one, ratios) for one in results])
    for name in args.peers:
        reporter.console.print(f"{name}: {PEERS[name].what}")
    for name, reason in reasons.items():
        reporter.console.print(f"{name} did not run: {reason}")
    names = ("new_tokens", "rounds", "slow_rounds", "threads", "time_limit", "assistant_layers")
    reporter.end(
        {
            "results": results,
            "ratios": ratios,
            "not_run": reasons,
            "settings": {"profile": PROFILE, **{name: getattr(args, name) for name in names}},
            "environment": environment.record(),
        }
    )
    return 1 if reasons else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    slow = [name for name, peer in PEERS.items() if peer.is_slow]
    parser.add_argument("--slow-rounds", type=int, default=1, help=f"as many for {', '.join(slow)}")
    parser.add_argument("--assistant-layers", type=int, default=8, help="of the peers' assistants")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="the transformers peers stop a batch after this; their speed is then of the tokens made until then",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every peer")
    parser.add_argument(
        "--vllm-environment", type=Path, default=cache_dir() / "peers" / VLLM.replace("==", "-")
    )
    parser.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")
    args = parser.parse_args()
    if min(*args.batch, args.new_tokens, args.rounds, args.slow_rounds, args.threads) < 1:
        parser.error("--batch, --new-tokens, --rounds, --slow-rounds and --threads must be at least 1")
    return args


def _run_all(args: argparse.Namespace, reporter: Reporter) -> tuple[Runs, dict[str, str]]:
    """Every peer in turn, each round beginning with the next one; a peer that failed once is not asked again."""
    prompts = _prompts(embedded_model_dir())
    runs: Runs = {name: {} for name in args.peers}
    with ExitStack() as stack:
        workers, reasons = _workers(args, stack, reporter)
        jobs = len(args.batch) * (args.rounds + 1) * len(workers)
        with reporter.progress("jobs", jobs) as advance:
            for batch in args.batch:
                _ask_all(
                    workers, reasons, Job(list(islice(prompts, batch)), WARM_UP_TOKENS, 60.0), 0, advance
                )
                for number in range(args.rounds):
                    job = Job(list(islice(prompts, batch)), args.new_tokens, args.time_limit)
                    asked = {
                        name: worker
                        for name, worker in workers.items()
                        if number < args.slow_rounds or not PEERS[name].is_slow
                    }
                    for name, speed in _ask_all(asked, reasons, job, number, advance).items():
                        runs[name].setdefault(batch, []).append(speed)
    return runs, reasons


def _workers(
    args: argparse.Namespace, stack: ExitStack, reporter: Reporter
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Every peer's process with its model loaded, one after the other; and why the others have none."""
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    for name in args.peers:
        with reporter.console.status(f"loading {name}"):
            try:
                workers[name] = stack.enter_context(_worker(name, args))
            except Unavailable as error:
                reasons[name] = str(error)
    return workers, reasons


@contextmanager
def _worker(name: str, args: argparse.Namespace) -> Iterator[Worker]:
    peer = PEERS[name]
    command = [
        str(peer.python(args.vllm_environment)), str(HERE / peer.script), "--model", str(embedded_model_dir()),
        "--max-batch", str(max(args.batch)), "--assistant-layers", str(args.assistant_layers),
        "--threads", str(args.threads), *peer.arguments,
    ]  # fmt: skip
    environment = peer.environment(args.vllm_environment)
    worker = Worker(command, {"GOMP_SPINCOUNT": "10000", "HF_HUB_OFFLINE": "1", **environment})
    try:
        yield worker
    finally:
        worker.close()


def _ask_all(
    workers: Mapping[str, Worker],
    reasons: dict[str, str],
    job: Job,
    number: int,
    advance: Callable[[], None],
) -> dict[str, Speed]:
    """The job's speed by peer; what fails goes into `reasons`."""
    names = list(workers)
    start = number % max(len(names), 1)
    speeds: dict[str, Speed] = {}
    for name in names[start:] + names[:start]:
        if name not in reasons:
            try:
                speeds[name] = workers[name].run(job)
            except Unavailable as error:
                reasons[name] = str(error)
        advance()
    return speeds


def _prompts(model: Path) -> Iterator[list[int]]:
    """Questions of about the same length through the chat template, none twice: a peer with a prefix cache would
    skip its prefill. All begin with the template's own system prompt, as a server's requests do."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for number in count():
        topic = TOPICS[number % len(TOPICS)]
        question = f"Number {number}: tell a long story about {topic}, with many details, in simple words."
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield tokenizer.encode(text, add_special_tokens=False)


def _result(name: str, batch: int, speeds: list[Speed]) -> dict[str, Json]:
    if not speeds:
        return {"peer": name, "batch": batch, "tokens_per_s": None}
    each = [speed.tokens_per_s for speed in speeds]
    return {
        "peer": name,
        "batch": batch,
        "tokens_per_s": round(statistics.median(each), 2),
        "tokens_per_s_range": [round(min(each), 2), round(max(each), 2)],
        "rounds": len(each),
        "tokens": min(speed.tokens for speed in speeds),
        "is_whole": all(speed.is_whole for speed in speeds),
    }


def _ratios(batch: int, runs: Runs) -> dict[str, float]:
    """Our unlearned throughput over each other's, medians; above 1 we are faster."""
    medians = {
        name: statistics.median(speed.tokens_per_s for speed in by_batch[batch])
        for name, by_batch in runs.items()
        if batch in by_batch
    }
    if OURS not in medians:
        return {}
    return {
        f"{OURS}/{name}": round(medians[OURS] / median, 4) for name, median in medians.items() if name != OURS
    }


def _row(result: Mapping[str, Json], ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    name, batch, spread = str(result["peer"]), str(result["batch"]), result.get("tokens_per_s_range")
    if not isinstance(spread, list):
        return [name, batch, "-", "-", "-", "did not run"]
    factor = ratios[batch].get(f"{OURS}/{name}")
    return [
        name,
        batch,
        f"{result['tokens_per_s']:.1f}",
        f"{spread[0]:.1f}-{spread[1]:.1f}",
        "" if factor is None else f"{factor:.2f}x",
        "" if result["is_whole"] else "time limit",
    ]


if __name__ == "__main__":
    # Ended by default on the spot, it would leave processes behind that are stopped and never go on.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
