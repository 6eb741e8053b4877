"""The frozen base spread over the processes (PyTorch's FSDP2), a block's weights gathered while it is used.

The adapter is small and stays whole on every process, as in data-parallel training; its gradients are
averaged. So what is saved, resumed and averaged over time is the same with and without sharding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fingerprint import fingerprints

UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


def check_processes(accelerator: Accelerator, *, shard_base: bool) -> None:
    """Raises: ValueError where accelerate would shard what is trained, or where one process is to share."""
    if accelerator.distributed_type in UNSUPPORTED:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which shards what is trained; "
            "an adapter is too small for that: use plain --multi_gpu, and --shard_base for the frozen base"
        )
    if shard_base and accelerator.num_processes < 2:
        raise ValueError(
            "--shard_base spreads the base over several processes, and this is one; start them with "
            "accelerate launch --multi_gpu --num_processes N"
        )


def shard(denoiser: nn.Module, adapter: Adapter) -> None:
    """Spreads the denoiser's weights, block by block as its class says what belongs together.

    To be called on every process, after the adapter is attached.
    """
    # now, since no process can read sharded weights later
    adapter.base_values = fingerprints(list(adapter.layer_states.values()))
    blocks = set(getattr(denoiser, "_no_split_modules", None) or ())
    for module in reversed(list(denoiser.modules())):  # inner blocks first
        if type(module).__name__ in blocks:
            fully_shard(module)
    if not isinstance(denoiser, FSDPModule):
        fully_shard(denoiser)


@contextmanager
def gathered(denoiser: nn.Module) -> Iterator[None]:
    """The whole base on every process, so that one alone can draw with it; nothing for a base in one piece.

    To be entered by all processes, which meet again at the end of it.
    """
    modules = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def average_gradients(accelerator: Accelerator, adapter: Adapter) -> None:
    """The mean over processes, which the wrapper of data-parallel training would have taken."""
    for parameter in adapter.parameters():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
