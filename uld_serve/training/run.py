"""One training run from files to a profile directory: prepare, observe, fit, measure, write. Called by command.
Knows no command line; what passes to serving is the directory alone.

Several processes (`accelerate launch`) run this side by side; the first one alone writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from uld_serve import __version__
from uld_serve.errors import DataError
from uld_serve.model.heap import give_back
from uld_serve.model.loading import Base
from uld_serve.profiles.profile import BaseSpec, Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import write_profile
from uld_serve.training import probing
from uld_serve.training.classroom import Classroom, Watch
from uld_serve.training.examples import Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.methods.method import Lesson, Method
from uld_serve.training.preparation import Prepared, gather, prepare
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Sources
from uld_serve.training.work_folder import WorkFolder, content_digest


@dataclass(frozen=True, slots=True)
class Outcome:
    version: ProfileVersion
    record: dict[str, object]
    forget_rise: float | None
    """Nats a token by which the rule makes held-out forget answers less likely; None without held-out prompts."""
    logs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By adapter."""


def train(
    base: Base,
    sources: Sources,
    settings: Settings,
    *,
    name: str,
    out: Path,
    resume: bool,
    readme: str | None,
    watch: Watch,
    answers: Path | None = None,
) -> Outcome | None:
    """Train and write the profile `out`, whole or not at all. `base.model` is as it was afterwards.

    Work in progress lies in a folder beside `out` until the profile is written; `resume` goes on from it. `answers`
    is a file in which several runs share what the base says. None in every process but the first. Raises DataError,
    ProfileError.
    """
    started, processor = time.monotonic(), time.process_time()
    refuse_existing(out)
    method = METHODS[settings.method]
    profile = plan(base, sources, settings, name=name)
    processes, work = PartialState(), WorkFolder.beside(out)

    def read() -> Prepared:
        if processes.is_main_process:
            work.open(base, settings, sources, resume=resume)
        book = AnswerBook(answers or work.answers)
        return prepare(
            base, gather(sources), settings, keywords=sources.keywords, book=book, stage=watch.stage
        )

    prepared = _first_before_others(processes, read)
    give_back()
    settings = settings.for_data(
        num_forget=len(prepared.pools[Kind.FORGET]),
        num_detours=len(prepared.pools[Kind.DETOUR]),
        num_processes=processes.num_processes,
    )
    probes = probing.held_out(prepared, sources.keywords)  # now, not after training: they may be refused
    classroom = Classroom(base, settings, prepared, rule=profile.rule, work=work, watch=watch)
    try:
        logs = classroom.teach(resume=resume)
        if not processes.is_main_process:
            return None
        fusion = classroom.fusion()
        measured = classroom.measure(fusion, watch.stage)
        advance = watch.stage("recording replay probes", 1)
        replay = probing.replays(fusion, prepared, end_ids=base.eos_ids)
        advance(1)
        record = _record(settings, method, prepared, logs)
        record["base"] = {
            "id": base.id,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": base.device.type,
        }
        record["sources"] = _told(sources)
        record["measured"] = {name: found.rounded() for name, found in measured.items()}
        record["seconds"] = round(time.monotonic() - started, 1)
        record["cpu_seconds"] = round(time.process_time() - processor, 1)
        with TemporaryDirectory() as folder:
            written = write_profile(
                out,
                profile,
                adapters=classroom.save(Path(folder)),
                probes=probes.model_copy(update={"replay": replay}),
                training=record,
                readme=readme,
            )
    finally:
        classroom.leave()
    work.remove()
    return Outcome(written, record, measured["forget"].rise if "forget" in measured else None, logs)


def _first_before_others(processes: PartialState, read: Callable[[], Prepared]) -> Prepared:
    """What the first process refuses all refuse: one that went on alone would wait for the others for ever."""
    found, refusal = None, [""]
    if processes.is_main_process:
        try:
            found = read()
        except DataError as error:
            refusal = [str(error)]
    [reason] = broadcast_object_list(refusal)
    if reason:
        raise DataError(reason)
    return read() if found is None else found


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise DataError(f"{out} exists and a profile is never overwritten; remove it or choose another --out")


def plan(base: Base, sources: Sources, settings: Settings, *, name: str) -> Profile:
    """The profile that a run would write. Raises DataError for one that could not be."""
    if settings.patience and not sources.has_probes:
        raise DataError(
            "--patience needs held-out prompts: give --keywords, or --probe-forget and --probe-retain"
        )
    return _profile(base, settings, METHODS[settings.method], name)


def _profile(base: Base, settings: Settings, method: Method, name: str) -> Profile:
    if settings.exit > base.num_layers:
        raise DataError(f"--exit {settings.exit} is beyond the base's {base.num_layers} layers")
    lessons = [lesson for lesson in method.lessons(settings) if lesson.is_served]
    if method.changes_target and (settings.fork, settings.exit, settings.kv) != (0, base.num_layers, "own"):
        raise DataError(f"{method.name} puts its adapter into the target: leave out --fork, --exit and --kv")
    spec = BaseSpec(
        id=base.id,
        fingerprint=base.fingerprint,
        tokenizer=base.tokenizer_hash,
        vocab_size=base.vocab_size,
        num_layers=base.num_layers,
    )
    streams = [
        StreamSpec(
            name=_stream_name(lesson, lessons),
            fork=lesson.place.fork,
            exit=lesson.place.exit,
            kv=lesson.place.kv,
            adapter=lesson.adapter,
        )
        for lesson in lessons
    ]
    fields: dict[str, object] = (
        {"target_adapter": lessons[0].adapter} if method.changes_target else {"streams": streams}
    )
    try:
        rule = RuleSpec.model_validate(_rule(settings, method))
        return Profile.model_validate(
            {"name": name, "method": settings.method, "base": spec, "rule": rule, **fields}
        )
    except ValidationError as error:
        raise DataError(f"this would not be a valid profile: {probing.first_of(error)}") from error


def _stream_name(lesson: Lesson, lessons: Sequence[Lesson]) -> str:
    return "assistant" if len(lessons) == 1 else lesson.adapter


def _rule(settings: Settings, method: Method) -> dict[str, object]:
    rule: dict[str, object] = {"kind": method.rule}
    if method.rule != "identity":
        rule["strength"] = settings.strength * settings.output_scale
    if "dead_zone" in method.options:
        rule["dead_zone"] = settings.dead_zone
    if len(method.roles) > 1:
        rule["roles"] = dict(method.roles)
    given = {"mode": settings.filter, "tau": settings.tau, "min_keep": settings.min_keep}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        default = RuleSpec.model_validate(rule).filter.model_dump() if "mode" not in given else {}
        rule["filter"] = {**default, **given}
    return rule


def _told(sources: Sources) -> dict[str, object]:
    """What was read, without where it lay: a profile is given away."""
    return {
        "files": [{"name": path.name, "sha256": content_digest(path)} for path in sources.files],
        "keywords": list(sources.keywords),
        "uses_columns": sources.uses_columns,
        "split": sources.split,
    }


def _record(
    settings: Settings, method: Method, prepared: Prepared, logs: Mapping[str, Sequence[dict[str, float]]]
) -> dict[str, object]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    return {
        "method": {"name": method.name, "source": method.source},
        "settings": asdict(settings),
        "data": prepared.record,
        "log": logs,
        "processes": PartialState().num_processes,
        "versions": {"uld-serve": __version__, **libraries},
    }
