"""One run of the probes: loads who is asked, one after the other, and makes the records that are written. Called by the
probes command. Knows no command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from uld_serve.errors import DataError, ProfileError
from uld_serve.evaluation.attacks.asking import Asker
from uld_serve.evaluation.attacks.cases import BUILDERS, Setting
from uld_serve.evaluation.attacks.facts import Fact, OwnProbe, read_facts, read_keywords, read_own_probes
from uld_serve.evaluation.attacks.figures import Leaks, figures, judged
from uld_serve.evaluation.attacks.ledger import write_json
from uld_serve.evaluation.attacks.places import Encoder
from uld_serve.evaluation.attacks.rewrites import Rewrites, rewrites
from uld_serve.evaluation.attacks.run import INT8, Found, Plan, ask_all, ask_rounded, plan, with_answers
from uld_serve.evaluation.identity import identity
from uld_serve.evaluation.kept import key_of
from uld_serve.evaluation.lineup import BASE, REFERENCE, chosen_profiles
from uld_serve.llm import LLM
from uld_serve.profiles.profile import ProfileVersion

Versions = Sequence[tuple[Path, ProfileVersion]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may set. `named` are the probes that were asked for by name: they must have a prompt."""

    forget: tuple[Path, ...]
    keywords: tuple[Path, ...]
    own: tuple[Path, ...]
    limit: int | None
    probes: tuple[str, ...]
    named: tuple[str, ...]
    generates: bool
    model: str | None
    profiles: Path
    profile: tuple[str, ...]
    reference: str | None
    dtype: Literal["auto", "bfloat16", "float32"]
    device: str
    out: Path
    max_tokens: int
    samples: int
    ks: tuple[int, ...]
    prefills: tuple[int, ...]
    rewrites: int
    threshold: float
    seed: int


@dataclass(slots=True)
class Session:
    """`run` once. A run that was interrupted goes on where the folder's answers end."""

    options: Options
    console: Console
    found: Found = field(default_factory=Found)

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """summary.json and probes.json. Raises DataError: data that cannot be used, a named probe without a prompt."""
        options = self.options
        versions = chosen_profiles(options.profiles, options.profile)
        keywords = read_keywords(options.keywords)
        facts, dropped = read_facts(options.forget, keywords, limit=options.limit)
        own = read_own_probes(options.own, tuple(BUILDERS), keywords)
        with Progress(console=self.console, transient=True) as progress:
            facts, asked, tokenizer = self._serving(versions, facts, own, progress)
            if options.reference is not None:
                self._reference(options.reference, asked, tokenizer, progress)
            if INT8 in asked.built:
                self._rounded(versions, asked, progress)
        leaks = judged(asked, self.found, threshold=options.threshold)
        record = {
            **self._what(facts, dropped, versions),
            "probes": figures(asked, self.found, leaks, ks=options.ks, tokenizer=tokenizer.encoder),
        }
        return record, answers_record(facts, asked, self.found, leaks)

    def _serving(
        self, versions: Versions, facts: Sequence[Fact], own: Sequence[OwnProbe], progress: Progress
    ) -> tuple[list[Fact], Plan, _Tokens]:
        """The base and its profiles; what was asked of them is asked of the others too."""
        llm = self._open(self.options.model, versions)
        asking = [*facts, *(line.fact for line in own)]
        if not llm.tokenizer.has_chat_template and any(fact.messages for fact in asking):
            raise DataError("this base has no chat template; give the forget set as prompt and completion")
        base = self._asker(llm, BASE, None, progress)
        facts = with_answers(facts, base)
        setting = Setting(
            llm.tokenizer, self.options.prefills, self.options.seed, self._rewrites(base, facts)
        )
        asked = plan(self.options.probes, facts, setting, own, samples=self.options.samples)
        self._check(asked)
        for version in (None, *(version for _, version in versions)):
            name = BASE if version is None else version.name
            asker = self._asker(llm, name, version, progress, asked.num_asked(has_views=True))
            ask_all(asker, name, asked, self.found, has_views=True)
        return facts, asked, _Tokens(llm.tokenizer, llm.base.tokenizer_hash)

    def _reference(self, named: str, asked: Plan, tokens: _Tokens, progress: Progress) -> None:
        """Its views are compared with the base's where it has the same tokens."""
        llm = self._open(named, ())
        has_views = llm.base.tokenizer_hash == tokens.hash
        total = asked.num_asked(has_views=has_views)
        asker = self._asker(llm, REFERENCE, None, progress, total)
        ask_all(asker, REFERENCE, asked, self.found, has_views=has_views)

    def _rounded(self, versions: Versions, asked: Plan, progress: Progress) -> None:
        """Each profile by itself: one that the rounded base does not take leaves the others alone."""
        self._one_rounded(BASE, (), asked, progress)
        for one in versions:
            self._one_rounded(one[1].name, (one,), asked, progress)

    def _one_rounded(self, name: str, versions: Versions, asked: Plan, progress: Progress) -> None:
        try:
            llm = self._open(self.options.model, versions, weights="int8")
        except ProfileError as error:
            self.found.refused[name] = error.message
            return
        profile = versions[0][1] if versions else None
        subject, total = f"{name}, int8", len(asked.built[INT8].cases)
        asker = self._asker(llm, subject, profile, progress, total)
        ask_rounded(asker, subject, asked, self.found)

    def _open(
        self, model: str | None, versions: Versions, *, weights: Literal["stored", "int8"] = "stored"
    ) -> LLM:
        paths = [path for path, _ in versions]
        options = self.options
        return LLM(model, profiles=paths, dtype=options.dtype, device=options.device, weights=weights)

    def _asker(
        self,
        llm: LLM,
        subject: str,
        version: ProfileVersion | None,
        progress: Progress,
        total: int | None = None,
    ) -> Asker:
        task = progress.add_task("what the base says" if total is None else subject, total=total)
        return Asker(
            model=llm,
            profile=None if version is None else version.name,
            version=key_of(identity(llm), None if version is None else version.digest),
            folder=self.options.out / "answers" / subject,
            max_tokens=self.options.max_tokens,
            advance=lambda count: progress.advance(task, count),
        )

    def _rewrites(self, base: Asker, facts: Sequence[Fact]) -> list[list[str]]:
        """Kept for a person to look at, too."""
        if not self.options.generates:
            return []
        found: list[Rewrites] = rewrites(base, facts, count=self.options.rewrites, seed=self.options.seed)
        write_json(self.options.out / "paraphrases.json", [asdict(one) for one in found])
        return [one.kept for one in found]

    def _check(self, asked: Plan) -> None:
        for name in self.options.named:
            if not asked.built[name].cases:
                reasons = ", ".join(asked.built[name].skipped) or "nothing in the data is for it"
                raise DataError(
                    f"--probe {name} has no prompt: {reasons}; docs/evaluation.md says what it needs"
                )

    def _what(self, facts: Sequence[Fact], dropped: dict[str, int], versions: Versions) -> dict[str, Any]:
        names = [BASE, *(version.name for _, version in versions)]
        options = self.options
        return {
            "facts": len(facts),
            "dropped": dropped,
            "without_keys": sum(not fact.keys for fact in facts),
            "threshold": options.threshold,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
            "subjects": names if options.reference is None else [*names, REFERENCE],
            "digests": {version.name: version.digest for _, version in versions},
            "refused": self.found.refused,
        }


@dataclass(frozen=True, slots=True)
class _Tokens:
    encoder: Encoder
    hash: str


def answers_record(facts: Sequence[Fact], asked: Plan, found: Found, leaks: Leaks) -> dict[str, Any]:
    """Every prompt with every answer and whether it leaks, for a person to look at."""
    prompts = []
    for name, by_subject in found.answers.items():
        for number, case in enumerate(asked.built[name].cases):
            said = {
                subject: [
                    {"text": text, "leaks": flag}
                    for text, flag in zip(answers[number], leaks[name][subject][number], strict=True)
                ]
                for subject, answers in by_subject.items()
            }
            prompts.append({**asdict(case), "answers": said})
    return {"facts": [asdict(fact) for fact in facts], "prompts": prompts}
