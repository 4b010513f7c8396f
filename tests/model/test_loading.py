"""Loading a base: local directories as transformers writes them, and a clear refusal of everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_base import Tiny

from uld_serve.errors import ModelUnsupported
from uld_serve.model import loading
from uld_serve.model.loading import embedded_model_dir, fingerprint, load_base, tokenizer_hash


def copied(tiny: Tiny, folder: Path) -> Path:
    shutil.copytree(tiny.folder, folder)
    return folder


def test_a_base_knows_its_real_vocabulary_and_its_ends_of_text(tiny: Tiny) -> None:
    base = tiny.base
    assert (base.vocab_size, base.head_width, base.num_layers) == (259, 264, 4)
    assert base.eos_ids == (257,)
    assert (base.id, base.served_name) == ("tiny-llama", "tiny-llama")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_fingerprint_covers_tensors_and_not_how_they_are_split(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny.folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    assert fingerprint(tmp_path) == tiny.base.fingerprint
    tensors[names[0]].view(-1)[0] += 1
    save_file(tensors, tmp_path / "changed.safetensors")
    for file in tmp_path.glob("model-*"):
        file.unlink()
    assert fingerprint(tmp_path) != tiny.base.fingerprint


def test_the_fingerprint_does_not_depend_on_the_dtype_it_is_served_in(tiny: Tiny) -> None:
    assert load_base(str(tiny.folder), dtype="bfloat16", device="cpu").fingerprint == tiny.base.fingerprint


def test_a_base_names_its_device_as_its_tensors_do(tiny: Tiny) -> None:
    base = load_base(str(tiny.folder), dtype="float32", device="cpu:0")
    assert base.device == base.model.get_output_embeddings().weight.device


def test_the_tokenizer_hash_ignores_padding_set_by_its_last_user(tiny: Tiny) -> None:
    tokenizer = load_base(str(tiny.folder), dtype="float32", device="cpu").tokenizer
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == tiny.base.tokenizer_hash


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "cannot be loaded"),
        ("config.json", "no config.json"),
        ("tokenizer.json", "cannot be loaded"),
    ],
)
def test_an_incomplete_directory_is_refused(tiny: Tiny, tmp_path: Path, missing: str, message: str) -> None:
    folder = copied(tiny, tmp_path / "broken")
    (folder / missing).unlink()
    with pytest.raises(ModelUnsupported, match=message):
        load_base(str(folder), device="cpu")


def test_a_pickled_checkpoint_is_not_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnsupported):
        load_base(str(folder), device="cpu")


def test_code_that_comes_with_a_model_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"},
        "model_type": "evil",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ModelUnsupported):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere/at/all"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(ref: str) -> None:
    with pytest.raises(ModelUnsupported, match="does not exist"):
        load_base(ref, device="cpu")


def test_an_id_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnsupported, match="neither a directory nor"):
        load_base("nobody/no-such-model-here", device="cpu")


def test_a_missing_or_altered_embedded_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULD_SERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "_embedded_gguf", lambda: tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"not the model")
    with pytest.raises(ModelUnsupported, match="sha256"):
        embedded_model_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.model
def test_the_embedded_model_answers_in_both_dtypes() -> None:
    for dtype in ("float32", "bfloat16"):
        base = load_base(None, dtype=dtype, device="cpu")
        ids = base.tokenizer.encode("The capital of France is")
        logits = base.model(torch.tensor([ids])).logits[0, -1]
        assert base.tokenizer.decode([int(logits.argmax())]) == " Paris"
        assert (base.vocab_size, base.num_layers, base.served_name) == (49152, 30, "smollm2-135m-instruct")
