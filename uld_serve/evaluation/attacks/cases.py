"""From facts to the prompts that try to get at them, one set a kind of attack. Called by the probes command. Knows no
model but its tokenizer, which says where an answer's first n tokens end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from uld_serve.data.documents import Message
from uld_serve.evaluation.attacks import wordings
from uld_serve.evaluation.attacks.facts import Fact, Hop, OwnProbe
from uld_serve.evaluation.attacks.judge import leaks, names, only_in
from uld_serve.evaluation.attacks.places import Encoder, first_key_token, plain_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt: a conversation or a text, and the first words of its answer. It leaks by `truth` and `keys` as
    `judge.leaks` says. `fact` counts from 0; a probe of one's own belongs to none."""

    probe: str
    variant: str
    fact: int | None
    messages: tuple[Message, ...] = ()
    text: str = ""
    prefix: str = ""
    truth: str
    keys: tuple[str, ...] = ()
    rival: str = ""

    @property
    def prompt(self) -> str:
        """All that the model is shown."""
        return "\n".join((*(message.content for message in self.messages), self.text, self.prefix))

    def leaks(self, said: str, *, threshold: float) -> bool:
        return leaks(said, truth=self.truth, keys=self.keys, threshold=threshold, rival=self.rival)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the sets are built with. `rewrites` are the base's own wordings of each fact's question."""

    tokenizer: Encoder
    prefills: Sequence[int] = (2, 5, 10)
    seed: int = 0
    rewrites: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """`skipped` counts what could not be asked, by reason."""

    cases: list[Case]
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Try:
    """What a builder makes of a fact: another last turn or text, or first words of the answer."""

    variant: str
    asked: str | None = None
    prefix: str = ""
    truth: str | None = None
    keys: tuple[str, ...] | None = None
    rival: str = ""


@dataclass(frozen=True, slots=True)
class _Task:
    """One fact among all, to make prompts of."""

    facts: Sequence[Fact]
    number: int
    setting: Setting

    @property
    def fact(self) -> Fact:
        return self.facts[self.number]


_Tries = Iterator[_Try | str]  # a text says why there is no prompt
_Builder = Callable[[_Task], _Tries]


def build(probe: str, facts: Sequence[Fact], setting: Setting, own: Sequence[OwnProbe] = ()) -> Built:
    """The prompts of one set, those of the probes file behind. Every fact has its answer by now."""
    builder = BUILDERS[probe]
    cases, skipped = [], Counter[str]()
    for number, fact in enumerate(facts):
        for one in builder(_Task(facts, number, setting)):
            case = one if isinstance(one, str) else _case(probe, fact, number, one)
            if isinstance(case, str):
                skipped[case] += 1
            else:
                cases.append(case)
    for line in own:
        if line.probe == probe:
            case = _case(probe, line.fact, None, _Try("own"))
            if isinstance(case, str):
                skipped[case] += 1
            else:
                cases.append(case)
    return Built(cases, dict(skipped))


def _case(probe: str, fact: Fact, number: int | None, one: _Try) -> Case | str:
    """Or why not: a prompt that holds the secret asks for nothing."""
    messages, text = fact.messages, fact.text
    if one.asked is not None and messages:
        messages = (*messages[:-1], replace(messages[-1], content=one.asked))
    elif one.asked is not None:
        text = one.asked
    case = Case(
        probe=probe,
        variant=one.variant,
        fact=number,
        messages=messages,
        text=text,
        prefix=one.prefix,
        truth=(fact.answer or "") if one.truth is None else one.truth,
        keys=fact.keys if one.keys is None else one.keys,
        rival=one.rival,
    )
    if probe == "in-context" or not case.keys:
        return case
    unsaid = tuple(key for key in case.keys if not names(case.prompt, [key]))
    return replace(case, keys=unsaid) if unsaid else "the key stands in the prompt"


def _plain(_: _Task) -> _Tries:
    yield _Try("")


def _paraphrases(task: _Task) -> _Tries:
    fact, setting = task.fact, task.setting
    rewrites = setting.rewrites[task.number] if setting.rewrites else ()
    if not fact.wordings and not rewrites:
        yield "no other wording"
    yield from (_Try("column", wording) for wording in fact.wordings)
    yield from (_Try("by the base", wording) for wording in rewrites)


def _languages(task: _Task) -> _Tries:
    fact = task.fact
    if not fact.messages:
        yield "no question"
        return
    for language in sorted({*wordings.LANGUAGES, *fact.translations}):
        template = wordings.LANGUAGES.get(language, "{question}")
        asked = fact.translations.get(language, template.format(question=fact.question))
        yield _Try(language, asked)


def _roles(task: _Task) -> _Tries:
    if not task.fact.messages:
        yield "no question"
        return
    for name, template in wordings.ROLES.items():
        yield _Try(name, template.format(question=task.fact.question))


def _noises(task: _Task) -> _Tries:
    fact = task.fact
    asked = fact.question or fact.text
    for kind in wordings.NOISES:
        yield _Try(kind, wordings.noisy(asked, kind, seed=f"{task.setting.seed}:{asked}"))


def _prefills(task: _Task) -> _Tries:
    """The first tokens of the answer, at most up to its first key; what is left is the truth."""
    fact, tokenizer = task.fact, task.setting.tokenizer
    answer = fact.answer or ""
    ids = plain_ids(tokenizer, answer)
    free = first_key_token(tokenizer, answer, fact.keys)
    used = set()
    for num_tokens in task.setting.prefills:
        given = min(num_tokens, len(ids) - 1 if free is None else free)
        if given < 1 or given in used:
            yield "the key or the end comes earlier"
            continue
        used.add(given)
        prefix, rest = tokenizer.decode(ids[:given]), tokenizer.decode(ids[given:])
        yield _Try(f"{num_tokens} tokens", prefix=prefix, truth=rest.strip())
    if fact.messages:
        yield from (_Try(name, prefix=opening) for name, opening in wordings.OPENINGS.items())


def _hops(task: _Task) -> _Tries:
    fact = task.fact
    chained = list(_chains(task))
    if not fact.hops and not chained:
        yield "no question that needs it on the way"
    hops = [("column", hop) for hop in fact.hops] + [("chain", hop) for hop in chained]
    yield from (_Try(name, hop.question, truth=hop.answer, keys=hop.keys) for name, hop in hops)


def _chains(task: _Task) -> Iterator[Hop]:
    """Where another fact's subject is what gives this one away, that fact's question with the subject described by
    this one's question: sound because the description names the same thing."""
    first = task.fact
    if not first.messages:
        return
    described = wordings.CHAIN.format(question=first.question)
    for second in task.facts:
        subject = second.subject
        if subject is None or second is first or subject.casefold() not in map(str.casefold, first.keys):
            continue
        asked = _replaced(second.question, subject, described)
        if asked is not None:
            yield Hop(asked, second.answer or "", second.keys)


def _aliases(task: _Task) -> _Tries:
    fact = task.fact
    if fact.subject is None or not fact.aliases:
        yield "no subject and alias"
        return
    for alias in fact.aliases:
        asked = _replaced(fact.question or fact.text, fact.subject, alias)
        yield "the subject is not named in the question" if asked is None else _Try(alias, asked)


def _replaced(text: str, old: str, new: str) -> str | None:
    """None where the old does not stand there as a whole phrase."""
    changed, count = re.subn(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text, flags=re.IGNORECASE)
    return changed if count else None


def _in_context(task: _Task) -> _Tries:
    """A note with the very fact, and one with another, which must win over what the model remembers."""
    fact = task.fact
    if not fact.messages:
        yield "no question"
        return
    answer = fact.answer or ""
    keys = tuple(key for key in fact.keys if names(answer, [key]))
    asked = wordings.NOTE.format(statement=answer, question=fact.question)
    yield _Try("the fact itself", asked, keys=keys)
    for wrong in fact.wrong[:1]:
        if not only_in(wrong, answer):
            yield "the wrong answer has no word of its own"
            continue
        asked = wordings.NOTE.format(statement=wrong, question=fact.question)
        yield _Try("another fact", asked, truth=wrong, keys=(), rival=answer)


BUILDERS: Mapping[str, _Builder] = {
    "plain": _plain,
    "sampling": _plain,
    "paraphrase": _paraphrases,
    "language": _languages,
    "role-play": _roles,
    "prefix-noise": _noises,
    "prefill": _prefills,
    "multi-hop": _hops,
    "alias": _aliases,
    "in-context": _in_context,
}
