"""The oracle of the engine: one request at a time, no cache, plain transformers and PEFT modules.

Every token runs the whole sequence again: the target through the model's own forward, with PEFT where it carries an
adapter; assistants that borrow through model.borrowed with PEFT's own LoRA layers; those with keys and values of their
own as a PEFT model's own forward, cut off at their exit; separate models through theirs. Only the sampler is shared
with the engine; it has its own oracle.
"""

from __future__ import annotations

from collections.abc import Callable
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
from uld_serve.profiles.profile import ProfileVersion, StreamSpec


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
        self.base_dir = base_dir
        self.assistants: dict[tuple[str, str], torch.nn.Module] = {}
        self.targets: dict[str, PeftModel] = {}
        for name, (folder, version) in versions.items():
            for stream in version.profile.streams:
                source = base_dir if stream.model is None else Path(version.locate(stream.model))
                adapter = None if stream.adapter is None else folder / stream.adapter
                self.assistants[name, stream.name] = _load(source, adapter, borrows=stream.kv == "borrowed")
            if version.profile.target_adapter is not None:
                self.targets[name] = _load(base_dir, folder / version.profile.target_adapter, borrows=True)

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
        allowed: Callable[[list[int]], torch.Tensor] | None = None,
    ) -> list[OracleToken]:
        """`allowed`: from the tokens drawn so far to the mask of those that may follow."""
        tokens: list[OracleToken] = []
        while len(tokens) < max_tokens and not (tokens and tokens[-1].token_id in eos_ids):
            ids = [*prompt_ids, *(token.token_id for token in tokens)]
            logits, terms = self._logits(ids, profiles)
            mask_V = None if allowed is None else allowed(ids[len(prompt_ids) :])
            row = SampleRow(
                row_b=0,
                terms=terms,
                temperature=temperature,
                seed=seed,
                position=len(ids),
                allowed_mask=mask_V,
            )
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
        adapted = [self.targets[name] for name in profiles if name in self.targets]
        target = adapted[0] if adapted else self.target
        rows = [target(torch.tensor([ids])).logits[0, -1]]
        terms = []
        for name in profiles:
            version = self.versions[name]
            rule = version.profile.rule
            if rule.kind == "identity":
                continue
            seats = {}
            for stream in version.profile.streams:
                seats[stream.name] = len(rows)
                rows.append(self._assistant(name, stream, ids, adapted[0] if adapted else None))
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
                    dead_zone=rule.dead_zone,
                    **{f"row_{role}": seats[stream] for role, stream in version.profile.roles.items()},
                )
            )
        # Heads are padded differently; what is beyond the vocabulary counts nowhere.
        return torch.stack([row[: self.vocab_size] for row in rows]), tuple(terms)

    def _assistant(
        self, profile: str, stream: StreamSpec, ids: list[int], adapted: PeftModel | None
    ) -> torch.Tensor:
        assistant = self.assistants[profile, stream.name]
        if stream.model is not None:
            return assistant(torch.tensor([ids])).logits[0, -1]
        if stream.kv == "own":
            return _own(assistant, stream, ids, adapted)
        return _borrowing(assistant, stream, ids, adapted)


def _load(source: Path, adapter: Path | None, *, borrows: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if borrows:
        use_borrowed_attention(model)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def _own(peft: PeftModel, stream: StreamSpec, ids: list[int], adapted: PeftModel | None) -> torch.Tensor:
    """The adapter changes no layer before the fork, so below it the PEFT model's rows are the target's."""
    parts = decoder_parts(peft.get_base_model())
    below = decoder_parts((adapted or peft).get_base_model()).layers
    seen: list[torch.Tensor] = []
    own = list(parts.layers)
    hook = own[stream.exit - 1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    inner = peft.get_base_model().model
    inner.layers = torch.nn.ModuleList([*below[: stream.fork], *own[stream.fork :]])
    try:
        peft(torch.tensor([ids]), use_cache=False)
    finally:
        inner.layers = torch.nn.ModuleList(own)
        hook.remove()
    return parts.head(parts.norm(seen[0].reshape(len(ids), -1)[-1]))


def _borrowing(
    peft: PeftModel, stream: StreamSpec, ids: list[int], adapted: PeftModel | None
) -> torch.Tensor:
    model = peft.get_base_model()
    input_ids, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    mask = causal_mask(torch.ones_like(input_ids), positions)
    lender = model if adapted is None else adapted.get_base_model()
    with peft.disable_adapter():
        states = target_pass(
            lender, input_ids, positions_BQ=positions, mask_B1QT=mask, fork=stream.fork, exit=stream.exit
        )
    hidden = assistant_pass(
        model,
        states.fork_BQD,
        states.keys_values,
        positions_BQ=positions,
        mask_B1QT=mask,
        layers=range(stream.fork, stream.exit),
    )
    return decoder_parts(model).head(hidden[0, -1])
