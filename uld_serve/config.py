"""Settings of the engine: what a user may set, and the same with every "auto" resolved once at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from uld_serve.errors import InvalidRequest

HeadUse = Literal["auto", "whole", "late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a user may set; None means "choose for this base and device" (see `resolve`)."""

    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    own_kv_bytes: int | None = None
    adapter_bytes: int | None = None
    sampler_bytes: int | None = None
    """Room that the samplers of recorded steps share. A step that needs more is not recorded, with a warning."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_step_rows: int = 544
    """512 tokens of a prompt and their assistants: one row more would cost a step of its own."""
    max_waiting: int = 256
    cuda_graphs: bool | None = None
    """Replay recorded decode steps; by default wherever there is a GPU. A recording is used once it has given what the
    decoder and the sampler give for three steps; one that does not is left alone."""
    overlap: bool | None = None
    """Launch a step while the one before it is in flight. By default on a GPU, which runs beside the host."""

    head: HeadUse = "auto"
    """An assistant's logits: whole, in one product with the target's, or late, on the tokens that a filter leaves, if
    its rule asks for no others. auto is late on a CPU, where each row of the product costs (`uld-serve bench sampler
    --head` measures both). On a GPU, where reading the head costs and is done anyway, it is whole until a device has
    shown from which batch on late is faster; and steps with late rows are not recorded as CUDA graphs."""

    measure_every: int = 0
    """Say what forgetting did to the first token of every request under a profile, and to each one so many further on;
    0: to none. To measure costs about as much as a log-probability."""

    def __post_init__(self) -> None:
        if self.measure_every < 0:
            raise InvalidRequest(
                f"measure_every must be 0 or more, not {self.measure_every}", param="measure_every"
            )
        if self.head not in get_args(HeadUse):
            raise InvalidRequest(f"head must be auto, whole or late, not {self.head!r}", param="head")
        for name in (
            "max_model_len",
            "kv_cache_bytes",
            "own_kv_bytes",
            "adapter_bytes",
            "sampler_bytes",
            "block_size",
            "max_num_seqs",
            "max_step_rows",
            "max_waiting",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {value}", param=name)

    def resolve(
        self,
        *,
        max_positions: int,
        bytes_per_token: int,
        free_device_bytes: int | None,
        sampler_bytes: int = 0,
    ) -> EngineConfig:
        """Fix the context length and the number of cache blocks.

        Where steps are recorded, their samplers get `sampler_bytes` of a GPU's free memory first; else what the
        argument of that name says. Of what is left the cache gets `kv_cache_bytes`; else eight tenths, or 1 GiB of main
        memory. The adapters of all profiles get `adapter_bytes`; else one tenth, or 2 GiB. `own_kv_bytes` is for each
        cache that some profile needs beside the target's, and resolved when the first such profile comes.
        """
        max_model_len = min(self.max_model_len or max_positions, max_positions)
        on_cpu = free_device_bytes is None
        if self.cuda_graphs and on_cpu:
            raise InvalidRequest("cuda_graphs needs a CUDA device", param="cuda_graphs")
        cuda_graphs = not on_cpu if self.cuda_graphs is None else self.cuda_graphs
        if self.sampler_bytes is not None and not cuda_graphs:
            raise InvalidRequest(
                "sampler_bytes is for recorded steps, and none are recorded here: leave it out",
                param="sampler_bytes",
            )
        sampler_bytes = (self.sampler_bytes or sampler_bytes) if cuda_graphs else 0
        free = (free_device_bytes or 0) - sampler_bytes
        if cuda_graphs and free <= 0:
            raise InvalidRequest(
                f"sampler_bytes {sampler_bytes} leaves nothing of {free_device_bytes} free bytes for keys and values; "
                "lower it or max_num_seqs",
                param="sampler_bytes",
            )
        budget = self.kv_cache_bytes or (2**30 if on_cpu else free * 8 // 10)
        num_blocks = budget // (bytes_per_token * self.block_size)
        if num_blocks < 1:
            raise InvalidRequest(
                f"kv_cache_bytes {budget} holds no block of {self.block_size} tokens ({bytes_per_token} bytes each)",
                param="kv_cache_bytes",
            )
        return EngineConfig(
            max_model_len=min(max_model_len, num_blocks * self.block_size),
            num_blocks=num_blocks,
            kv_cache_bytes=num_blocks * bytes_per_token * self.block_size,
            adapter_bytes=self.adapter_bytes or (2**31 if on_cpu else free // 10),
            sampler_bytes=sampler_bytes,
            own_kv_bytes=self.own_kv_bytes,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_step_rows=self.max_step_rows,
            max_waiting=self.max_waiting,
            cuda_graphs=cuda_graphs,
            overlap=not on_cpu if self.overlap is None else self.overlap,
            measure_every=self.measure_every,
            late_head=self.head == "late" or (self.head == "auto" and on_cpu),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Resolved settings. `max_step_rows` bounds a step's rows, target and assistant rows together. `own_kv_bytes` is
    None until there is something to share memory with (engine.provision)."""

    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    adapter_bytes: int
    sampler_bytes: int
    own_kv_bytes: int | None
    block_size: int
    max_num_seqs: int
    max_step_rows: int
    max_waiting: int
    cuda_graphs: bool
    overlap: bool
    measure_every: int
    late_head: bool
