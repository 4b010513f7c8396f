"""The oracle of the engine: one request at a time, no cache, plain transformers and PEFT modules.

Every token runs the whole sequence again: the target through the model's own forward, each assistant through
model.borrowed with PEFT's own LoRA layers. Only the sampler is shared with the engine; it has its own oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from uld_kernels import ops, rules
from uld_kernels.rows import SampleRow, Term

from uld_serve.model.borrowed import (
    assistant_pass,
    causal_mask,
    decoder_parts,
    target_pass,
    use_borrowed_attention,
)
from uld_serve.profiles.profile import ProfileVersion


@dataclass
class OracleToken:
    token_id: int
    logprob: float


class Oracle:
    def __init__(
        self,
        base_dir: Path,
        versions: dict[str, tuple[Path, ProfileVersion]],
        *,
        vocab_size: int,
        control_ids: list[int],
    ) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
        self.versions = {name: version for name, (_, version) in versions.items()}
        self.vocab_size = vocab_size
        self.control_ids = torch.tensor(control_ids)
        self.assistants: dict[tuple[str, str], PeftModel] = {}
        for name, (folder, version) in versions.items():
            for stream in version.profile.streams:
                base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
                use_borrowed_attention(base)
                self.assistants[name, stream.name] = PeftModel.from_pretrained(base, folder / stream.adapter)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        profiles: list[str],
        *,
        eos_ids: tuple[int, ...],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[OracleToken]:
        tokens: list[OracleToken] = []
        while len(tokens) < max_tokens and not (tokens and tokens[-1].token_id in eos_ids):
            ids = [*prompt_ids, *(token.token_id for token in tokens)]
            logits, terms = self._logits(ids, profiles)
            row = SampleRow(row_b=0, terms=terms, temperature=temperature, seed=seed, position=len(ids))
            out = ops.fused_sample(logits, [row], vocab_size=self.vocab_size, protected_ids=self.control_ids)
            tokens.append(OracleToken(int(out.token_ids_B[0]), float(out.logprob_B[0])))
        return tokens

    @torch.no_grad()
    def score(self, token_ids: list[int], profiles: list[str]) -> list[float]:
        """Log-probability of each token but the first."""
        scores = []
        for end in range(1, len(token_ids)):
            logits, terms = self._logits(token_ids[:end], profiles)
            out = ops.fused_score(
                logits,
                [SampleRow(row_b=0, terms=terms)],
                torch.tensor([token_ids[end]]),
                vocab_size=self.vocab_size,
                protected_ids=self.control_ids,
            )
            scores.append(float(out.logprob_B[0]))
        return scores

    def _logits(self, ids: list[int], profiles: list[str]) -> tuple[torch.Tensor, tuple[Term, ...]]:
        rows = [self.target(torch.tensor([ids])).logits[0, -1]]
        terms = []
        for name in profiles:
            version = self.versions[name]
            rule = version.profile.rule
            seats = {}
            for stream in version.profile.streams:
                seats[stream.name] = len(rows)
                rows.append(self._assistant(name, stream.name, stream.fork, stream.exit, ids))
            terms.append(
                Term(
                    kind=rules.RULE_CODES[rule.kind],
                    strength=rule.strength,
                    digest=int(version.digest.removeprefix("sha256:")[:15], 16),
                    filter_mode=rules.FILTER_CODES[rule.filter.mode],
                    tau=rule.filter.tau,
                    min_keep=rule.filter.min_keep,
                    protect=rule.protect,
                    rank_k=rule.rank_k,
                    **{f"row_{role}": seats[stream] for role, stream in version.profile.roles.items()},
                )
            )
        return torch.stack(rows), tuple(terms)

    def _assistant(self, profile: str, stream: str, fork: int, exit: int, ids: list[int]) -> torch.Tensor:
        peft = self.assistants[profile, stream]
        model = peft.get_base_model()
        input_ids, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
        mask = causal_mask(torch.ones_like(input_ids), positions)
        with peft.disable_adapter():
            states = target_pass(
                model, input_ids, positions_BQ=positions, mask_B1QT=mask, fork=fork, exit=exit
            )
        hidden = assistant_pass(
            model,
            states.fork_BQD,
            states.keys_values,
            positions_BQ=positions,
            mask_B1QT=mask,
            layers=range(fork, exit),
        )
        return decoder_parts(model).head(hidden[0, -1])
