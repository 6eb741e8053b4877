"""diffusers' fused projections of attention, which go around the layers that an adapter changes."""

from __future__ import annotations

from torch import nn

from diffadapt.adapters.layers import Adapted

_METHOD = "fuse_qkv_projections"
_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class FusingRefused:
    """Makes a model refuse to fuse its projections while adapters are attached; ``remove`` takes it back."""

    def __init__(self, root: nn.Module):
        self.root = root
        if hasattr(type(root), _METHOD):
            root.__dict__[_METHOD] = _refuse

    def remove(self) -> None:
        if not any(isinstance(layer, Adapted) for layer in self.root.modules()):
            self.root.__dict__.pop(_METHOD, None)


def check_not_fused(model: nn.Module, name: str) -> None:
    """Raises ValueError for a projection that a fused one stands in for, so that it is never called."""
    parent, _, leaf = name.rpartition(".")
    if leaf in _FUSED and _is_fused(model.get_submodule(parent)):
        raise ValueError(
            f"{name}: the model's projections are fused, so an adapter of this one would have no effect; "
            "call unfuse_qkv_projections() first"
        )


def _is_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    if hasattr(attention, "unfuse_projections"):  # which resets the flag; the older Attention has none
        return True
    return type(attention.processor).__name__.startswith("Fused")


def _refuse() -> None:
    raise RuntimeError(
        "fuse_qkv_projections: an adapter is attached, whose changes of query, key and value the fused "
        "layers would leave out; export it with --to merged and fuse that model, or detach it first"
    )
