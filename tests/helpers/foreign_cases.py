"""A tiny U-Net, inputs for it, and comparing what another tool's file does here and there."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from helpers.pipelines import tiny_unet

import diffadapt as da

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


def check_every_format(path, make: Callable[[], UNet2DConditionModel], folder) -> None:
    """What is opened from ``path`` can be written for every program, and does the same there."""
    model = make()
    adapter = da.load(model, path)
    live = output(model)
    for to, options in {"kohya": {"dense": True}, "diffusers": {"rank": 1000}}.items():
        da.export(adapter, folder / f"{to}.safetensors", to=to, **options)
        again = make()
        da.load(again, folder / f"{to}.safetensors")
        assert torch.allclose(output(again), live, atol=1e-4), to
    da.export(adapter, folder / "merged", to="merged")
    merged = UNet2DConditionModel.from_pretrained(folder / "merged").eval()
    assert torch.allclose(output(merged), live, atol=1e-4)
