"""Loading many profiles, and whether one fits a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_profile import FACTS

from uld_serve.errors import ProfileCorrupt, ProfileError, ProfileMismatch, UnknownProfile
from uld_serve.profiles.profile import ModelSpec, ProfileVersion, StreamSpec
from uld_serve.profiles.registry import Registry, check_base, find_profile

Maker = Callable[..., tuple[Path, ProfileVersion]]


def test_loads_a_directory_of_profiles_and_single_ones(make_profile: Maker, tmp_path: Path) -> None:
    directory, _ = make_profile("acme")
    make_profile("beta")
    single, _ = make_profile("gamma", root=tmp_path / "elsewhere")
    registry = Registry.load_all([directory.parent, single])
    assert registry.names() == ["acme", "beta", "gamma"]
    assert [version.name for version in registry] == ["acme", "beta", "gamma"]


def test_unfinished_temporary_directories_are_skipped(make_profile: Maker) -> None:
    directory, _ = make_profile()
    (directory.parent / ".acme.x7").mkdir()
    assert Registry.load_all(directory.parent).names() == ["acme"]


def test_one_unusable_profile_refuses_the_load(make_profile: Maker) -> None:
    directory, _ = make_profile()
    (directory.parent / "empty").mkdir()
    with pytest.raises(ProfileCorrupt, match="'empty': SHA256SUMS is missing"):
        Registry.load_all(directory.parent)


def test_unknown_name_is_404_and_lists_the_known(make_profile: Maker) -> None:
    registry = Registry([make_profile()[1]])
    with pytest.raises(UnknownProfile, match="known: acme") as caught:
        registry.get("nope")
    assert caught.value.status == 404


def test_one_name_is_one_digest(make_profile: Maker, tmp_path: Path) -> None:
    _, first = make_profile("acme")
    _, other = make_profile("acme", root=tmp_path / "other", strength=3.0)
    registry = Registry([first, first])
    assert len(registry) == 1
    with pytest.raises(ProfileError, match=f"{first.ref} and as {other.ref}"):
        registry.add(other)
    assert registry.get("acme") is first


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="nowhere"):
        Registry.load_all(tmp_path / "nowhere")


def test_profile_fits_its_own_base(make_profile: Maker) -> None:
    version = make_profile()[1]
    check_base(version, FACTS)
    assert set(version.adapters["assistant"].module_shapes()) < set(FACTS.module_shapes or {})


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"fingerprint": "sha256:" + "9" * 64}, ["sha256:" + "1" * 64, "sha256:" + "9" * 64]),
        ({"tokenizer_hash": "sha256:" + "9" * 64}, ["sha256:" + "2" * 64, "sha256:" + "9" * 64]),
        ({"vocab_size": 301}, ["300", "301"]),
        ({"num_layers": 5}, ["4", "5"]),
        ({"module_shapes": {"self_attn.q_proj": (99, 16)}}, ["(16, 16)", "(99, 16)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_profile_for_another_base_is_refused_naming_both(
    make_profile: Maker, change: dict[str, object], both: list[str]
) -> None:
    version = make_profile()[1]
    if "module_shapes" in change:
        change = {"module_shapes": {**(FACTS.module_shapes or {}), **dict(change["module_shapes"])}}
    with pytest.raises(ProfileMismatch) as caught:
        check_base(version, dataclasses.replace(FACTS, **change))
    assert all(value in caught.value.message for value in both)
    assert "'acme'" in caught.value.message


def test_a_stream_elsewhere_adapts_other_weights_than_the_bases(make_profile: Maker) -> None:
    version = make_profile()[1]
    model = ModelSpec(id="other", fingerprint="sha256:" + "f" * 64, tokenizer="sha256:" + "0" * 64)
    stream = StreamSpec(name="assistant", fork=0, exit=4, kv="own", adapter="adapter", model=model)
    profile = version.profile.model_copy(update={"streams": (stream,)})
    check_base(dataclasses.replace(version, profile=profile), dataclasses.replace(FACTS, module_shapes={}))
    with pytest.raises(ProfileMismatch, match="adapts a weight of"):
        check_base(version, dataclasses.replace(FACTS, module_shapes={"another": (1, 1)}))


def test_shapes_that_a_base_does_not_tell_are_not_compared(make_profile: Maker) -> None:
    check_base(make_profile()[1], dataclasses.replace(FACTS, module_shapes=None))


def test_a_name_means_another_version_after_it_was_replaced(make_profile: Maker, tmp_path: Path) -> None:
    _, first = make_profile("acme")
    _, other = make_profile("acme", root=tmp_path / "other", strength=3.0)
    registry = Registry()
    assert registry.replace(first) is None
    assert registry.replace(other) is first
    assert registry.get("acme") is other
    assert registry.remove("acme") is other
    assert len(registry) == 0
    with pytest.raises(UnknownProfile, match="known: none"):
        registry.remove("acme")


def test_a_profile_is_found_by_its_own_name_not_its_folders(make_profile: Maker) -> None:
    directory, version = make_profile("acme")
    moved = directory.rename(directory.parent / "elsewhere")
    make_profile("beta")
    found, read = find_profile(moved.parent, "acme")
    assert (found, read.digest) == (moved, version.digest)
    with pytest.raises(UnknownProfile, match=r"no profile .elsewhere. in .*; there is: beta, acme"):
        find_profile(moved.parent, "elsewhere")


def test_an_empty_folder_has_no_profile(tmp_path: Path) -> None:
    with pytest.raises(UnknownProfile, match="there is: none"):
        find_profile(tmp_path, "acme")
