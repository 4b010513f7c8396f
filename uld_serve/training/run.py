"""One training run from files to a profile directory: prepare, observe, fit, measure, write. Called by command.
Knows no command line; what passes to serving is the directory alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from uld_serve import __version__
from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.profiles.probes import Message, Probe, Probes, ReplayProbe
from uld_serve.profiles.profile import BaseSpec, Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import write_profile
from uld_serve.training import measure
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Example, Kind
from uld_serve.training.preparation import AnswerBook, Answered, Prepared, Sources, Stage, prepare
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed, observe
from uld_serve.training.trainer import Report, fit

ADAPTER = "adapter"
NUM_REPLAY = 2
NUM_REPLAY_TRIED = 6
REPLAY_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    version: ProfileVersion
    record: dict[str, object]
    forget_rise: float | None
    """Nats a token by which the rule makes held-out forget answers less likely; None without held-out prompts."""


def train(
    base: Base,
    sources: Sources,
    settings: Settings,
    *,
    name: str,
    out: Path,
    resume: bool,
    readme: str | None,
    stage: Stage,
    report: Report,
) -> Outcome:
    """Train and write the profile `out`, whole or not at all. `base.model` carries the adapter afterwards.

    Work in progress lies in a folder beside `out` until the profile is written; `resume` goes on from it.
    Raises DataError, ProfileError.
    """
    started = time.monotonic()
    refuse_existing(out)
    if settings.exit > base.num_layers:
        raise DataError(f"--exit {settings.exit} is beyond the base's {base.num_layers} layers")
    profile = _profile(base, settings, name)
    work = _open_work(out, base, settings, sources, resume=resume)
    prepared = prepare(base, sources, settings, book=AnswerBook(work / "answers.json"), stage=stage)
    probes = _probes(prepared, sources.keywords)  # now, not after training: they may be refused
    assistant = Assistant(base.model, settings=settings, vocab_size=base.vocab_size)
    assistant.set_named(prepared.named_ids)
    pools = {kind: _observe(assistant, pool, settings, stage) for kind, pool in prepared.pools.items()}
    log = fit(assistant, pools, settings, folder=work / "checkpoints", resume=resume, report=report)
    for parameter in assistant.trained().values():
        parameter.data = parameter.data.to(base.dtype)  # as stored and served, so that it is what is measured
    record = _record(settings, prepared, log)
    measured = _measure(base, assistant, prepared, profile.rule, stage)
    record["measured"] = {name: found.rounded() for name, found in measured.items()}
    advance = stage("recording replay probes", 1)
    probes = probes.model_copy(update={"replay": _replay(base, assistant, prepared, profile.rule)})
    advance(1)
    record["seconds"] = round(time.monotonic() - started, 1)
    with TemporaryDirectory() as folder:
        assistant.peft.save_pretrained(folder)
        written = write_profile(
            out, profile, adapters={ADAPTER: Path(folder)}, probes=probes, training=record, readme=readme
        )
    shutil.rmtree(work)
    return Outcome(written, record, measured["forget"].rise if "forget" in measured else None)


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise DataError(f"{out} exists and a profile is never overwritten; remove it or choose another --out")


def _profile(base: Base, settings: Settings, name: str) -> Profile:
    kind = "subtract" if settings.method == "uld" else "relu_difference"
    spec = BaseSpec(
        id=base.id,
        fingerprint=base.fingerprint,
        tokenizer=base.tokenizer_hash,
        vocab_size=base.vocab_size,
        num_layers=base.num_layers,
    )
    stream = StreamSpec(
        name="assistant", fork=settings.fork, exit=settings.exit, kv="borrowed", adapter=ADAPTER
    )
    try:
        rule = RuleSpec.model_validate({"kind": kind, "strength": settings.strength})
        return Profile(name=name, method=settings.method, base=spec, streams=(stream,), rule=rule)
    except ValidationError as error:
        raise DataError(f"this would not be a valid profile: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _open_work(out: Path, base: Base, settings: Settings, sources: Sources, *, resume: bool) -> Path:
    work = out.parent / f".{out.name}.training"
    paths = (sources.forget, sources.retain, sources.probe_forget, sources.probe_retain)
    facts = {
        "base": [base.fingerprint, str(base.dtype)],
        "settings": asdict(settings),
        "sources": asdict(sources),
        "contents": [_content_digest(path) for path in paths if path],
    }
    told = json.dumps(facts, default=str, sort_keys=True)
    marker = work / "run.json"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    elif not marker.is_file():
        raise DataError(f"there is nothing to resume: {work} does not exist; start without --resume")
    elif marker.read_text() != told:
        raise DataError(
            f"the run in {work} had another base, other options or other files; repeat them, or start without "
            "--resume"
        )
    work.mkdir(parents=True, exist_ok=True)
    marker.write_text(told)
    return work


def _content_digest(path: Path) -> str:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def _observe(
    assistant: Assistant, examples: Sequence[Example], settings: Settings, stage: Stage
) -> list[Observed]:
    if not examples:
        return []
    kind = Kind(examples[0].kind).name.lower()
    with assistant.peft.disable_adapter():
        return observe(
            assistant.model,
            examples,
            fork=settings.fork,
            exit=settings.exit,
            num_top=settings.num_top,
            vocab_size=assistant.vocab_size,
            advance=stage(f"the target reads: {kind}", len(examples)),
        )


def _record(settings: Settings, prepared: Prepared, log: Sequence[dict[str, float]]) -> dict[str, object]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    return {
        "settings": asdict(settings),
        "data": prepared.record,
        "log": [dict(entry) for entry in log if "loss" in entry],
        "versions": {"uld-serve": __version__, **libraries},
    }


def _measure(
    base: Base,
    assistant: Assistant,
    prepared: Prepared,
    rule: RuleSpec,
    stage: Stage,
) -> dict[str, measure.Likelihood]:
    """What the rule does to the held-out answers."""
    groups = {"forget": prepared.probe_forget, "retain": prepared.probe_retain}
    protected_ids = measure.protected_ids(base)
    measured: dict[str, measure.Likelihood] = {}
    for name, group in groups.items():
        if group:
            advance = stage(f"measuring: {name}", 1)
            seen = _seen(assistant, [(one.prompt_ids, one.answer_ids) for one in group])
            found = measure.likelihood(assistant, seen, rule, protected_ids=protected_ids)
            measured[name] = found
            advance(1)
    return measured


def _probes(prepared: Prepared, keywords: tuple[str, ...]) -> Probes:
    """The held-out prompts with the base's answers; replays come after training. Raises DataError."""
    try:
        return Probes(
            keywords=keywords,
            forget=tuple(_probe(one) for one in prepared.probe_forget),
            retain=tuple(_probe(one) for one in prepared.probe_retain),
        )
    except ValidationError as error:
        raise DataError(f"the held-out prompts cannot be put into a profile: {_first(error)}") from error


def _seen(assistant: Assistant, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Observed]:
    examples = [
        Example(tuple(prompt), tuple(answer), Kind.RETAIN, (0.0,) * len(answer)) for prompt, answer in pairs
    ]
    layers = assistant.layers
    with assistant.peft.disable_adapter():
        return observe(
            assistant.model,
            examples,
            fork=layers.start,
            exit=layers.stop,
            num_top=1,
            vocab_size=assistant.vocab_size,
        )


def _probe(one: Answered) -> Probe:
    if not one.document.messages:
        raise DataError(f"{one.document.where}: a held-out prompt must be a question or messages")
    messages = tuple(Message.model_validate(message.as_dict()) for message in one.document.messages)
    return Probe(messages=messages, answer_ids=tuple(one.answer_ids), form=one.document.form)


def _replay(base: Base, assistant: Assistant, prepared: Prepared, rule: RuleSpec) -> tuple[ReplayProbe, ...]:
    """The profile's own greedy answers: never filtered, so their likelihood is finite. Of some forget prompts, those
    whose answers the base finds least likely: without the adapter, or with another, they would stand out."""
    forget = _replays_of(prepared.pools[Kind.FORGET][:NUM_REPLAY_TRIED], base, assistant, rule)
    telling = sorted(forget, key=lambda probe: probe.nll_fused - probe.nll_base)
    return (
        *telling[:NUM_REPLAY],
        *_replays_of(prepared.pools[Kind.RETAIN][:NUM_REPLAY], base, assistant, rule),
    )


def _replays_of(
    examples: Sequence[Example], base: Base, assistant: Assistant, rule: RuleSpec
) -> list[ReplayProbe]:
    prompts = [list(one.prompt_ids) for one in examples]
    protected_ids = measure.protected_ids(base)
    answers = measure.generate(
        assistant, prompts, rule, protected_ids=protected_ids, end_ids=base.eos_ids, max_tokens=REPLAY_TOKENS
    )
    probes = []
    for pair in zip(prompts, answers, strict=True):
        found = measure.likelihood(assistant, _seen(assistant, [pair]), rule, protected_ids=protected_ids)
        if found.removed == 0:
            nlls = {"nll_base": max(found.nll_base, 0.0), "nll_fused": max(found.nll_served, 0.0)}
            probes.append(ReplayProbe(prompt_ids=tuple(pair[0]), answer_ids=tuple(pair[1]), **nlls))
    return probes
