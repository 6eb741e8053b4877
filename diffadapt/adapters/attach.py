"""Attach an adapter to a model or a pipeline, switch it off, take it away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import Architecture, architecture_of
from diffadapt.adapters.class_table import check_new_table, label_dropout_hooks
from diffadapt.adapters.fused_projections import FusingRefused
from diffadapt.adapters.layers import ADAPTED, ORIGINAL, Adapted, Entry, LayerState, layer_state_of
from diffadapt.adapters.merge import merge, unmerge
from diffadapt.adapters.method_state import MethodPlan, MethodState, plan_methods
from diffadapt.adapters.peft_bridge import attach_peft
from diffadapt.adapters.targets import TargetSite, assign_ranks, find_sites, name_matches
from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder, text_encoder_names
from diffadapt.methods import Method

Targets = str | Sequence[str]

_pipelines: WeakKeyDictionary[nn.Module, ref] = WeakKeyDictionary()  # of models seen inside one


def attach(
    model: object,
    method: Method,
    targets: Targets = "attention",
    *,
    name: str = "default",
    seed: int = 0,
    text_encoder_targets: Targets | None = None,
    rank_patterns: Mapping[str, int] | None = None,
) -> Adapter:
    """Freeze a model and let a method change some of its layers, in place. No output changes yet.

    Args:
        model: an ``nn.Module``, or a diffusers pipeline (its denoiser, and its text encoders when targeted).
        method: e.g. ``FLoRA(rank=8)`` or ``make_method("flora", rank=8)``.
        targets: presets (attention, qv, linear, conv, norm, embedding, all) or globs on module names, joined
            with ``+`` or as a sequence; ``!glob`` excludes.
        name: unique among the model's adapters.
        seed: the starting values are a function of it.
        text_encoder_targets: the same for a pipeline's text encoders; None leaves them alone.
        rank_patterns: glob on site names -> rank, where it differs from the method's.

    Returns: the adapter, an ``nn.Module`` that owns the trained tensors.
    Raises: ValueError or TypeError saying what does not fit; the model is then as before.
    """
    roots, found = choose_sites(model, method, targets, text_encoder_targets)
    ranks = assign_ranks([choice.site for choice in found], rank_patterns or {})
    return attach_sites(roots, method, found, name=name, seed=seed, ranks=ranks)


def choose_sites(
    model: object, method: Method, targets: Targets, text_encoder_targets: Targets | None = None
) -> tuple[dict[str, nn.Module], list[TargetSite]]:
    """The models by component name, and the layers that ``attach`` with these arguments would choose."""
    if not isinstance(method, Method):
        raise TypeError(f"expected a method, got {method!r}; make one with da.make_method({str(method)!r})")
    roots = components(model, text_encoder_targets is not None)
    denoisers = [module for name, module in roots.items() if not is_text_encoder(name)]
    architecture = architecture_of(denoisers[0] if denoisers else None, roots)
    sites: list[TargetSite] = []
    for component, module in roots.items():
        prefix = f"{component}." if component else ""
        if is_text_encoder(component):
            chosen = find_sites(module, text_encoder_targets, prefix, extra_presets=method.extra_targets)
            sites += _text_encoder_sites(chosen, component, architecture, text_encoder_targets)
        else:
            chosen = find_sites(
                module,
                targets,
                prefix,
                extra_presets=method.extra_targets,
                family_presets=architecture.target_presets,
            )
            unread = architecture.unread_layers.get(architecture.component, ())
            kept = _read_sites(chosen, unread)
            if chosen and not kept:
                raise ValueError(f"targets {targets!r} choose only layers that no output depends on")
            sites += kept
    return roots, sites


def _text_encoder_sites(
    chosen: Sequence[TargetSite], component: str, architecture: Architecture, targets: Targets
) -> list[TargetSite]:
    """Of a text encoder's layers those that have an effect, and that other programs know.

    Presets leave the projection of pooled text alone: many programs have no name for it.
    """
    kept = []
    for choice in _read_sites(chosen, architecture.unread_layers.get(component, ())):
        if choice.by_name or not choice.site.name.endswith("text_projection"):
            kept.append(choice)
    if not kept:
        raise ValueError(
            f"text encoder targets {targets!r} choose only layers of {component} that have no effect: its "
            "states are read before its last layer"
        )
    return kept


def _read_sites(chosen: Sequence[TargetSite], unread_layers: Sequence[str]) -> list[TargetSite]:
    """The sites whose outputs the model reads; the others would never get a gradient."""
    kept = []
    for choice in chosen:
        if not any(name_matches(pattern, choice.site.name) for pattern in unread_layers):
            kept.append(choice)
    return kept


def attach_sites(
    roots: dict[str, nn.Module],
    method: Method,
    found: Sequence[TargetSite],
    *,
    name: str,
    seed: int,
    ranks: Mapping[str, int],
    fill: Callable[[Adapter], None] | None = None,
) -> Adapter:
    """``attach`` for layers already chosen. ``fill`` gives the tensors, which arrive as zeros, their values
    instead of the method's start; when it raises, the model is as before."""
    if name in {taken for module in roots.values() for taken in attached(module)}:
        raise ValueError(f"the model already has an adapter named {name!r}; detach it or pass another name")
    adapter = Adapter(name, method, seed, ranks, roots)
    if method.library == "peft":
        attach_peft(adapter, found, fill)
    else:
        _attach_methods(adapter, found, fill)
    return adapter


def _attach_methods(
    adapter: Adapter, found: Sequence[TargetSite], fill: Callable[[Adapter], None] | None
) -> None:
    """Attaches an adapter of diffadapt's own methods."""
    method = adapter.method
    roots = adapter.roots
    plans = plan_methods(method, [choice.site for choice in found], adapter.ranks)
    _check_all_served(method, found, plans)
    for plan in plans:
        layers = [layer for index in plan.indices for layer in found[index].layers]
        for root in roots.values():
            check_new_table(plan.methods[0], layers, root, _home(root))
    layer_states = [layer_state_of(choice.layers) for choice in found]
    for plan in plans:
        bases = [layer_states[i].base() for i in plan.indices]
        adapter.add_method_state(MethodState(plan, bases, adapter.seed))
        if fill is None:
            adapter.parts[-1].start(bases)
    if fill is not None:
        fill(adapter)
    _swap(adapter, plans, found, layer_states)
    for module in roots.values():
        adapter.frozen += [p for p in module.parameters() if p.requires_grad]
        module.requires_grad_(False)


def detach(adapter: Adapter) -> None:
    """Take an adapter off its model; when it was the last, the model is the bare one again, bit for bit."""
    unmerge(adapter)
    remaining: list[Adapter] = [other for root in adapter.roots.values() for other in attached(root).values()]
    for layer_state in adapter.layer_states.values():
        owned = adapter.entries(layer_state)
        layer_state.entries = [entry for entry in layer_state.entries if entry not in owned]
        for layer in layer_state.layers if not layer_state.entries else ():
            layer.__class__ = ORIGINAL[type(layer)]
            del layer._diffadapt
    remaining = [other for other in remaining if other is not adapter]
    if remaining:
        remaining[0].frozen += adapter.frozen
    else:
        for parameter in adapter.frozen:
            parameter.requires_grad_(True)
    for hook in adapter.hooks:
        hook.remove()
    adapter.layer_states, adapter.frozen, adapter.hooks = {}, [], []


def attached(model: object) -> dict[str, Adapter]:
    """The adapters of a model or pipeline by name, in the order they were attached."""
    return {
        entry.owner.adapter.name: entry.owner.adapter
        for module in components(model, True).values()
        for layer in module.modules()
        if isinstance(layer, Adapted)
        for entry in layer._diffadapt.entries
    }


@contextmanager
def disabled(model: object) -> Iterator[None]:
    """Within the context the model (or pipeline) is the bare one, whatever is attached or merged."""
    adapters = list(attached(model).values())
    before = [(adapter, adapter.strength, adapter.merged) for adapter in adapters]
    for adapter, _, was_merged in before:
        if was_merged:
            unmerge(adapter)
        adapter.strength = 0.0
    try:
        yield
    finally:
        for adapter, strength, was_merged in before:
            adapter.strength = strength
            if was_merged:
                merge(adapter)


def components(model: object, with_text_encoders: bool = False) -> dict[str, nn.Module]:
    """The models that can be adapted, by component name: a bare module is ``""``."""
    if isinstance(model, nn.Module):
        return {"": model}
    names = list(DENOISERS)
    if with_text_encoders:
        names += text_encoder_names(model)
    found = {key: getattr(model, key) for key in names if isinstance(getattr(model, key, None), nn.Module)}
    if not found:
        raise TypeError(
            f"expected an nn.Module or a pipeline with a unet or transformer, got {type(model).__name__}"
        )
    if hasattr(model, "__weakref__"):
        _pipelines.update(dict.fromkeys(found.values(), ref(model)))
    return found


def pipeline_of(adapter: Adapter) -> object | None:
    """The pipeline an adapter was attached to or loaded into, while it lives; None for a bare model."""
    homes = (_home(root) for component, root in adapter.roots.items() if component)
    return next((home for home in homes if home is not None), None)


def _home(root: nn.Module) -> object | None:
    """The pipeline a model was last seen in, while it lives."""
    home = _pipelines.get(root)
    return None if home is None else home()


def _check_all_served(method: Method, found: Sequence[TargetSite], plans: Sequence[MethodPlan]) -> None:
    served = {index for plan in plans for index in plan.indices}
    for index, choice in enumerate(found):
        if choice.by_name and index not in served:
            site = choice.site
            raise ValueError(f"{method} cannot change {site.name}, a layer of kind {site.kind}; exclude it")


def _swap(
    adapter: Adapter,
    plans: Sequence[MethodPlan],
    found: Sequence[TargetSite],
    layer_states: Sequence[LayerState],
) -> None:
    entries: list[list[Entry]] = [[] for _ in found]
    for plan, part in zip(plans, adapter.parts, strict=True):
        for index, i in enumerate(plan.indices):
            entries[i].append(Entry(part, index))
    for choice, layer_state, added in zip(found, layer_states, entries, strict=True):
        if not added:
            continue
        for layer in layer_state.layers:
            layer.__class__ = ADAPTED.get(type(layer), type(layer))
            layer._diffadapt = layer_state
        layer_state.entries += added
        adapter.layer_states[choice.site.name] = layer_state
    adapter.hooks += [FusingRefused(root) for root in adapter.roots.values()]
    for part in adapter.parts:
        for root in adapter.roots.values():
            adapter.hooks += label_dropout_hooks(part.methods[0], root)
        if part.grouped:
            for root in adapter.roots.values():
                adapter.hooks.append(root.register_forward_pre_hook(part.grouped_changes.before_forward))
                adapter.hooks.append(
                    root.register_forward_hook(part.grouped_changes.after_forward, always_call=True)
                )
    adapter.sites = tuple(choice.site for choice in found if choice.site.name in adapter.layer_states)
