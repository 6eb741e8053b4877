"""Attach an adapter to a model or a pipeline, switch it off, take it away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import architecture_of
from diffadapt.adapters.class_table import check_new_table, label_dropout_hooks
from diffadapt.adapters.fused_projections import FusionGuard
from diffadapt.adapters.layers import (
    Adapted,
    Entry,
    LayerState,
    adapted_class,
    layer_state_of,
    original_class,
)
from diffadapt.adapters.merge import merge, unmerge
from diffadapt.adapters.method_state import MethodPlan, MethodState, plan_methods
from diffadapt.adapters.peft_bridge import attach_peft
from diffadapt.adapters.targets import TargetSite, assign_ranks, find_sites, is_unread
from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder, text_encoder_names
from diffadapt.methods import Method

Targets = str | Sequence[str]

# classes of text encoders begin with these names: T5 and language models
_REFUSED_TEXT_ENCODERS = ("T5", "UMT5", "MT5", "Qwen", "Llama", "Mistral", "Gemma", "Phi", "ChatGLM", "Glm")

# Model -> the pipeline it is part of. Weak on both sides, so that an entry keeps neither of them in memory.
_pipelines: WeakKeyDictionary[nn.Module, ref] = WeakKeyDictionary()


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
    """Freezes a model and lets a method change some of its layers, in place. No output changes yet.

    Args:
        model: an `nn.Module`, or a diffusers pipeline (its denoiser, and its text encoders when targeted).
        method: e.g. `FLoRA(rank=8)` or `make_method("flora", rank=8)`.
        targets: presets (attention, qv, mlp, linear, conv, norm, embedding, all) or globs on module names,
            joined with `+` or as a sequence; `!glob` excludes, `attention@blocks.{4-11}` is a preset in some
            blocks. Layers that no output depends on are left out and named in `Adapter.unread_layers`.
        name: unique among the model's adapters.
        seed: the initial values are a function of it.
        text_encoder_targets: the same for a pipeline's text encoders; None leaves them alone. T5 and language
            models are never adapted.
        rank_patterns: glob on site names -> rank, where it differs from the method's.

    Returns:
        The adapter, an `nn.Module` that owns the trained tensors.

    Raises:
        ValueError: something does not fit; the model is then as before.
        TypeError: `model` or `method` is of another type.
    """
    roots, target_sites, unread_layers = _choose_sites(model, method, targets, text_encoder_targets)
    ranks = assign_ranks([target.site for target in target_sites], rank_patterns or {})
    adapter = attach_sites(roots, method, target_sites, name=name, seed=seed, ranks=ranks)
    adapter.unread_layers = unread_layers
    return adapter


def choose_sites(
    model: object, method: Method, targets: Targets, text_encoder_targets: Targets | None = None
) -> tuple[dict[str, nn.Module], list[TargetSite]]:
    """The models by component name, and the layers that `attach` chooses for these arguments."""
    roots, target_sites, _ = _choose_sites(model, method, targets, text_encoder_targets)
    return roots, target_sites


def _choose_sites(
    model: object, method: Method, targets: Targets, text_encoder_targets: Targets | None
) -> tuple[dict[str, nn.Module], list[TargetSite], tuple[str, ...]]:
    """The models by component name, the chosen layers, and the names of chosen layers that nothing reads."""
    if not isinstance(method, Method):
        raise TypeError(f"expected a method, got {method!r}; make one with da.make_method({str(method)!r})")
    roots = adaptable_components(model, text_encoder_targets is not None)
    denoisers = [module for name, module in roots.items() if not is_text_encoder(name)]
    architecture = architecture_of(denoisers[0] if denoisers else None, roots)
    target_sites: list[TargetSite] = []
    unread_names: list[str] = []
    for component, module in roots.items():
        prefix = f"{component}." if component else ""
        if is_text_encoder(component):
            unread_layers = architecture.unread_layers.get(component, ())
            matches = find_sites(module, text_encoder_targets, prefix, extra_presets=method.extra_targets)
        else:
            unread_layers = architecture.unread_layers.get(architecture.component, ())
            matches = find_sites(
                module,
                targets,
                prefix,
                extra_presets=method.extra_targets,
                family_presets=architecture.target_presets,
                unread_layers=unread_layers,
            )
        sites_with_effect = []
        for match in matches:
            if is_unread(match.site.name, unread_layers):
                unread_names.append(match.site.name)
            else:
                sites_with_effect.append(match)
        if is_text_encoder(component):
            sites_with_effect = _text_encoder_sites(sites_with_effect, component, text_encoder_targets)
        target_sites += sites_with_effect
    return roots, target_sites, tuple(unread_names)


def _text_encoder_sites(matches: Sequence[TargetSite], component: str, targets: Targets) -> list[TargetSite]:
    """Of a text encoder's layers those that other programs know.

    Presets leave the projection of pooled text alone: many programs have no name for it.
    """
    sites = []
    for match in matches:
        if match.by_name or not match.site.name.endswith("text_projection"):
            sites.append(match)
    if not sites:
        raise ValueError(
            f"text encoder targets {targets!r} choose only layers of {component} that have no effect: its "
            "states are read before its last layer"
        )
    return sites


def adaptable_components(model: object, with_text_encoders: bool) -> dict[str, nn.Module]:
    """`components` without the text encoders that cannot be adapted: T5 and language models.

    Raises:
        ValueError: text encoders are asked for, and the pipeline has none that can be adapted.
    """
    modules = {}
    refused = []
    for name, module in components(model, with_text_encoders).items():
        if is_text_encoder(name) and type(module).__name__.startswith(_REFUSED_TEXT_ENCODERS):
            refused.append(f"{name} ({type(module).__name__})")
        else:
            modules[name] = module
    if refused and not any(is_text_encoder(name) for name in modules):
        raise ValueError(
            f"{type(model).__name__} has no text encoder that can be adapted, but {', '.join(refused)}: only "
            "those of CLIP can be, since no other program loads adapters of a T5 or a language model"
        )
    return modules


def attach_sites(
    roots: dict[str, nn.Module],
    method: Method,
    target_sites: Sequence[TargetSite],
    *,
    name: str,
    seed: int,
    ranks: Mapping[str, int],
    fill: Callable[[Adapter], None] | None = None,
) -> Adapter:
    """`attach` for layers that are already chosen.

    Args:
        roots: the models by component name.
        ranks: site name -> rank, where it differs from the method's.
        fill: gives the tensors, which arrive as zeros, their values instead of the method's initial ones; if
            it raises, the model is as before.
    """
    for module in roots.values():
        if name in attached(module):
            raise ValueError(
                f"the model already has an adapter named {name!r}; detach it or pass another name"
            )
    adapter = Adapter(name, method, seed, ranks, roots)
    if method.library == "peft":
        attach_peft(adapter, target_sites, fill)
    else:
        _attach_methods(adapter, target_sites, fill)
    return adapter


def _attach_methods(
    adapter: Adapter, target_sites: Sequence[TargetSite], fill: Callable[[Adapter], None] | None
) -> None:
    """Attaches an adapter of diffadapt's own methods."""
    sites = [target.site for target in target_sites]
    plans = plan_methods(adapter.method, sites, adapter.ranks)
    _check_all_supported(adapter.method, target_sites, plans)
    _check_quantised(plans, target_sites)
    for plan in plans:
        layers = []
        for index in plan.indices:
            layers += target_sites[index].layers
        for root in adapter.roots.values():
            check_new_table(plan.methods[0], layers, root, _pipeline_with(root))
    layer_states = [layer_state_of(target.layers) for target in target_sites]
    for plan in plans:
        bases = [layer_states[index].base() for index in plan.indices]
        method_state = MethodState(plan, bases, adapter.seed)
        adapter.add_method_state(method_state)
        if fill is None:
            method_state.start(bases)
    if fill is not None:  # once for the whole adapter, since a file holds all of its methods
        fill(adapter)
    # nothing of the model was changed up to here, so an error left it as it was
    _adapt_layers(adapter, plans, target_sites, layer_states)
    _add_hooks(adapter)
    for module in adapter.roots.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                adapter.frozen.append(parameter)
        module.requires_grad_(False)


def _check_all_supported(
    method: Method, target_sites: Sequence[TargetSite], plans: Sequence[MethodPlan]
) -> None:
    """Raises ValueError for a layer that was named on purpose and that no method can change."""
    planned = set()
    for plan in plans:
        planned.update(plan.indices)
    for index, target in enumerate(target_sites):
        if target.by_name and index not in planned:
            site = target.site
            raise ValueError(f"{method} cannot change {site.name}, a layer of kind {site.kind}; exclude it")


def _check_quantised(plans: Sequence[MethodPlan], target_sites: Sequence[TargetSite]) -> None:
    """Raises ValueError for a quantised layer under a method that trains its whole weight."""
    for plan in plans:
        if not plan.methods[0].trains_whole_weights:
            continue
        for index in plan.indices:
            target = target_sites[index]
            quantised = layer_state_of(target.layers).quantised
            if quantised is not None:
                raise ValueError(
                    f"{plan.methods[0].name} trains the whole weight of {target.site.name}, which is "
                    f"quantised ({quantised.kind.name}) to be small; load the base in bfloat16, or use "
                    "another method"
                )


def _adapt_layers(
    adapter: Adapter,
    plans: Sequence[MethodPlan],
    target_sites: Sequence[TargetSite],
    layer_states: Sequence[LayerState],
) -> None:
    """Gives the layers their adapted class, and their states the entries of the adapter."""
    entries: list[list[Entry]] = [[] for _ in target_sites]
    for plan, part in zip(plans, adapter.parts, strict=True):
        # `index` counts the sites of the adapter, `number` those that this method changes
        for number, index in enumerate(plan.indices):
            entries[index].append(Entry(part, number))
    changed_sites = []
    for target, layer_state, new_entries in zip(target_sites, layer_states, entries, strict=True):
        if not new_entries:  # a preset chose a layer of a kind that no method changes
            continue
        for layer in layer_state.layers:
            layer.__class__ = adapted_class(layer)
            layer._diffadapt = layer_state
        layer_state.entries += new_entries
        adapter.layer_states[target.site.name] = layer_state
        changed_sites.append(target.site)
    adapter.sites = tuple(changed_sites)


def _add_hooks(adapter: Adapter) -> None:
    """Registers what the adapter does beside its layers' forwards; `detach` removes it."""
    for root in adapter.roots.values():
        adapter.hooks.append(FusionGuard(root))
    for part in adapter.parts:
        for root in adapter.roots.values():
            adapter.hooks += label_dropout_hooks(part.methods[0], root)
        changes = part.grouped_changes
        if changes is None:
            continue
        for root in adapter.roots.values():
            adapter.hooks.append(root.register_forward_pre_hook(changes.before_forward))
            adapter.hooks.append(root.register_forward_hook(changes.after_forward, always_call=True))


def detach(adapter: Adapter) -> None:
    """Takes an adapter off its model; after the last one the model is the bare one again, bit for bit."""
    unmerge(adapter)
    other_adapters: list[Adapter] = []
    for root in adapter.roots.values():
        for other in attached(root).values():
            if other is not adapter:
                other_adapters.append(other)
    for layer_state in adapter.layer_states.values():
        removed = adapter.entries(layer_state)
        layer_state.entries = [entry for entry in layer_state.entries if entry not in removed]
        if not layer_state.entries:
            for layer in layer_state.layers:
                layer.__class__ = original_class(layer)
                del layer._diffadapt
    # the remaining adapters need the parameters frozen; the last one to go thaws them
    if other_adapters:
        other_adapters[0].frozen += adapter.frozen
    else:
        for parameter in adapter.frozen:
            parameter.requires_grad_(True)
    for hook in adapter.hooks:
        hook.remove()
    adapter.layer_states = {}
    adapter.frozen = []
    adapter.hooks = []


def attached(model: object) -> dict[str, Adapter]:
    """The adapters of a model or pipeline by name, in the order they were attached."""
    adapters = {}
    for module in components(model, True).values():
        for layer in module.modules():
            if not isinstance(layer, Adapted):
                continue
            for entry in layer._diffadapt.entries:
                adapters[entry.owner.adapter.name] = entry.owner.adapter
    return adapters


@contextmanager
def disabled(model: object) -> Iterator[None]:
    """Within the context the model (or pipeline) is the bare one, whatever is attached or merged."""
    adapters = list(attached(model).values())
    before = []
    for adapter in adapters:
        before.append((adapter, adapter.strength, adapter.merged))
        if adapter.merged:
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
    """The models that can be adapted, by component name; a bare module has the name `""`.

    Raises:
        TypeError: `model` is neither a module nor a pipeline with a denoiser.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    names = list(DENOISERS)
    if with_text_encoders:
        names += text_encoder_names(model)
    modules = {}
    for name in names:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            modules[name] = module
    if not modules:
        raise TypeError(
            f"expected an nn.Module or a pipeline with a unet or transformer, got {type(model).__name__}"
        )
    if hasattr(model, "__weakref__"):  # not of an object with __slots__, which cannot be referred to weakly
        for module in modules.values():
            _pipelines[module] = ref(model)
    return modules


def pipeline_of(adapter: Adapter) -> object | None:
    """The pipeline an adapter was attached to or loaded into, while it lives; None for a bare model."""
    for component, root in adapter.roots.items():
        pipeline = _pipeline_with(root) if component else None
        if pipeline is not None:
            return pipeline
    return None


def _pipeline_with(root: nn.Module) -> object | None:
    """The pipeline that a model was last seen in, while it lives."""
    reference = _pipelines.get(root)
    return None if reference is None else reference()
