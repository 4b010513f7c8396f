"""uld-serve itself: the engine offline, as `uld-serve generate` runs it, without and with a profile."""

from __future__ import annotations

import torch
from peer import Job, options, work

from uld_serve.config import EngineSettings
from uld_serve.engine.request import SamplingParams
from uld_serve.llm import LLM


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--profile", help="forget with this built-in profile; default: the base alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # The embedded model, which is what --model names for the other peers: only it has built-in profiles.
    llm = LLM(settings=EngineSettings(max_num_seqs=args.max_batch))

    def generate(job: Job) -> int:
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, ignore_eos=True)
        completions = llm.generate(job.prompts, params, profile=args.profile)
        return sum(len(completion.token_ids) for completion in completions)

    work(generate)


if __name__ == "__main__":
    main()
