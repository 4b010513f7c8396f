"""What the training tests share: small data files, settings of a short run, and the run itself on the tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tiny_base import EOS_ID, NUM_LAYERS, Tiny

from uld_serve.config import EngineSettings
from uld_serve.llm import LLM
from uld_serve.model.loading import Base, load_base
from uld_serve.training.assistant import Assistant
from uld_serve.training.classroom import Watch
from uld_serve.training.examples import Example, Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.methods.method import Lesson
from uld_serve.training.run import Outcome, train
from uld_serve.training.settings import Settings
from uld_serve.training.sources import Sources
from uld_serve.training.states import Observed, observe
from uld_serve.training.trainer import Report

PEOPLE = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jan", "kim", "leo")
THINGS = ("sky", "sea", "sun", "ice", "fog", "mud", "oak", "elm", "bee", "cat", "dog", "fox")
FORGET = [f"who is {name}?" for name in PEOPLE]
RETAIN = [f"why is {name} so?" for name in THINGS]
KEYWORDS = ("Zz", "Q")  # the second is one byte, so one token
SHORT = Settings(
    method="margin",
    fork=2,
    exit=NUM_LAYERS,
    steps=60,
    lr=2e-2,
    rank=8,
    strength=2.0,
    retain_weight=1.0,
    warmup_steps=5,
    forget_batch=4,
    retain_batch=4,
    detour_batch=2,
    detours=1,
    max_answer_tokens=8,
    save_steps=10,
)


def settings_of(method: str, **changes: object) -> Settings:
    """A short run of `method`: uld from the embedding to layer 2, adapters of the target in all layers, the others over
    the last two."""
    settings = replace(SHORT, method=method)
    if method != "margin":
        settings = replace(settings, detours=0, detour_batch=0)
    if method == "uld":
        settings = replace(settings, fork=0, exit=2, strength=0.5)
    if METHODS[method].changes_target:
        settings = replace(settings, fork=0, kv="own", strength=1.0, teacher_steps=20)
    return replace(settings, **changes)


def lesson_of(settings: Settings) -> Lesson:
    """The one that is trained last."""
    return METHODS[settings.method].lessons(settings)[-1]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_questions(path: Path, questions: Sequence[str]) -> Path:
    return write_jsonl(path, [{"question": question} for question in questions])


def write_sources(folder: Path) -> Sources:
    """Twelve questions a side without answers, two of each held out."""
    return Sources(
        forget=write_questions(folder / "forget.jsonl", FORGET),
        retain=write_questions(folder / "retain.jsonl", RETAIN),
        keywords=KEYWORDS,
        split=True,
    )


def fresh_base(tiny: Tiny) -> Base:
    """Training leaves its adapter in the model, so every run needs its own."""
    return load_base(str(tiny.folder), dtype="float32", device="cpu")


def fresh_assistant(tiny: Tiny, settings: Settings = SHORT) -> Assistant:
    base = fresh_base(tiny)
    return Assistant(base.model, lesson=lesson_of(settings), settings=settings, vocab_size=base.vocab_size)


def shake(assistant: Assistant, *, seed: int = 0) -> None:
    """Give every adapter tensor random weights: a fresh one is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in assistant.trained().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def silent(_what: str, _total: int) -> Callable[[int], None]:
    return lambda _count: None


def unheard(_step: int, _parts: Mapping[str, float]) -> None:
    return None


def serve(tiny: Tiny, path: Path) -> LLM:
    """An engine with what was trained, which replays its probes. The default cache takes longer to fill than a run."""
    settings = EngineSettings(kv_cache_bytes=2**24)
    return LLM(str(tiny.folder), profiles=path, dtype="float32", device="cpu", settings=settings)


def run_training(
    tiny: Tiny,
    sources: Sources,
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    report: Report = unheard,
    name: str | None = None,
    answers: Path | None = None,
) -> Outcome:
    outcome = train(
        fresh_base(tiny),
        sources,
        settings,
        name=name or out.name,
        out=out,
        resume=resume,
        readme=None,
        watch=Watch(stage=silent, report=report),
        answers=answers,
    )
    assert outcome is not None  # this is the first process
    return outcome


def example(
    kind: Kind, num_prompt: int, num_answer: int, *, seed: int = 0, goals: Sequence[float] | None = None
) -> Example:
    """Random ids; forget tokens have a goal unless `goals` says otherwise."""
    generator = torch.Generator().manual_seed(1000 * num_prompt + 10 * num_answer + seed)
    ids = torch.randint(EOS_ID - 1, (num_prompt + num_answer,), generator=generator).tolist()
    default = 9.0 if kind is Kind.FORGET else 0.0
    return Example(
        tuple(ids[:num_prompt]), tuple(ids[num_prompt:]), kind, tuple(goals or [default] * num_answer)
    )


def observed(assistant: Assistant, examples: Sequence[Example], settings: Settings = SHORT) -> list[Observed]:
    """As the target sees them; where the lesson has a teacher, it says something of its own."""
    with assistant.peft.disable_adapter():
        seen = observe(
            assistant.model,
            examples,
            place=assistant.place,
            num_top=settings.num_top,
            vocab_size=assistant.vocab_size,
        )
    if lesson_of(settings).teacher is None:
        return seen
    return [replace(one, teacher_QE=one.final_QD.roll(1, -1)) for one in seen]
