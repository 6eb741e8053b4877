"""Tiny models to adapt: one of every kind of layer, attention by its usual names, a stand-in pipeline."""

from types import SimpleNamespace

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        scores = (self.to_q(x) @ self.to_k(x).transpose(-1, -2)).softmax(-1)
        return self.to_out[1](self.to_out[0](scores @ self.to_v(x)))


class Denoiser(nn.Module):
    """Convolutions, attention, norms and a class embedding in a few lines. Input ``(batch, 4, 4, 4)``."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.GroupNorm(2, 8)
        self.ln = nn.LayerNorm(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.class_embedding = nn.Embedding(5, 8)
        self.conv_out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        hidden = self.norm(self.conv_in(x))
        rows = hidden.flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = rows + block(self.ln(rows))
        rows = rows + self.class_embedding(torch.arange(x.shape[0]) % 5)[:, None]
        hidden = rows.transpose(1, 2).reshape(hidden.shape)
        return self.conv_out(hidden + self.depthwise(hidden))


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))


class SelfAttention(nn.Module):
    """Torch's own attention, whose ``out_proj`` is never called as a module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Linear(8, 8)


def denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser()


def pipeline(seed: int = 0) -> SimpleNamespace:
    """What ``attach`` asks of a diffusers pipeline: components by name."""
    torch.manual_seed(seed)
    return SimpleNamespace(unet=Denoiser(), text_encoder=TextEncoder(), vae=nn.Conv2d(3, 3, 1))


def image(seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> list:
    """Everything attaching may touch: classes, instance attributes, flags and values."""
    return [
        (name, type(module), sorted(module.__dict__), len(module._forward_pre_hooks), sorted(module._buffers))
        for name, module in model.named_modules()
    ] + [(name, p.requires_grad, p._version, p.sum().item()) for name, p in model.named_parameters()]
