"""Networks spread over the processes of torch.distributed: each holds its share (FSDP2)."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.distillation import processes


def shard(network: nn.Module, device_type: str) -> None:
    """Spread a transformer's parameters over all processes; a block is gathered for its forward.

    Gradients become the mean over all processes. Parameters are replaced: take them afterwards.
    Does nothing for a process that is alone.
    """
    if processes.count() == 1:
        return
    mesh = init_device_mesh(device_type, (processes.count(),))
    for block in network.blocks:  # type: ignore[union-attr]  # a ModuleList
        assert isinstance(block, nn.Module)
        fully_shard(block, mesh=mesh)
    # The outermost one, too: what it kept gathered would miss changes between two forwards.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
