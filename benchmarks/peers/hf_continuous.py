"""Transformers' continuous batching (generate_batch), the base alone: it takes no second model."""

from __future__ import annotations

import torch
from peer import Job, options, work
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAGE_TOKENS = 256
STEP_TOKENS = 512  # as many as our own engine takes in one step
# No token of any vocabulary, so that nothing ends early.
NEVER = -1


def main() -> None:
    args = options(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()

    def generate(job: Job) -> int:
        config = GenerationConfig(
            max_new_tokens=job.new_tokens, do_sample=False, eos_token_id=NEVER, pad_token_id=0
        )
        longest = max(len(prompt) for prompt in job.prompts) + job.new_tokens
        # Left alone it takes most of the machine's memory for its cache, and half a minute to fill it with zeros.
        cache = ContinuousBatchingConfig(
            num_blocks=len(job.prompts) * (longest // PAGE_TOKENS + 2), max_batch_tokens=STEP_TOKENS
        )
        outputs = model.generate_batch(
            job.prompts, generation_config=config, continuous_batching_config=cache
        )
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(job.prompts):
            raise SystemExit(
                f"generate_batch answered {len(outputs)} of {len(job.prompts)} prompts: {failed[:1]}"
            )
        return sum(len(output.generated_tokens) for output in outputs.values())

    work(generate)


if __name__ == "__main__":
    main()
