"""Numbers between host and device without either waiting for the other. Called by batch, sampler and decode graphs.

A copy from ordinary memory waits until the device has done all it was given before, and with it the host would. Pinned
memory is taken from torch's pool, which gives it out again only when the copy is over.
"""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host, on the device once it gets there; the host may forget them at once."""
    return _pinned(values, device).to(device, non_blocking=True)


def fill(buffer: torch.Tensor, values: torch.Tensor) -> None:
    """The same, into a tensor of the device; `values` may be written again at once."""
    buffer.copy_(_pinned(values, buffer.device), non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy for the host, there when an event recorded after this call is over; `values` may be written again."""
    if not values.is_cuda:
        return values.clone()
    found = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return found.copy_(values, non_blocking=True)


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
