"""The type of forward passes."""

from __future__ import annotations

import torch


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of forward passes: bf16 where it is asked for, or where `auto` finds the device good at it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        good = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        good = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if good else torch.float32
