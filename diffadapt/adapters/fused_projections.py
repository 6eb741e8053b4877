"""diffusers' fused projections of attention, which bypass the layers that an adapter changes."""

from __future__ import annotations

from torch import nn

from diffadapt.adapters.layers import Adapted

_FUSE_METHOD = "fuse_qkv_projections"
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class FusionGuard:
    """Makes a model refuse to fuse its projections until `remove` is called and no adapter is left."""

    def __init__(self, root: nn.Module):
        self.root = root
        if hasattr(type(root), _FUSE_METHOD):
            # in the instance, where it hides the method of the class and can be taken away again
            root.__dict__[_FUSE_METHOD] = _refuse

    def remove(self) -> None:
        if not any(isinstance(layer, Adapted) for layer in self.root.modules()):
            self.root.__dict__.pop(_FUSE_METHOD, None)


def check_not_fused(model: nn.Module, name: str) -> None:
    """Checks that a layer is not one of attention's projections that a fused one replaces.

    Args:
        name: of the layer in the model.

    Raises:
        ValueError: it is, so it would never be called.
    """
    parent, _, leaf = name.rpartition(".")
    if leaf in _PROJECTIONS and _is_fused(model.get_submodule(parent)):
        raise ValueError(
            f"{name}: the model's projections are fused, so an adapter of this one would have no effect; "
            "call unfuse_qkv_projections() first"
        )


def _is_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    if hasattr(attention, "unfuse_projections"):  # which resets the flag; the older Attention has none
        return True
    # there the flag stays after unfusing, and the processor in use tells
    return type(attention.processor).__name__.startswith("Fused")


def _refuse() -> None:
    raise RuntimeError(
        "fuse_qkv_projections: an adapter is attached, whose changes of query, key and value the fused "
        "layers would leave out; export it with --to merged and fuse that model, or detach it first"
    )
