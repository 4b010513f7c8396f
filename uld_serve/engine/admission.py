"""Whether a request can run at all, and the sequence of one that can. Called by Engine.add. Knows no queue and no other
request.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from uld_serve.config import EngineConfig
from uld_serve.engine.detokenizer import Detokenizer
from uld_serve.engine.grammar import Grammars
from uld_serve.engine.plan import Decision, Plan, Planner
from uld_serve.engine.pools import Pools
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.sequence import Sequence
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import InvalidRequest, PromptTooLong


@dataclass(frozen=True, slots=True)
class Admission:
    """What decides over a request, of one engine."""

    config: EngineConfig
    tokenizer: Tokenizer
    planner: Planner
    pools: Pools
    grammars: Grammars

    def validate(self, prompt_ids: list[int], params: SamplingParams, *, cache_salt: str = "") -> None:
        """Raise InvalidRequest or PromptTooLong for what can never run. Any thread may ask; a JSON schema that is new
        takes up to a second."""
        limit = self.config.max_model_len
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if not all(0 <= token_id < self.tokenizer.vocab_size for token_id in prompt_ids):
            raise InvalidRequest(f"token ids must be 0 to {self.tokenizer.vocab_size - 1}", param="prompt")
        if len(prompt_ids) + min(params.max_tokens, 1) > limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens; this server takes {limit} in all, at least one of them new",
                param="prompt",
            )
        unknown = [
            i for i in (*params.logit_bias, *params.stop_token_ids) if not 0 <= i < self.tokenizer.vocab_size
        ]
        if unknown:
            field_name = "logit_bias" if unknown[0] in params.logit_bias else "stop_token_ids"
            raise InvalidRequest(
                f"token id {unknown[0]} is not in the vocabulary of {self.tokenizer.vocab_size}",
                param=field_name,
            )
        if params.json_schema is not None:
            self.grammars.compiled(params.json_schema, salt=cache_salt)

    def sequence(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        decision: Decision,
        *,
        tenant: str,
        cache_salt: str,
    ) -> Sequence:
        """A new sequence, which holds its adapters until its plan is released. Raises InvalidRequest, PromptTooLong,
        Overloaded or ProfileError; then nothing is held."""
        schema = params.json_schema
        grammar = None if schema is None else self.grammars.compiled(schema, salt=cache_salt).start()
        plan = self.planner.plan(decision)
        try:
            return Sequence(
                request_id=request_id,
                prompt_ids=list(prompt_ids),
                params=params,
                plan=plan,
                seed=secrets.randbits(63) if params.seed is None else params.seed,
                detokenizer=Detokenizer(
                    self.tokenizer, prompt_ids, stop=params.stop, keep_stop=params.include_stop_str
                ),
                max_len=self._max_len(plan, len(prompt_ids) + min(params.max_tokens, 1)),
                grammar=grammar,
                tenant=tenant,
                lanes=self.pools.lanes(plan.lanes, tenant=cache_salt),
            )
        except BaseException:
            self.planner.release(plan)
            raise

    def _max_len(self, plan: Plan, num_tokens: int) -> int:
        """How long a sequence can get under a plan. Raises InvalidRequest if `num_tokens` is more, or if a step has
        too few rows for one token."""
        if 1 + len(plan.streams) > self.config.max_step_rows:
            raise InvalidRequest(
                f"these profiles need {1 + len(plan.streams)} rows a token, a step has {self.config.max_step_rows}"
            )
        limits = [self.config.max_model_len, self.pools.longest(plan.lanes)]
        if plan.max_positions is not None:
            limits.append(plan.max_positions)
        if num_tokens > min(limits):
            raise PromptTooLong(
                f"under these profiles a sequence can have {min(limits)} tokens in all and this one needs at least "
                f"{num_tokens}; raise own_kv_bytes if there is memory for it",
                param="prompt",
            )
        return min(limits)
