"""Sharding the frozen base over the processes (PyTorch's FSDP2); a block's weights are gathered while in use.

The adapter is small and stays whole on every process, as in data-parallel training; its gradients are
averaged. So checkpoints, resuming and the moving average are the same with and without sharding.
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
    """Checks that accelerate's set-up goes with an adapter.

    Raises:
        ValueError: accelerate would shard the trained tensors, or one process is to shard the base.
    """
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
    """Shards the denoiser's weights, by the blocks that its class names in `_no_split_modules`.

    To be called on every process, after the adapter is attached.
    """
    # Fingerprints are taken now, since no process can read sharded weights later.
    adapter.base_values = fingerprints(list(adapter.layer_states.values()))
    # diffusers names the classes of blocks that must not be split.
    blocks = set(getattr(denoiser, "_no_split_modules", None) or ())
    for module in reversed(list(denoiser.modules())):  # inner blocks first
        if type(module).__name__ in blocks:
            fully_shard(module)
    if not isinstance(denoiser, FSDPModule):
        fully_shard(denoiser)


@contextmanager
def gathered(denoiser: nn.Module) -> Iterator[None]:
    """Within the context every process holds the whole base, so that one alone can generate images with it.

    To be entered by all processes, which meet again at its end. Nothing happens for a base that is not
    sharded.
    """
    modules = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        # or the first forward inside the context would shard the weights again
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def average_gradients(accelerator: Accelerator, adapter: Adapter) -> None:
    """Averages gradients over processes, as the wrapper of data-parallel training would have done."""
    for parameter in adapter.parameters():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
