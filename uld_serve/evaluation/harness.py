"""lm-evaluation-harness in process: the model `uld-serve`, a base or a profile on it, through the engine that serves.
Scores are those that `local-completions` gets of a server, where nothing is truncated. The extra `lm-eval` brings it.

    python -m uld_serve.evaluation.harness run --model uld-serve --model_args profile=acme,profiles=DIR --tasks ...

or, in a program, import this module and call lm_eval.simple_evaluate(model="uld-serve", ...). lm-eval finds
models only by an import, which is why its own command does not know this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any, cast

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError, InvalidRequest
from uld_serve.llm import LLM, Scored

LOWEST = -9999.0
"""What a server prints for a token that a filter makes impossible, and so what is added up here."""
SEED = 1234
"""Of local-completions."""
# Of a task's generation_kwargs, beside how long and until when.
DRAWING = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What a cache knows it as, context, continuation."""


@register_model("uld-serve")
class UldServeLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """`profile` names one, or several with + between them; without it the base answers. `profiles` is their folder.
    Raises DataError for a batch size, which the engine sets, or for what an LLM raises."""

    def __init__(
        self,
        profile: str | None = None,
        *,
        profiles: str | None = None,
        model: str | None = None,
        strength: float = 1.0,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("None", "1", "auto") or max_batch_size is not None:
            raise DataError("the engine batches by itself: leave out batch_size and max_batch_size")
        if dtype not in ("auto", "bfloat16", "float32"):
            raise DataError("dtype must be auto, bfloat16 or float32")
        self._llm = LLM(
            model,
            profiles=None if profiles is None else Path(profiles),
            dtype=cast(Any, dtype),
            device=device,
        )
        self._profile = None if profile is None else str(profile).split("+")
        self._strength = float(strength)
        self._versions = [self._llm.registry.get(name) for name in self._profile or ()]
        self.tokenizer = self._llm.base.tokenizer
        # As local-completions: one token less, which there is drawn.
        self.max_length = (max_length or self._llm.engine.config.max_model_len) - 1
        self._max_gen_toks, self._add_bos_token = max_gen_toks, add_bos_token

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return self._llm.base.tokenizer_hash

    def get_model_info(self) -> dict[str, object]:
        """For the results file: what was asked, by its digests."""
        return {
            "base": self._llm.base.id,
            "base_fingerprint": self._llm.base.fingerprint,
            "profiles": [{"name": one.name, "digest": one.digest} for one in self._versions],
            "forget_strength": self._strength,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: object) -> list[int]:
        if others:
            raise DataError(f"no such option of encoding: {', '.join(others)}")
        has_special = bool(add_special_tokens) or self._add_bos_token
        return list(self.tokenizer.encode(string, add_special_tokens=has_special))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **others: object
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, in nats, and whether it is what greedy decoding gives. A context that
        is too long loses its beginning."""
        if others:
            raise DataError(f"no such option of scoring: {', '.join(others)}")
        kept = [_kept(context, continuation, self.max_length) for _, context, continuation in requests]
        scored = self._llm.score(
            [ids for ids, _ in kept],
            profile=self._profile,
            strength=self._strength,
            starts=[start for _, start in kept],
            show_progress=not disable_tqdm,
        )
        found = [_likelihood(one, start) for one, (_, start) in zip(scored, kept, strict=True)]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts after the first token of all texts, in windows where they are too long."""
        texts = [str(request.args[0]) for request in requests]
        windows = [self._windows(text) for text in texts]
        flat = self._loglikelihood_tokens(
            [one for some in windows for one in some], disable_tqdm=disable_tqdm
        )
        values = iter(flat)
        found = [fsum(next(values)[0] for _ in some) for some in windows]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def _windows(self, text: str) -> list[Request]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
            context_len=1,
        )
        return [(None, *make_disjoint_window(pair)) for pair in pairs]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            drawn = self._params(options)
            prompts.append(self.tok_encode(context)[-(self.max_length - drawn.max_tokens) :])
            params.append(drawn)
        said = self._llm.generate(
            prompts, params, profile=self._profile, strength=self._strength, show_progress=not disable_tqdm
        )
        for request, one in zip(requests, said, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, one.text)
        return [one.text for one in said]

    def _params(self, options: Mapping[str, Any]) -> SamplingParams:
        """Greedy unless the task says otherwise. Raises DataError for an option that is not ours."""
        known = {"until", "do_sample", "max_gen_toks", "max_tokens", *DRAWING}
        unknown = sorted(set(options) - known)
        if unknown:
            raise DataError(f"generation_kwargs has {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        most = int(options.get("max_tokens", options.get("max_gen_toks", self._max_gen_toks)))
        if not 0 < most < self.max_length:
            raise InvalidRequest(
                f"max_gen_toks {most} leaves no room for a prompt in {self.max_length} tokens"
            )
        until = handle_stop_sequences(_listed(options.get("until")), self.tokenizer.eos_token)
        drawing = {name: options[name] for name in DRAWING if name in options}
        return SamplingParams(
            **{"temperature": 0.0, "seed": SEED, **drawing}, max_tokens=most, stop=tuple(until)
        )


def _listed(until: str | Sequence[str] | None) -> list[str] | None:
    """A list of its own: lm-eval appends to it."""
    return until if until is None else [until] if isinstance(until, str) else list(until)


def _kept(context: list[int], continuation: list[int], max_length: int) -> tuple[list[int], int]:
    """The last `max_length` tokens, and where the continuation begins. Raises DataError where no context is left."""
    whole = (context + continuation)[-max_length:]
    start = len(whole) - len(continuation)
    if start < 1:
        raise DataError(f"a continuation of {len(continuation)} tokens leaves no context within {max_length}")
    return whole, start


def _likelihood(scored: Scored, start: int) -> tuple[float, bool]:
    values = [max(value, LOWEST) for value in scored.logprobs[start:] if value is not None]
    best = [max(top[0], LOWEST) for top in scored.top_logprobs[start:]]
    return fsum(values), values == best


if __name__ == "__main__":
    cli_evaluate()
