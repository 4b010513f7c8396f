"""Transformers' continuous batching (generate_batch), the base alone: it takes no second model."""

from __future__ import annotations

import torch
from peer import Job, measure, options
from transformers import AutoModelForCausalLM, GenerationConfig

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
        outputs = model.generate_batch(job.prompts, generation_config=config)
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(job.prompts):
            raise SystemExit(
                f"generate_batch answered {len(outputs)} of {len(job.prompts)} prompts: {failed[:1]}"
            )
        return sum(len(output.generated_tokens) for output in outputs.values())

    measure(args, generate)


if __name__ == "__main__":
    main()
