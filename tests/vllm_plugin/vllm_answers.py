"""Runs in the Python environment that vLLM is installed in: a job as JSON from standard input, answers as JSON to the
file that the job names. Started by test_vllm_serving.py. Knows no test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    job = json.load(sys.stdin)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
    from vllm import LLM, SamplingParams  # only now: it reads its settings when imported

    from uld_serve.vllm_plugin.orders import Orders, ServerArguments

    if "words" in job:  # arguments as they are, wrong ones among them
        LLM(**job["words"], dtype="float32", max_model_len=256)
        return
    arguments = ServerArguments.of(job["model"], Orders(**job["orders"]))
    llm = LLM(**{**arguments.keywords, **job["engine"]})
    params = [SamplingParams(temperature=0.0, **one) for one in job["params"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "prompt_logprobs": [
                None if one is None else {str(token): entry.logprob for token, entry in one.items()}
                for one in output.prompt_logprobs or []
            ],
        }
        for output in outputs
    ]
    Path(job["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
