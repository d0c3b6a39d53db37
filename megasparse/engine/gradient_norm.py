"""The global gradient norm of a step as all ranks know it, before anything has made use of a gradient.

norm, asked = global_gradient_norm(engine.access(parameters), engine.model, engine.mesh)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.kernels.optimizer import Active, square_sum
from megasparse.layers import PackedLinear
from megasparse.models.gpt import GPT
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.sparsity.state import StateAccess, StateFragment
from megasparse.sparsity.topology import Topology


@torch.no_grad()
def global_gradient_norm(
    access: StateAccess,
    model: GPT,
    mesh: Mesh,
    losses: Tensor | float = 0.0,
    *,
    active_only: bool = False,
    asks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm over all parameters, and how many ranks ask: float64 scalars on the device, the same bits on every rank,
    which all call it between ``backward`` and ``step``.

    access: to all parameters by name. losses: a sum of this rank's losses. NaN or infinity where any gradient or loss
    of any rank is. Gradients of inactive weights, which exist in steps that may grow them, do not count as long as they
    are finite: otherwise the norms of those steps would stand out. active_only: in other steps, where they are 0, the
    kernel for CPUs passes over them. asks: whether this rank wants something of all, such as to stop, which they learn
    by the one reduction that a step needs anyway.
    """
    rank = mesh.tensor_parallel.rank
    # What is packed is all active, but for a few empty slots, whose gradient is 0.
    layers = {
        id(layer.weight): (name, layer)
        for name, layer in model.sparse_layers().items()
        if not isinstance(layer, PackedLinear)
    }
    topologies = {
        weight: Topology(name, layer.mask, layer.block_size, layer.grid, rank)
        for weight, (name, layer) in layers.items()
        if layer.collect_dense_gradient
    }
    parameters = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64, device=mesh.device) + 0 * losses
    for name, fragment in access.fragments().items():
        # What several ranks hold alike must count once.
        holders = mesh.data_parallel.size // access.shard.size
        if not shard_spec_of(parameters[name]).is_divided:
            holders *= mesh.tensor_parallel.size
        weight = id(parameters[name])
        if active_only and weight not in topologies:
            layer = layers[weight][1] if weight in layers else None
            active = None if layer is None else Active(layer.mask, layer.block_size, fragment.start)
            total += square_sum(fragment.gradient.contiguous(), active) / fragment.gradient_scale**2 / holders
        else:
            total += _square(fragment, topologies.get(weight)).to(mesh.device) / holders
    # Filled in by the device: a copy from the host would make it wait.
    total, asking = mesh.world.sum_(torch.stack([total, torch.full_like(total, float(asks))])).unbind()
    return total.sqrt(), asking


def _square(fragment: StateFragment, topology: Topology | None) -> Tensor:
    """Square of the norm of a piece, float64. topology: counts only its active weights."""
    gradient = fragment.gradient
    square = _norm(gradient).square()
    if topology is not None:
        active = topology.weights_slice(fragment.start, fragment.numel).to(gradient.device)
        # 0 times the whole is NaN where that is not finite.
        square = 0 * square + _norm(gradient.masked_fill(~active, 0)).square()
    return square / fragment.gradient_scale**2


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32).double()
