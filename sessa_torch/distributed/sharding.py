"""Weights, gradients and optimizer moments in shards (FSDP2, `fully_shard`), one copy in a group.

Every matrix is sharded by its first axis and gathered when its layer needs it, in bfloat16 where
the model computes in it; gradients are summed in float32. Norms, biases, gains and other small
parameters stay whole in every process, in float32, so that no rounding changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sessa_torch.checkpoint import to_numpy

# Layers with fewer parameters are gathered together, because the host needs longer to start a
# gathering than the GPUs to send a small one.
LEAST_PARAMETERS = 2**24


def shard(root: nn.Module, layers: nn.ModuleList, processes: int, *, bfloat16: bool) -> None:
    """Shard the parameters of `root` over groups of `processes` neighbours, each group a copy.

    The `layers` are gathered one by one, small ones several at a time; what else `root` holds,
    embedding and head, stays float32 and is gathered for a whole pass. Parameters are replaced by
    DTensors.
    """
    # Importing FSDP takes long, and training with one process does not need it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device, size = next(root.parameters()).device.type, dist.get_world_size()
    if processes == size:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    else:
        shape = (size // processes, processes)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("copies", "shard"))
    whole = {parameter for parameter in root.parameters() if not _is_matrix(parameter)}
    low = torch.bfloat16 if bfloat16 else None
    for modules, stored in [*((group, low) for group in _groups(layers)), ([root], None)]:
        policy = MixedPrecisionPolicy(stored, torch.float32, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=whole)


def _groups(layers: nn.ModuleList) -> Iterator[list[nn.Module]]:
    """Yield neighbouring layers that together have at least LEAST_PARAMETERS, if there are any."""
    group: list[nn.Module] = []
    count = 0
    for layer in layers:
        group.append(layer)
        count += sum(parameter.numel() for parameter in layer.parameters())
        if count >= LEAST_PARAMETERS:
            yield group
            group, count = [], 0
    if group:
        yield group


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and len(parameter) > 1


def is_sharded(parameter: Tensor) -> bool:
    """Return True for a parameter of which this process holds a part."""
    return hasattr(parameter, "full_tensor")


def whole_array(tensor: Tensor) -> np.ndarray:
    """Return a copy of a tensor as a NumPy array; every process that shares it must call."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return to_numpy(tensor).copy()


def own_values(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory, without history."""
    part: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()
    return part


def as_part_of(values: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor as the DTensor that it is, sharded as `like`."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import DTensor

    mesh, shape = like.device_mesh, {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(values, mesh, like.placements, **shape)


def as_copy_of(value: Tensor, like: Any) -> Tensor:
    """Return a value that all processes hold, for operations with `like`."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def held_rows(like: Any) -> slice | None:
    """Return the rows of a parameter that this process holds, None where it holds all."""
    if not is_sharded(like):
        return None
    mesh = like.device_mesh["shard"]
    first = mesh.get_local_rank() * -(-len(like) // mesh.size())
    return slice(min(first, len(like)), min(first, len(like)) + len(own_values(like)))


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to the global norm `max_norm`; return the norm before."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() for g in gradients if is_sharded(g)]
    others = [g for g in gradients if not is_sharded(g)]
    squares = torch.nn.utils.get_total_norm(parts).float() ** 2
    mesh = next(g for g in gradients if is_sharded(g)).device_mesh
    dist.all_reduce(squares, group=mesh.get_group("shard"))
    norm = (squares + torch.nn.utils.get_total_norm(others) ** 2).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(parts + others, factor)
    return norm
