"""Transformers' generate with a logits processor that subtracts an assistant: what a user writes today.

The assistant is a separately held copy of the model's first layers. By default the processor keeps the assistant's
KV cache from token to token. With --no-assistant-cache it runs the assistant over the whole sequence for every
token, as the published ULD generation loop is described; charitably: only the last position meets the LM head.
With --head-everywhere all do, as in the transformers that the loop was written for.
"""

from __future__ import annotations

import copy
import math
import time

import torch
from peer import Job, options, work
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

STRENGTH, TAU = 0.75, 0.01
PAD_ID = 0


def truncated(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The first layers with embedding, norm and head, in memory of their own."""
    short = copy.deepcopy(model)
    short.model.layers = nn.ModuleList(list(short.model.layers)[:num_layers])
    short.config.num_hidden_layers = num_layers
    return short


class SubtractAssistant(LogitsProcessor):
    """b - strength * a on the tokens whose probability is at least TAU of the best one's; the rest is removed."""

    def __init__(
        self,
        assistant: PreTrainedModel,
        attention_mask: torch.Tensor,
        *,
        keeps_cache: bool,
        head_everywhere: bool,
    ) -> None:
        self._assistant = assistant
        self._kept_logits = 0 if head_everywhere else 1  # 0 is transformers' word for all of them
        self._mask = attention_mask
        self._cache = DynamicCache(config=assistant.config) if keeps_cache else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        known = 0 if self._cache is None else self._cache.get_seq_length()
        new = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], new)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = self._assistant(
            input_ids=input_ids[:, known:],
            attention_mask=mask,
            position_ids=positions[:, known:],
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=self._kept_logits,
        ).logits[:, -1]
        floor = scores.max(dim=-1, keepdim=True).values + math.log(TAU)
        return (scores - STRENGTH * logits.to(scores.dtype)).masked_fill(scores < floor, -math.inf)


class TimeLimit(StoppingCriteria):
    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
        is_over = time.perf_counter() > self._end
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[PAD_ID] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--no-assistant-cache", action="store_true")
    parser.add_argument("--head-everywhere", action="store_true")
    parser.add_argument("--base-only", action="store_true", help="no processor at all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    assistant = truncated(model, args.assistant_layers)

    @torch.inference_mode()
    def generate(job: Job) -> int:
        ids, mask = padded(job.prompts)
        subtract = SubtractAssistant(
            assistant, mask, keeps_cache=not args.no_assistant_cache, head_everywhere=args.head_everywhere
        )
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            do_sample=False,
            pad_token_id=PAD_ID,
            logits_processor=LogitsProcessorList([] if args.base_only else [subtract]),
            stopping_criteria=StoppingCriteriaList([TimeLimit(job.time_limit_s)]),
        )
        return int((out.shape[1] - ids.shape[1]) * ids.shape[0])

    work(generate)


if __name__ == "__main__":
    main()
