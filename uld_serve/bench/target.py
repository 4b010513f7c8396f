"""From options to the base that is measured, the room its engine needs, and the shape of random adapters. Called by
every bench command that holds an engine itself. Knows no mode and no clock."""

from __future__ import annotations

import argparse

import torch

from uld_serve.bench.random_profiles import STRENGTHS, AdapterShape
from uld_serve.bench.shapes import SHAPES, random_base
from uld_serve.config import EngineSettings
from uld_serve.errors import InvalidRequest
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.loading import Base, load_base

DEFAULT_LAYERS, DEFAULT_RANK = 8, 16
BLOCK_SIZE = 16
SPARE_BLOCKS = 8


def add_target_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of `target_of`; the group, for more."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", metavar="ID_OR_PATH", help="default: the embedded one")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    what.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    what.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    return what


def target_of(args: argparse.Namespace) -> Base:
    """Raises InvalidRequest for options that do not go together, ModelUnsupported."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.shape is None:
        return load_base(args.model, dtype=args.dtype, device=args.device)
    if args.model is not None:
        raise InvalidRequest("--shape and --model exclude each other")
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return random_base(args.shape, dtype=args.dtype, device=torch.device(name))


def add_random_options(group: argparse._ArgumentGroup, when: str) -> None:
    """The options of `random_shape`."""
    group.add_argument(
        "--assistant-layers",
        type=int,
        metavar="K",
        help=f"random adapters on K layers {when} (default: {DEFAULT_LAYERS})",
    )
    group.add_argument(
        "--fork", type=int, metavar="LAYER", help="where the assistant forks (default: K before the end)"
    )
    group.add_argument("--rank", type=int, help=f"of a random adapter (default: {DEFAULT_RANK})")
    group.add_argument("--rule", choices=STRENGTHS, help="default: relu_difference")
    group.add_argument("--kv", choices=("borrowed", "own"), help="default: borrowed")


def random_shape(args: argparse.Namespace, base: Base) -> AdapterShape:
    layers = min(DEFAULT_LAYERS, base.num_layers) if args.assistant_layers is None else args.assistant_layers
    fork = base.num_layers - layers if args.fork is None else args.fork
    return AdapterShape(
        fork=fork,
        exit=fork + layers,
        rank=DEFAULT_RANK if args.rank is None else args.rank,
        kv=args.kv or "borrowed",
        rule=args.rule or "relu_difference",
    )


def room_for(base: Base, batch: int, tokens: int) -> EngineSettings:
    """An engine's settings with room for `batch` requests of `tokens` tokens and no more. Raises InvalidRequest."""
    limit = int(base.model.config.get_text_config().max_position_embeddings)
    if tokens > limit:
        raise InvalidRequest(f"{tokens} tokens a request; {base.id} has {limit} positions")
    blocks = batch * -(-tokens // BLOCK_SIZE) + SPARE_BLOCKS
    return EngineSettings(
        kv_cache_bytes=blocks * BLOCK_SIZE * kv_bytes_per_token(base),
        block_size=BLOCK_SIZE,
        max_num_seqs=max(batch, 64),
        # A prompt that is in the cache has up to a block of tokens left to run, and as many rows of an assistant with
        # keys and values of its own; see Variant.fill.
        max_step_rows=max((2 * BLOCK_SIZE + 2) * batch, EngineSettings().max_step_rows),
        max_waiting=max(batch, 256),
    )


def kv_bytes_per_token(base: Base) -> int:
    """Of the base's own layers."""
    config = base.model.config.get_text_config()
    heads = config.num_attention_heads
    return KVCache.bytes_per_token(
        base.num_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=base.dtype,
    )
