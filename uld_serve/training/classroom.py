"""The base with the adapters that a run has taught so far: lessons one after another, a teacher's states handed to the
next. Called by run. Knows no profile directory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from uld_serve.model.loading import Base
from uld_serve.profiles.profile import RuleSpec
from uld_serve.training.assistant import Assistant
from uld_serve.training.early_stop import EarlyStop
from uld_serve.training.examples import Example, Kind
from uld_serve.training.lessons import Lessons
from uld_serve.training.measure import Fusion, Likelihood, likelihood, protected_ids
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.methods.method import Lesson
from uld_serve.training.place import Place
from uld_serve.training.preparation import Prepared
from uld_serve.training.settings import Settings
from uld_serve.training.sources import Stage
from uld_serve.training.start import solve_start
from uld_serve.training.states import Observed, collate, observe
from uld_serve.training.trainer import Report, fit
from uld_serve.training.work_folder import WorkFolder

# What one nat of retention weighs against one of forgetting when checkpoints are compared.
RETAIN_EXCHANGE = 10.0
TEACHER_BATCH = 16
NUM_REHEARSED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a run tells what it does. `trackers` are names that the Trainer's report_to takes."""

    stage: Stage
    report: Report
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What one lesson takes, measured on a few examples. Bytes are of what is kept of each example meanwhile."""

    adapter: str
    place: Place
    parameters: int
    steps: int
    seconds_a_step: float
    seconds_an_example: float
    bytes_an_example: int


class Classroom:
    """The base with the adapters that a run has taught so far."""

    def __init__(
        self,
        base: Base,
        settings: Settings,
        prepared: Prepared,
        *,
        rule: RuleSpec,
        work: WorkFolder,
        watch: Watch,
    ) -> None:
        self._base, self._settings, self._prepared = base, settings, prepared
        self._rule, self._work, self._watch = rule, work, watch
        self._method = METHODS[settings.method]
        self._lessons = self._method.lessons(settings)
        self._attention = base.model.config._attn_implementation
        self._carrier: PreTrainedModel | PeftModel = base.model
        self._assistants: dict[str, Assistant] = {}
        self._read: dict[tuple[Place, Kind], list[Observed]] = {}

    def teach(self, *, resume: bool) -> dict[str, list[dict[str, float]]]:
        """Every lesson in turn; the logs by adapter. Raises DataError."""
        return {lesson.adapter: self._teach(lesson, resume=resume) for lesson in self._lessons}

    def rehearse(self) -> list[Rehearsal]:
        """One step of every lesson, timed, and thrown away."""
        return [self._rehearse(lesson) for lesson in self._lessons]

    def _rehearse(self, lesson: Lesson) -> Rehearsal:
        assistant = self._enrol(lesson)
        started = time.monotonic()
        pools = self._observe_all(lesson)
        observed = [one for pool in pools.values() for one in pool]
        seen = time.monotonic()
        lessons = Lessons(pools, self._settings)
        batch = collate([lessons[number] for number in range(lessons.batch_size)])
        step_seconds = []
        for _ in range(NUM_REHEARSED):
            before = time.monotonic()
            assistant(**batch)["loss"].backward()
            step_seconds.append(time.monotonic() - before)
        assistant.zero_grad()
        parameters = assistant.trained().values()
        return Rehearsal(
            adapter=lesson.adapter,
            place=lesson.place,
            parameters=sum(one.numel() for one in parameters),
            steps=self._settings.steps if lesson.steps is None else lesson.steps,
            seconds_a_step=min(step_seconds) * self._settings.grad_accum,
            seconds_an_example=(seen - started) / len(observed),
            bytes_an_example=sum(one.num_bytes for one in observed) // len(observed),
        )

    def _enrol(self, lesson: Lesson) -> Assistant:
        settings = self._settings if not lesson.steps else replace(self._settings, steps=lesson.steps)
        assistant = Assistant(
            self._carrier, lesson=lesson, settings=settings, vocab_size=self._base.vocab_size
        )
        self._carrier = assistant.peft
        self._assistants[lesson.adapter] = assistant
        assistant.set_named(self._prepared.named_ids)
        return assistant

    def _observe_all(self, lesson: Lesson) -> dict[Kind, list[Observed]]:
        return {kind: self._observe(lesson, pool) for kind, pool in self._prepared.pools.items()}

    def _teach(self, lesson: Lesson, *, resume: bool) -> list[dict[str, float]]:
        assistant = self._enrol(lesson)
        settings = assistant.settings
        log: list[dict[str, float]] = []
        if lesson.steps != 0:
            pools = self._observe_all(lesson)
            if lesson is self._lessons[-1]:
                self._read.clear()
            if settings.start == "solved":
                solve_start(assistant, pools, quiet=settings.start_quiet)
            folder = self._work.lesson(lesson.adapter)
            self._watch.stage(f"training {lesson.adapter}", settings.steps)
            log = fit(
                assistant,
                pools,
                settings,
                folder=folder,
                resume=resume,
                report=self._watch.report,
                early_stop=self._early_stop(lesson, folder),
                trackers=self._watch.trackers,
            )
        for parameter in assistant.trained().values():
            # As stored and served, so that it is what is measured.
            parameter.data = parameter.data.to(self._base.dtype)
        return log

    def _observe(self, lesson: Lesson, examples: Sequence[Example]) -> list[Observed]:
        if not examples or examples[0].kind not in lesson.kinds:
            return []
        seen = self._read_at(lesson.place, examples, adapter=lesson.adapter)
        return seen if lesson.teacher is None else self._taught(seen, examples, lesson.teacher)

    def _read_at(self, place: Place, examples: Sequence[Example], *, adapter: str) -> list[Observed]:
        """All examples of one kind as the target sees them; kept for a later lesson that a teacher there helps."""
        kind = Kind(examples[0].kind)
        if (place, kind) in self._read:
            return self._read[place, kind]
        advance = self._watch.stage(f"the target reads for {adapter}: {kind.name.lower()}", len(examples))
        assistant = self._assistants[adapter]
        with assistant.peft.disable_adapter():
            seen = observe(
                assistant.model,
                examples,
                place=place,
                num_top=self._settings.num_top,
                vocab_size=assistant.vocab_size,
                advance=advance,
            )
        if any(lesson.teacher is not None for lesson in self._lessons):
            self._read[place, kind] = seen
        return seen

    def _taught(self, seen: Sequence[Observed], examples: Sequence[Example], teacher: str) -> list[Observed]:
        """With the last hidden states of an earlier lesson's adapter."""
        assistant, found = self._assistants[teacher], []
        before = self._read_at(assistant.place, examples, adapter=teacher)
        for start in range(0, len(seen), TEACHER_BATCH):
            part = slice(start, start + TEACHER_BATCH)
            with torch.no_grad():
                hidden_ND = assistant.hidden(collate(before[part]))
            states = torch.split(hidden_ND, [len(one.answer_ids) for one in examples[part]])
            found += [
                replace(one, teacher_QE=state.clone()) for one, state in zip(seen[part], states, strict=True)
            ]
        return found

    def _early_stop(self, lesson: Lesson, folder: Path) -> EarlyStop | None:
        """For the last lesson only: before it there is nothing whole to be measured."""
        if not self._settings.patience or lesson.adapter != self._lessons[-1].adapter:
            return None

        def score() -> float:
            measured = self.measure(self.fusion(), lambda _what, _total: lambda _count: None)
            return measured["forget"].rise - RETAIN_EXCHANGE * max(measured["retain"].rise, 0.0)

        folder.mkdir(parents=True, exist_ok=True)
        return EarlyStop(score, self._settings.patience, folder)

    def fusion(self) -> Fusion:
        """What will be served, as far as it has been taught."""
        roles = {role: self._assistants[adapter] for role, adapter in self._method.roles.items()}
        served = [one for one in self._assistants.values() if one.lesson.is_served]
        return Fusion(
            rule=self._rule,
            roles=roles,
            target=served[0] if self._method.changes_target else None,
            protected_ids=protected_ids(self._base),
        )

    def measure(self, fusion: Fusion, stage: Stage) -> dict[str, Likelihood]:
        """What the rule does to the held-out answers, by "forget" and "retain"; nothing without held-out prompts."""
        measured = {}
        for name, pairs in self.held_out.items():
            advance = stage(f"measuring: {name}", 1)
            measured[name] = likelihood(fusion, pairs)
            advance(1)
        return measured

    @property
    def held_out(self) -> dict[str, list[tuple[Sequence[int], Sequence[int]]]]:
        """Prompts and answers that no lesson saw, by "forget" and "retain" where there are any."""
        groups = {"forget": self._prepared.probe_forget, "retain": self._prepared.probe_retain}
        return {
            name: [(one.prompt_ids, one.answer_ids) for one in group]
            for name, group in groups.items()
            if group
        }

    def save(self, folder: Path) -> dict[str, Path]:
        """The served adapters in PEFT's format, by name."""
        served = [name for name, one in self._assistants.items() if one.lesson.is_served]
        assert isinstance(self._carrier, PeftModel)
        self._carrier.save_pretrained(str(folder), selected_adapters=served)
        return {name: folder / name for name in served}

    def leave(self) -> None:
        """Give the base back as it was, also where a lesson was broken off."""
        if isinstance(self._carrier, PeftModel):
            self._carrier.unload().eval()
        self._base.model.set_attn_implementation(self._attention)
