"""Adapters that are not at their start, so that every term of their formula counts."""

import torch


def perturb(adapter, seed=1, size=0.1):
    """Adds normal noise of standard deviation `size` to every trained tensor. Returns the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter
