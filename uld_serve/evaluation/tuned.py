"""A profile's next version: the same adapters with chosen decode parameters. Called by tune. Knows no figure."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from pathlib import Path

from uld_serve.engine.request import SamplingParams
from uld_serve.evaluation.held_out import Model
from uld_serve.evaluation.settings import told
from uld_serve.evaluation.unfiltered import located_streams
from uld_serve.profiles.probes import ReplayProbe
from uld_serve.profiles.profile import Profile, ProfileVersion, RuleSpec
from uld_serve.profiles.store import read_training_record, write_profile

REPLAY_TOKENS = 32
"""As training records them."""
README = """\
# {name}

The adapters of {ref} with other decode parameters, chosen by `uld-serve tune`: {rule}. `training.json` has under
`tuned` what was tried, the constraint, and what held-out data gave.
"""


def write_tuned(
    out: Path,
    directory: Path,
    version: ProfileVersion,
    rule: RuleSpec,
    *,
    model: Model,
    served_as: str,
    record: Mapping[str, object],
) -> ProfileVersion:
    """Writes `out`, whole or not at all, and reads it back. `served_as` is what `model` knows the version with this
    rule as: replay probes, which a load compares with, are made anew under it. Raises ProfileError if `out` exists."""
    fields = {**version.profile.model_dump(), "rule": rule.model_dump()}
    profile = Profile.model_validate(fields).model_copy(update={"streams": located_streams(version)})
    replay = tuple(_replayed(probe, model, served_as) for probe in version.probes.replay)
    training = {**read_training_record(directory), "tuned": {"from": version.ref, **record}}
    return write_profile(
        out,
        profile,
        adapters={name: directory / name for name in profile.adapter_names},
        probes=version.probes.model_copy(update={"replay": replay}),
        training=training,
        readme=README.format(name=version.name, ref=version.ref, rule=told(rule)),
    )


def _replayed(probe: ReplayProbe, model: Model, served_as: str) -> ReplayProbe:
    """The greedy answer under the new rule, which no filter drops, so that its likelihood is finite."""
    prompt_ids = list(probe.prompt_ids)
    params = SamplingParams(max_tokens=REPLAY_TOKENS, temperature=0.0)
    (answer,) = model.generate([prompt_ids], params, profile=served_as)
    nll_base, nll_fused = (
        _nll(model, prompt_ids, answer.token_ids, profile) for profile in (None, served_as)
    )
    return ReplayProbe(
        prompt_ids=probe.prompt_ids, answer_ids=answer.token_ids, nll_base=nll_base, nll_fused=nll_fused
    )


def _nll(model: Model, prompt_ids: list[int], answer_ids: tuple[int, ...], profile: str | None) -> float:
    (scored,) = model.score([[*prompt_ids, *answer_ids]], profile=profile, starts=[len(prompt_ids)])
    values = [value for value in scored.logprobs[len(prompt_ids) :] if value is not None]
    return max(-fsum(values) / len(values), 0.0)
