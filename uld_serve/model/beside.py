"""A second stream of a CUDA device, for small launches that may run beside a large one. Used by the layers' products;
knows no tensor.

What runs there begins after all that the current stream has been given so far, and the current stream waits for it
before it goes on: a recorded graph has it as a branch beside the large launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Tensors made inside `branch` must be used after `join` only, and be let go of before the next `branch`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def branch(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
