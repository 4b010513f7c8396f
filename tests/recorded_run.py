"""A CPU stand-in for a CUDA graph: records every tensor operation of a run with the very tensors that it had, and
repeats these without running any Python of ours. What a CUDA graph cannot record, it refuses too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Reading a tensor on the host, and making one from what the host holds.
WAITS = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::_unique2", "aten::item"}


class RecordedRun:
    """`record`: RecordedRun(run) is a Recording. Like a graph's, its result is the same tensor after each replay."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        run()
        recorder = _Recorder()
        with recorder:
            self.result = run()
        self._calls = recorder.calls
        # A graph's recording computes nothing: only a replay does.
        self.result.fill_(torch.nan)

    def replay(self) -> None:
        for func, args, kwargs, before in self._calls:
            after = func(*args, **kwargs)
            inputs = {_address(tensor) for tensor in _tensors((args, kwargs))}
            for old, new in zip(_tensors(before), _tensors(after), strict=True):
                if _address(old) not in inputs:  # else a view, or written in place
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., object], tuple[object, ...], dict[str, object], object]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = str(func.name()).split(".")[0]
        if name in WAITS:
            raise RuntimeError(f"{name} cannot be recorded: it waits for the device or copies from the host")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    # A packed weight has no storage to ask.
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
