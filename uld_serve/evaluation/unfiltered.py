"""A profile without its fused filter, to measure likelihoods with: the filter gives what it drops probability 0, while
what the rule does to it is finite and tells how much. Called by the commands that evaluate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uld_serve.evaluation.settings import without_fused_filter
from uld_serve.profiles.profile import ProfileVersion, StreamSpec
from uld_serve.profiles.store import write_profile

UNFILTERED = "unfiltered"


@contextmanager
def unfiltered_copy(
    directory: Path, version: ProfileVersion, *, name: str = UNFILTERED
) -> Iterator[Path | None]:
    """The profile without its fused filter, as a profile of its own for the time of a verification; None if there
    is no such filter. Its replay probes are dropped: they were measured with the filter."""
    profile = version.profile
    if profile.rule.filter.mode != "fused":
        yield None
        return
    rule = without_fused_filter(profile.rule)
    with tempfile.TemporaryDirectory() as scratch:
        write_profile(
            Path(scratch) / name,
            profile.model_copy(update={"name": name, "rule": rule, "streams": located_streams(version)}),
            adapters={file: directory / file for file in profile.adapter_names},
            probes=version.probes.model_copy(update={"replay": ()}),
            training={"copy_of": version.ref},
        )
        yield Path(scratch) / name


def located_streams(version: ProfileVersion) -> tuple[StreamSpec, ...]:
    """Its streams with their models where they lie, for a copy that lies elsewhere."""
    return tuple(
        stream
        if stream.model is None
        else stream.model_copy(
            update={"model": stream.model.model_copy(update={"id": version.locate(stream.model)})}
        )
        for stream in version.profile.streams
    )
