"""A tiny U-Net, inputs for it, and comparing what another tool's file does here and there."""

import torch
from diffusers import UNet2DConditionModel
from pipelines import tiny_unet

TOLERANCE = 1e-5


def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return tiny_unet().eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }


@torch.no_grad()
def output(model: UNet2DConditionModel) -> torch.Tensor:
    return model(**inputs()).sample


def shake(tensors, size: float = 0.05, seed: int = 1) -> None:
    """Move trained tensors away from their start, so that every factor matters."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.data.add_(size * torch.randn(tensor.shape, generator=generator))


def error(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> float:
    """The largest difference relative to the largest effect, which must be visible."""
    effect = (theirs - base).abs().max()
    assert effect > 1e-3
    return ((ours - theirs).abs().max() / max(effect, 1)).item()
