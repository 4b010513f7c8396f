"""Answers that keep to a JSON schema: which tokens may come next. Admission compiles, the sampler asks for masks.
llguidance does both; knows no request, no profile and no score.

llguidance and not xgrammar: it refuses a keyword that it cannot enforce, has a fuel limit for every step, and brings
nothing along, where xgrammar wants a foreign-function library larger than itself.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import InvalidRequest, UldError

# At both limits the worst schema found takes 0.6 s to compile, beside the step loop, and 30 ms a token.
MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_VALUES = 2_000
# Above 127 llguidance's own reader gives up; a request's body is refused earlier.
MAX_SCHEMA_DEPTH = 64
MAX_COMPILED = 64
# Small models that may write any number of blanks sometimes write nothing else.
MAX_BLANKS = 20
PARAM = "response_format"

# What llguidance may name in a refusal, and what we may repeat of it: the message itself can hold the client's words.
_KEYWORDS = (
    *("if", "then", "else", "not", "oneOf", "allOf", "contains", "uniqueItems", "dependentRequired"),
    *("dependentSchemas", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef"),
    *("$anchor", "$recursiveRef", "pattern", "patternProperties", "format", "multipleOf", "type"),
    *("minProperties", "maxProperties", "minContains", "maxContains", "dependencies", "contentEncoding"),
)


class GrammarState:
    """Where one answer stands in its schema. Asked with all tokens drawn so far, it reads those that are new: so it is
    right after a preemption, after a step that is run again, and when it is asked twice."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._vocab_size = tokenizer.vocab_size
        self._eos_ids = list(tokenizer.eos_ids)
        self._num_read = 0
        self._allowed_V: torch.Tensor | None = None

    def allowed(self, output_ids: Sequence[int]) -> torch.Tensor:
        """(V,) bool, on the host: what may follow `output_ids`; the end of text once the schema is satisfied. Do not
        write to it. Raises UldError if the schema turns out to be too ambiguous to follow."""
        new = list(output_ids[self._num_read :])
        if new or self._allowed_V is None:
            self._allowed_V = None  # also where what follows fails: the old mask is not what may come now
            self._read(new)
            self._allowed_V = self._mask()
        return self._allowed_V

    def _read(self, token_ids: list[int]) -> None:
        if not self._matcher.consume_tokens(token_ids):
            raise self._failure()
        self._num_read += len(token_ids)

    def _mask(self) -> torch.Tensor:
        # A stopped matcher allows its own end of text; ours may be other tokens.
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._failure()
        bits = np.unpackbits(words, count=self._vocab_size, bitorder="little")
        allowed_V = torch.from_numpy(bits.view(np.bool_))
        allowed_V[self._eos_ids] = self._matcher.is_accepting()
        if not allowed_V.any():
            raise self._failure()
        return allowed_V

    def _failure(self) -> UldError:
        return UldError(
            "the answer cannot be continued within its response_format: the schema is too ambiguous, or the model has "
            "no token for what must come; use a simpler schema",
            param=PARAM,
            code="response_format_failed",
        )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Grammar:
    """A compiled schema; any number of answers may start from it."""

    _matcher: LLMatcher
    _tokenizer: Tokenizer

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._tokenizer)


class Grammars:
    """Compiles schemas for one tokenizer, one at a time, and keeps the last ones and those that somebody holds.
    Thread-safe; the first call takes a second or two, to look at every token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None
        self._compiling = threading.Lock()
        # Of what follows; never held while compiling, because the step loop asks for what is there.
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._held: WeakValueDictionary[tuple[str, str], Grammar] = WeakValueDictionary()

    def compiled(self, schema: str, *, salt: str = "") -> Grammar:
        """Raises InvalidRequest, with response_format as its param, for a schema that is too large or cannot be
        enforced. What one salt has compiled makes nothing faster for another, who could tell by the clock."""
        found = self.find(schema, salt=salt)
        if found is not None:
            return found
        with self._compiling:
            found = self.find(schema, salt=salt) or self._compile(schema)
            self._keep((salt, schema), found)
        return found

    def find(self, schema: str, *, salt: str = "") -> Grammar | None:
        """What is compiled already. Waits for nobody."""
        with self._lock:
            found = self._held.get((salt, schema))
            if (salt, schema) in self._compiled:
                self._compiled.move_to_end((salt, schema))
            return found

    def _keep(self, key: tuple[str, str], grammar: Grammar) -> None:
        with self._lock:
            self._compiled[key] = self._held[key] = grammar
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)

    def _compile(self, schema: str) -> Grammar:
        require_bounded(schema)
        if not self._tokenizer.eos_ids:
            raise InvalidRequest(
                "this model has no token that ends a text, so none can be forced", param=PARAM
            )
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer)
        # Overrides, because a schema may bring options of its own (x-guidance).
        text = LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": True,
                "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_BLANKS}}}",
                "item_separator": ",",
                "key_separator": ":",
                "coerce_one_of": False,
                "lenient": False,
            },
        )
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        grammar = Grammar(matcher, self._tokenizer)
        try:
            grammar.start().allowed(())
        except UldError:
            raise _refusal("") from None
        return grammar


def require_bounded(schema: str) -> None:
    """Raises InvalidRequest for what is no JSON object, or one that could take long to compile."""
    if len(schema) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"the schema is longer than {MAX_SCHEMA_CHARS} characters", param=PARAM)
    try:
        value = json.loads(schema)
        num_values = _num_values(value, depth=0)
    except (ValueError, RecursionError):
        raise InvalidRequest("the schema is not JSON", param=PARAM) from None
    if not isinstance(value, dict):
        raise InvalidRequest("the schema must be a JSON object", param=PARAM)
    if num_values > MAX_SCHEMA_VALUES:
        raise InvalidRequest(
            f"the schema holds more than {MAX_SCHEMA_VALUES} values (keywords, properties, enum entries)",
            param=PARAM,
        )


def _num_values(value: object, *, depth: int) -> int:
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=PARAM)
    inner: Sequence[object] = ()
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    return 1 + sum(_num_values(one, depth=depth + 1) for one in inner)


def _refusal(reason: str) -> InvalidRequest:
    named = [word for word in _KEYWORDS if f'"{word}"' in reason]
    why = f": {', '.join(named)} cannot be enforced" if reason.startswith("Unimplemented") and named else ""
    if reason.startswith("Unsatisfiable") or not reason:
        why = ": nothing satisfies it"
    elif reason.startswith("Resource"):
        why = ": $ref must stay within it"
    return InvalidRequest(f"the schema cannot be used{why}", param=PARAM, code="invalid_schema")


class _Vocabulary:
    """A tokenizer as TokenizerWrapper wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = list(tokenizer.control_ids)
        self.tokens = [tokenizer.text_bytes(token_id) for token_id in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=list(tokenizer.eos_ids),
        slices=LLTokenizer.json_slices(),
    )
