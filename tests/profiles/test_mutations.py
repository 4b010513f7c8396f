"""Seeded damage to a valid directory: each is refused with a ProfileError naming the file, nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from scale import scaled
from tiny_profile import FACTS

from uld_serve.errors import ProfileCorrupt, ProfileError
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import check_base
from uld_serve.profiles.store import read_profile

Maker = Callable[..., tuple[Path, ProfileVersion]]
Mutation = Callable[[Path, random.Random], str]
SEEDS_EACH = scaled(fast=20, gate=25, aim=420)
WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
JSON_FILES = ("profile.json", "probes.json", "training.json", CONFIG)
FILES = (*JSON_FILES, WEIGHTS, "README.md")


def _rehash(directory: Path) -> None:
    """What an attacker, or a careless editor, would do after changing a file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(directory)}\n"
        for file in sorted(files, key=lambda file: str(file.relative_to(directory)))
    ]
    (directory / "SHA256SUMS").write_text("".join(lines))


def _edit(directory: Path, name: str, data: bytes) -> str:
    (directory / name).write_bytes(data)
    _rehash(directory)
    return name


# Each mutation damages the copy and returns what the refusal must name.


def truncated(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*FILES, "SHA256SUMS"))
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(data[: rng.randrange(len(data))])
    return name if name != "SHA256SUMS" else ""


def truncated_with_fixed_hash(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*JSON_FILES, WEIGHTS))
    data = (directory / name).read_bytes()
    return _edit(directory, name, data[: rng.randrange(len(data.rstrip()))])


def flipped_bit(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    data = bytearray((directory / name).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (directory / name).write_bytes(bytes(data))
    return name


def flipped_bit_in_sums(directory: Path, rng: random.Random) -> str:
    data = bytearray((directory / "SHA256SUMS").read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (directory / "SHA256SUMS").write_bytes(bytes(data))
    return ""


def appended(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    with (directory / name).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 9)))
    return name


def missing(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*FILES, "SHA256SUMS"))
    (directory / name).unlink()
    return name


def missing_with_fixed_sums(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*JSON_FILES, WEIGHTS))
    (directory / name).unlink()
    _rehash(directory)
    return name


def symlink(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*FILES, "SHA256SUMS"))
    elsewhere = directory.parent / "elsewhere"
    shutil.copy(directory / name, elsewhere)
    (directory / name).unlink()
    (directory / name).symlink_to(elsewhere)
    return name


def linked_folder(directory: Path, rng: random.Random) -> str:
    (directory / "adapter").rename(directory.parent / "moved")
    (directory / "adapter").symlink_to(directory.parent / "moved")
    return "adapter"


def pipe(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*FILES, "SHA256SUMS"))
    (directory / name).unlink()
    os.mkfifo(directory / name)
    return name


def folder_for_file(directory: Path, rng: random.Random) -> str:
    name = rng.choice(JSON_FILES[:3])
    (directory / name).unlink()
    (directory / name).mkdir()
    return name


def extra_file(directory: Path, rng: random.Random) -> str:
    name = rng.choice(
        ("pytorch_model.bin", "adapter/adapter_model.bin", ".hidden", "a\nb", "adapter/README.md")
    )
    (directory / name).write_bytes(rng.randbytes(8))
    return Path(name).name.replace("\n", "\\n")


def extra_listed_file(directory: Path, rng: random.Random) -> str:
    name = rng.choice(("other/adapter_config.json", "adapter/profile.json", "adapter/README.md"))
    (directory / name).parent.mkdir(exist_ok=True)
    return _edit(directory, name, b"{}")


def huge_file(directory: Path, rng: random.Random) -> str:
    name = rng.choice((*FILES, "SHA256SUMS"))
    with (directory / name).open("r+b") as file:
        file.truncate(2**33)  # sparse: takes no space
    return name


def header_length(directory: Path, rng: random.Random) -> str:
    data = (directory / WEIGHTS).read_bytes()
    size = rng.choice((0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)))
    return _edit(directory, WEIGHTS, size.to_bytes(8, "little") + data[8:])


def header_entry(directory: Path, rng: random.Random) -> str:
    data = (directory / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    field, value = rng.choice(
        (
            ("dtype", "I64"),
            ("dtype", "F64"),
            ("dtype", None),
            ("dtype", []),
            ("shape", [2**62, 2**62]),
            ("shape", [-4, 16]),
            ("shape", [0, 16]),
            ("shape", [4.0, 16]),
            ("shape", "4"),
            ("shape", [4, 16, 1]),
            ("data_offsets", [0, 2**60]),
            ("data_offsets", [8, 4]),
            ("data_offsets", None),
            ("extra", 1),
        )
    )
    entry[field] = value
    text = json.dumps(header).encode()
    return _edit(directory, WEIGHTS, len(text).to_bytes(8, "little") + text + data[8 + size :])


def not_finite(directory: Path, rng: random.Random) -> str:
    tensors = load((directory / WEIGHTS).read_bytes())
    flat = tensors[rng.choice(sorted(tensors))].view(-1)
    flat[rng.randrange(len(flat))] = rng.choice((torch.nan, torch.inf, -torch.inf))
    return _edit(directory, WEIGHTS, save(tensors))


def other_tensors(directory: Path, rng: random.Random) -> str:
    """A tensor too few, too many, misnamed, of another shape, rank or type."""
    tensors = load((directory / WEIGHTS).read_bytes())
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(6)
    if kind == 1:
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == 2:
        tensors[name] = tensor.T.contiguous() if tensor.shape[0] != tensor.shape[1] else tensor[:1]
    elif kind == 3:
        tensors[name.replace("layers.", "layers.1")] = tensor
    elif kind == 4:
        tensors[name] = tensor.to(rng.choice((torch.float64, torch.int8)))
    elif kind == 5:
        tensors[name] = tensor
        tensors[rng.choice(("lm_head.weight", "base_model.model.lm_head.lora_A.weight", name + ".x"))] = (
            tensor.clone()
        )
    return _edit(directory, WEIGHTS, save(tensors))


def unknown_or_wrong_field(directory: Path, rng: random.Random) -> str:
    name = rng.choice(("profile.json", "probes.json", CONFIG))
    value = json.loads((directory / name).read_bytes())
    if rng.random() < 0.5:
        value[rng.choice(("forget_profile", "strenght", "", "__proto__"))] = rng.choice(
            (None, 1, "x", [], {})
        )
    else:
        key = rng.choice(
            {
                "profile.json": ["name", "base", "streams", "rule", "schema"],
                "probes.json": ["keywords", "forget"],
                CONFIG: ["r", "lora_alpha", "peft_type", "bias"],
            }[name]
        )
        value[key] = rng.choice((-1, 2.5, "no such value", [[]], {"a": None}, True))
    return _edit(directory, name, json.dumps(value).encode())


def duplicate_key(directory: Path, rng: random.Random) -> str:
    name = rng.choice(JSON_FILES)
    text = (directory / name).read_text()
    key = rng.choice(list(json.loads(text)))
    return _edit(directory, name, text.replace("{", f'{{"{key}": null, ', 1).encode())


def not_json(directory: Path, rng: random.Random) -> str:
    name = rng.choice(JSON_FILES)
    data = (directory / name).read_bytes()
    damaged = rng.choice(
        (
            b"",
            b"[]",
            b"\xff\xfe",
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            b"[" * 60_000,
            data + b"x",
        )
    )
    return _edit(directory, name, damaged)


def token_outside_vocabulary(directory: Path, rng: random.Random) -> str:
    probes = json.loads((directory / "probes.json").read_text())
    probes["replay"][0]["answer_ids"].append(rng.randrange(300, 2**31))
    return _edit(directory, "probes.json", json.dumps(probes).encode())


def other_layers(directory: Path, rng: random.Random) -> str:
    profile = json.loads((directory / "profile.json").read_text())
    profile["streams"][0]["fork"], profile["streams"][0]["exit"] = rng.choice(
        ((0, 3), (3, 4), (1, 3), (0, 2))
    )
    _edit(directory, "profile.json", json.dumps(profile).encode())
    return CONFIG


def other_base(directory: Path, rng: random.Random) -> str:
    profile = json.loads((directory / "profile.json").read_text())
    key = rng.choice(("fingerprint", "tokenizer", "vocab_size", "num_layers"))
    other = (
        "sha256:" + rng.randbytes(32).hex()
        if key in ("fingerprint", "tokenizer")
        else rng.randrange(400, 900)
    )
    profile["base"][key] = other
    _edit(directory, "profile.json", json.dumps(profile).encode())
    return str(other)


MUTATIONS: tuple[Mutation, ...] = (
    truncated,
    truncated_with_fixed_hash,
    flipped_bit,
    flipped_bit_in_sums,
    appended,
    missing,
    missing_with_fixed_sums,
    symlink,
    linked_folder,
    pipe,
    folder_for_file,
    extra_file,
    extra_listed_file,
    huge_file,
    header_length,
    header_entry,
    not_finite,
    other_tensors,
    unknown_or_wrong_field,
    duplicate_key,
    not_json,
    token_outside_vocabulary,
    other_layers,
    other_base,
)


@pytest.mark.row("profile directory mutation")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_damage_is_refused_by_name(
    make_profile: Maker,
    tmp_path: Path,
    mutation: Mutation,
    record_property: Callable[[str, object], None],
) -> None:
    original, _ = make_profile()
    for seed in range(SEEDS_EACH):
        rng = random.Random(f"{mutation.__name__} {seed}")
        directory = tmp_path / f"damaged{seed}" / "acme"
        shutil.copytree(original, directory)
        for path in directory.rglob("*"):
            path.chmod(0o755)
        named = mutation(directory, rng)
        with pytest.raises(ProfileError) as caught:
            check_base(read_profile(directory), FACTS)
        assert named in caught.value.message, f"seed {seed}: {caught.value.message}"
        assert "'acme'" in caught.value.message
        assert len(caught.value.message) < 1000
    read_profile(original)
    record_property("count", SEEDS_EACH)


def test_a_symlinked_profile_directory_is_refused(make_profile: Maker, tmp_path: Path) -> None:
    original, _ = make_profile()
    (tmp_path / "link").symlink_to(original)
    with pytest.raises(ProfileError, match="link cannot be opened as a directory"):
        read_profile(tmp_path / "link")


def _cut(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.truncate(0)


def _flip(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize("change", [_cut, _flip, Path.unlink])
def test_an_adapter_that_changed_since_it_was_verified_is_refused(
    make_profile: Maker, change: Callable[[Path], None]
) -> None:
    directory, _ = make_profile()
    version = read_profile(directory)
    before = version.adapters["assistant"]
    weights = directory / WEIGHTS
    weights.chmod(0o600)
    change(weights)
    with pytest.raises(ProfileCorrupt, match=r"acme.*adapter/adapter_model.safetensors has changed"):
        version.adapters["assistant"]
    assert before.num_parameters > 0, "what is in use does not look at the file again"
