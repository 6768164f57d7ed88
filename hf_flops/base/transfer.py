"""Transfers between the host and a device. The host waits for a device when it reads a value, so
values are read together, once all that yields them has been launched.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; the host does not wait for what it sends."""
    return tensor.to(device, dtype, non_blocking=tensor.device.type == "cpu")


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Return floating-point tensors on the CPU, those of a device by one transfer.

    Examples:
        >>> import torch
        >>> from hf_flops.base.transfer import to_host
        >>> to_host(torch.tensor(1.0), torch.tensor([2.0, 3.0]))
        [tensor(1.), tensor([2., 3.])]
    """
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    wide = reduce(torch.promote_types, [tensor.dtype for tensor in away])
    together = torch.cat([tensor.flatten().to(away[0].device, wide) for tensor in away]).cpu()
    parts = iter(together.split([tensor.numel() for tensor in away]))
    return [
        tensor if tensor.device.type == "cpu" else next(parts).view(tensor.shape).to(tensor.dtype)
        for tensor in tensors
    ]


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that was launched."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
