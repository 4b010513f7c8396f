"""What a run would do, without doing it: what was read, a few examples as they are learnt from, one timed step of every
lesson, and what all of it takes. Called by command. Writes nothing that stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from uld_serve.data.documents import Document
from uld_serve.model.loading import Base
from uld_serve.training import answers
from uld_serve.training.classroom import Classroom, Rehearsal, Watch
from uld_serve.training.examples import Example, Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.preparation import Material, Prepared, gather, nothing_of, prepare
from uld_serve.training.run import plan
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Sources, Stage
from uld_serve.training.work_folder import WorkFolder

NUM_TRIED = 2
"""Documents of each set that are answered, read and stepped on."""

NUM_PACED = 3
"""Tokens after the first that a whole batch of prompts is answered with, to see how long answering takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """`examples` show how an example is learnt from: the prompt, and each answer token with its goal. Sizes and times
    are of the whole run, reckoned from what the tried examples took here; the base's weights are beside `bytes`."""

    data: dict[str, object]
    examples: list[dict[str, object]]
    lessons: list[dict[str, object]]
    num_examples: dict[str, int]
    answer_tokens_an_example: float
    seconds: dict[str, float]
    bytes: int

    def record(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    def lines(self) -> Iterator[str]:
        """For people. In an example's answer what is to be forgotten stands in brackets."""
        for name, count in cast("dict[str, int]", self.data["documents"]).items():
            yield f"{name}: {count} documents"
        for name, read in cast("dict[str, dict[str, object]]", self.data["read"]).items():
            if read["dropped"]:
                yield f"{name}: dropped {read['dropped']}"
        counts = ", ".join(f"{count} {kind}" for kind, count in self.num_examples.items())
        yield f"examples: {counts}; about {self.answer_tokens_an_example} answer tokens each"
        for one in self.examples:
            goals = cast("list[float]", one["goals"])
            pieces = zip(cast("list[str]", one["answer"]), goals, strict=True)
            answer = "".join(f"[{piece}]" if goal > 0 else piece for piece, goal in pieces)
            yield f"{one['kind']}: {one['prompt']!r} -> {answer!r}"
        for lesson in self.lessons:
            yield "; ".join(f"{name} {value}" for name, value in lesson.items())
        parts = ", ".join(f"{name} {value / 60:.1f} min" for name, value in self.seconds.items())
        yield f"{parts}; {self.bytes / 1e6:.0f} MB beside the base; nothing was written"


def forecast(base: Base, sources: Sources, settings: Settings, *, name: str, watch: Watch) -> Forecast:
    """Raises what the run itself would raise before it trains."""
    profile = plan(base, sources, settings, name=name)
    material = gather(sources)
    with TemporaryDirectory() as folder:
        book = AnswerBook(Path(folder) / "answers.json")
        prepared = _tried(base, material, settings, keywords=sources.keywords, book=book, stage=watch.stage)
        whole = _whole(material.documents, settings)
        settings = settings.for_data(num_forget=whole["forget"], num_detours=whole["detour"])
        work = WorkFolder(Path(folder))
        classroom = Classroom(base, settings, prepared, rule=profile.rule, work=work, watch=watch)
        try:
            rehearsals = classroom.rehearse()
        finally:
            classroom.leave()
    tried = [example for pool in prepared.pools.values() for example in pool]
    seconds = {
        "answering": _answering(base, material.documents, settings),
        "observing": sum(one.seconds_an_example for one in rehearsals) * sum(whole.values()),
        "training": sum(one.steps * one.seconds_a_step for one in rehearsals),
    }
    return Forecast(
        data=material.record,
        examples=[_shown(base, pool[0]) for pool in prepared.pools.values() if pool],
        lessons=[_lesson(one, settings, base) for one in rehearsals],
        num_examples=whole,
        answer_tokens_an_example=round(sum(len(one.answer_ids) for one in tried) / len(tried), 1),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        bytes=max(_bytes(one, sum(whole.values())) for one in rehearsals),
    )


def _tried(
    base: Base,
    material: Material,
    settings: Settings,
    *,
    keywords: tuple[str, ...],
    book: AnswerBook,
    stage: Stage,
) -> Prepared:
    """A few documents of each set, and more where those leave nothing to learn from. Raises DataError: all do."""
    sets = Material({name: material.documents[name] for name in ("forget", "retain")}, {})
    count, most = NUM_TRIED, max(len(group) for group in sets.documents.values())
    while True:
        prepared = prepare(base, sets.first(count), settings, keywords=keywords, book=book, stage=stage)
        empty = [kind for kind in (Kind.FORGET, Kind.RETAIN) if not prepared.pools[kind]]
        if not empty:
            return prepared
        if count >= most:
            raise nothing_of(empty[0])
        count *= 4


def _answering(base: Base, documents: Mapping[str, Sequence[Document]], settings: Settings) -> float:
    """Seconds for all that the base is asked: batches of prompts, each answer as long as it may be."""
    asked = [one for group in documents.values() for one in group if one.answer is None]
    rounds = settings.detours + settings.own_samples + settings.notes
    own = [one for one in documents["forget"] for _ in range(rounds)]
    if not asked and not own:
        return 0.0
    batch = [answers.encode_prompt(one, base.tokenizer) for one in [*asked, *own][: answers.BATCH_SIZE]]
    first, more = (_seconds(base, batch, count) for count in (1, 1 + NUM_PACED))
    a_batch = first + (settings.max_answer_tokens - 1) * max(more - first, 0.0) / NUM_PACED
    return a_batch * (len(asked) + len(own)) / len(batch)


def _seconds(base: Base, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
    started = time.monotonic()
    answers.own_answers(base, prompts, max_tokens=num_tokens)
    return time.monotonic() - started


def _whole(documents: dict[str, list[Document]], settings: Settings) -> dict[str, int]:
    """Examples of the whole run, the base's own words counted as if all of them were of use."""
    forget = documents["forget"]
    wordings = sum(len(one.variants.questions) + len(one.variants.paraphrases) for one in forget)
    wrong = sum(len(one.variants.perturbed) for one in forget)
    return {
        "forget": len(forget) * (1 + settings.own_samples + settings.notes) + wordings,
        "retain": len(documents["retain"]) + len(forget) * settings.notes,
        "detour": len(forget) * settings.detours + wrong,
    }


def _bytes(one: Rehearsal, num_examples: int) -> int:
    """What is kept of the examples, and the adapter with its gradient and Adam's two moments in fp32."""
    return one.bytes_an_example * num_examples + 4 * 4 * one.parameters


def _lesson(one: Rehearsal, settings: Settings, base: Base) -> dict[str, object]:
    return {
        "adapter": one.adapter,
        "layers": f"{one.place.fork} to {one.place.exit} of {base.num_layers}",
        "keys and values": one.place.kv,
        "modules": " ".join(one.place.target_modules),
        "parameters": one.parameters,
        "megabytes": round(one.parameters * base.dtype.itemsize / 1e6, 1),
        "steps": one.steps,
        "examples a step": _batch(settings),
        "seconds a step": round(one.seconds_a_step, 2),
        "source": METHODS[settings.method].source,
    }


def _batch(settings: Settings) -> str:
    kinds = {
        "forget": settings.forget_batch,
        "detour": settings.detour_batch,
        "retain": settings.retain_batch,
    }
    return " + ".join(f"{count * settings.grad_accum} {kind}" for kind, count in kinds.items() if count)


def _shown(base: Base, example: Example) -> dict[str, object]:
    return {
        "kind": Kind(example.kind).name.lower(),
        "prompt": base.tokenizer.decode(example.prompt_ids),
        "answer": _pieces(base, example.answer_ids),
        "goals": list(example.goals),
    }


def _pieces(base: Base, token_ids: Sequence[int]) -> list[str]:
    return [str(base.tokenizer.decode([token])) for token in token_ids]
