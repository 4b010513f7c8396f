"""fused_sample with everything fixed but data, so that a CUDA graph can hold it. Called by engines, one a shape.

Knows no request and no schedule. Legend: R rows of logits, V real vocabulary, B rows to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from uld_kernels import ops, sampler_reference
from uld_kernels.rows import LateRows, SampleOutput, SampleRow
from uld_kernels.sample_shape import SampleShape
from uld_kernels.workspace import Workspace

if TYPE_CHECKING:
    from uld_kernels.sampler_triton import TritonSampler


class StaticSampler:
    """One batch of one shape: fill it with rows, run it on logits, read its output; over and over.

    >>> from uld_kernels import SampleRow
    >>> rows = [SampleRow(0, temperature=0.0)]
    >>> sampler = StaticSampler(SampleShape.of(rows, num_rows=4), vocab_size=3,
    ...                         protected_ids=torch.tensor([], dtype=torch.int64), device=torch.device("cpu"))
    >>> sampler.fill(rows)
    >>> sampler.run(torch.tensor([[1.0, 3.0, 2.0]]))
    >>> sampler.output().token_ids_B
    tensor([1])
    """

    def __init__(
        self,
        shape: SampleShape,
        *,
        vocab_size: int,
        protected_ids: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        head_dtype: torch.dtype = torch.bfloat16,
        workspace: Workspace | None = None,
    ) -> None:
        """`protected_ids` as in fused_sample, on `device`; `dtype` of the logits that it will run on, `head_dtype` of
        late rows' head where the shape has any. `workspace` may be shared by samplers that never run at the same time.

        The first one of a device tries the kernels, which takes seconds: make it before serving. Raises
        WorkspaceTooSmall.
        """
        self.shape = shape
        self.vocab_size = vocab_size
        self._dtype, self._head_dtype = dtype, head_dtype
        self._protected_ids = protected_ids
        self._rows: list[SampleRow] = []
        self._output: SampleOutput | None = None
        self._triton: TritonSampler | None = None
        if ops.prove(
            device, vocab_size, dtype=dtype, head_dtype=None if shape.first_late is None else head_dtype
        ):
            from uld_kernels.sampler_triton import TritonSampler

            self._triton = TritonSampler(
                shape, vocab_size=vocab_size, protected_ids=protected_ids, device=device, workspace=workspace
            )

    @property
    def is_recordable(self) -> bool:
        """Whether `run` only launches kernels, so that a CUDA graph can record it."""
        return self._triton is not None

    def fill(self, rows: Sequence[SampleRow]) -> None:
        """What the next run draws. Never waits for the device; an earlier run may still be going on.

        Places that `rows` leave free draw nothing. Raises ValueError if the shape does not cover `rows`.
        """
        if self._triton is not None:
            self._triton.fill(rows)
            return
        self.shape.check(rows)
        self._rows = list(rows)

    def run(self, logits_RV: torch.Tensor, late: LateRows | None = None) -> None:
        """Draws one token for each row of the last fill from (R, W) logits, and from late rows where the shape has any.

        Raises ValueError for other types, and for late rows that are missing or that the shape does not have.
        """
        if (late is None) != (self.shape.first_late is None):
            raise ValueError(f"{self.shape} and {'no ' if late is None else ''}late rows do not go together")
        if late is not None:
            late.check(self.vocab_size)
        if self._triton is not None:
            if logits_RV.dtype != self._dtype:
                raise ValueError(f"this sampler was made for {self._dtype} logits, got {logits_RV.dtype}")
            if late is not None and late.weight_WD.dtype != self._head_dtype:
                raise ValueError(
                    f"this sampler was made for a head in {self._head_dtype}, got {late.weight_WD.dtype}"
                )
            self._triton.run(logits_RV, late)
            return
        # Late rows count from the shape's number on, whatever else the logits hold.
        self._output = sampler_reference.sample(
            logits_RV[: self.shape.first_late],
            self._rows,
            vocab_size=self.vocab_size,
            protected_ids=self._protected_ids,
            late=late,
        )

    def output(self) -> SampleOutput:
        """What the last run drew, for the rows of the last fill; its tensors are overwritten by the next run."""
        if self._triton is not None:
            return self._triton.output()
        if self._output is None:
            raise ValueError("nothing has been run yet")
        return self._output
