"""vLLM's CPU build: the base alone, or with uld-serve's plugin and one profile for all. Runs in the environment that
run.py makes for it (roster.py)."""

from __future__ import annotations

import os

from peer import Job, options, work


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--profile", help="forget with this built-in profile; default: the base alone")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile: starts minutes earlier, and is slower"
    )
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # Left alone it keeps one core for its front end and computes on the others only.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    from vllm import LLM, SamplingParams  # only now: it reads its settings when imported

    arguments: dict[str, object] = {"model": args.model}
    if args.profile is not None:
        from uld_serve.vllm_plugin.orders import Orders, ServerArguments

        # The embedded model, which is what --model names: only it has built-in profiles.
        arguments = ServerArguments.of(None, Orders(profiles=(args.profile,))).keywords
    arguments |= {"dtype": "bfloat16", "max_model_len": 2048, "enforce_eager": args.eager}
    llm = LLM(**arguments, max_num_seqs=args.max_batch)

    def generate(job: Job) -> int:
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    work(generate)


if __name__ == "__main__":
    main()
