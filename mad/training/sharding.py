"""Networks too large for one device: weights, gradients, moments and teacher in shards (FSDP2; Zhao et al. 2023, arXiv 2304.11277).

Each block, each head, and what is left of a network are cut along the first dimension of every parameter, one part per
process, and are whole only while they run. Student and teacher are cut alike, so that the moving average needs nobody else.

Weights, moments and reductions are fp32, and autocast runs as ever. In a bf16 run GPUs gather the blocks as bf16: half the
traffic, and no casted copies for autograd to keep. The residual stream, tokens and heads keep the precision that they have under
`ddp`; the blocks' norms and LayerScale alone are rounded to bf16. CPUs gather fp32: their norms take no mixed types.

A checkpoint holds whole tensors in the very format of unsharded training, so that any number of processes resumes it. They are
gathered one by one into the memory of the first process's machine: for a ViT-g about 18 GB (student, teacher, two moments).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mad.config.kinds import STANDALONE
from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.heads import Trainee
from mad.training import ranks
from mad.training.parallel import blocks


def is_wanted(run: RunConfig) -> bool:
    """Whether this run is sharded: it asks for it, and has more than one process.

    Raises:
        MadError: processes would see different kinds of views, and wait for each other's blocks for ever.
    """
    if run.runtime.parallel != "fsdp" or ranks.world_size() == 1:
        return False
    cropped = run.views.local_crops and (not run.mix or run.mix.get(STANDALONE))
    if run.mix_mode == "within" and run.method not in ("dinov2", "xmag") and cropped:
        raise MadError(
            f"runs.{run.name}.runtime.parallel: 'fsdp' needs the same kinds of views on every process, which mix_mode 'within' "
            "does not give; set mix_mode: alternate, or parallel: ddp"
        )
    return True


def shard(network: Trainee, dtype: torch.dtype, device: torch.device) -> None:
    """Cut `network`, whole and equal on every process, into shards in place; `dtype` is that of its forward passes.

    Everything is freed after the forward pass, the outermost parameters too: a teacher has no backward pass that would free
    them, and would go on with the weights of the first step.
    """
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    kept = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    lowered = replace(kept, param_dtype=dtype) if device.type == "cuda" else kept
    for block in blocks(network.backbone):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=lowered)
    for module in (*network.heads, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=kept)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has cut this network."""
    return isinstance(network, FSDPModule)


@torch.no_grad()
def own(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded or partly summed tensor complete, on every process; every process takes part. Another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_bytes(network: nn.Module) -> int:
    """Bytes, at most, of what is whole at a time besides the shards: the part that runs and the next one; 0 if not sharded."""
    if not is_sharded(network):
        return 0
    parts = [module for module in network.modules() if is_sharded(module)]
    outer, *inner = (sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts)
    return sum(sorted([outer - sum(inner), *inner])[-2:])


def gather_state(state: Any) -> Any:
    """Nested state with its sharded tensors whole in the first process's memory, None elsewhere; every process takes part."""
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if ranks.rank() == 0 else None
    return state


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, whole on every process, sharded as `like` is; itself where that is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    rows = -(-len(tensor) // ranks.world_size())  # as FSDP2 and torch.chunk cut: the last parts may be short or empty
    part = tensor[rows * ranks.rank() :][:rows].to(like.device, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_weights(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A network's whole state as `network`'s `load_state_dict` takes it."""
    like = network.state_dict()
    return {name: cut_like(tensor, like[name]) if name in like else tensor for name, tensor in state.items()}


def cut_moments(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state as `optimiser`'s `load_state_dict` takes it; the number of steps, a scalar, is not cut."""
    like = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        number: {name: cut_like(tensor, like[number]) if tensor.ndim else tensor for name, tensor in found.items()}
        for number, found in state["state"].items()
    }
    return {**state, "state": moments}
