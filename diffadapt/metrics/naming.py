"""Names of scores: the published name only where a score was computed as the publication says."""

from __future__ import annotations

INCEPTION = "inception"

# score -> (published name, kind of extractor and layer it belongs to, name with any other)
_NAMES: dict[str, tuple[str, str, str | None, str]] = {
    "fid": ("fid", INCEPTION, "pool", "frechet_distance"),
    "fid_infinity": ("fid_infinity", INCEPTION, "pool", "frechet_distance_infinity"),
    "kid": ("kid", INCEPTION, "pool", "kernel_distance"),
    "kid_subsets": ("kid_subsets", INCEPTION, "pool", "kernel_distance_subsets"),
    "inception_score": ("inception_score", INCEPTION, "logits_unbiased", "classifier_score"),
    "is_gap": ("is_gap", INCEPTION, "logits_unbiased", "classifier_score_gap"),
    "cmmd": ("cmmd", "clip", None, "gaussian_discrepancy"),
    "clip_fid": ("clip_fid", "clip", None, "frechet_distance_unscaled"),
    "clip_t": ("clip_t", "clip", None, "text_similarity"),
    "clip_i": ("clip_i", "clip", None, "image_similarity"),
    "dino": ("dino", "dino", None, "image_similarity"),
}

_NAMES_OF_LAYERS = {  # (score, kind of extractor, layer) -> published name
    ("fid", "dinov2", "class_token"): "fd_dinov2",
    ("fid_infinity", "dinov2", "class_token"): "fd_infinity_dinov2",
}


def score_name(score: str, extractor: str, layer: str | None = None) -> str:
    """The name under which a score is reported.

    "fid" needs Inception's pool; with `embedded:clip` it is "frechet_distance[embedded:clip]". Scores that
    exist for many extractors always carry theirs: "precision[inception]",
    "clip_i[clip:openai/clip-vit-base-patch32]". With DINOv2's class token "fid" is
    "fd_dinov2[dinov2:facebook/dinov2-large]" (arXiv 2306.04675).

    Args:
        score: one of a metric's `scores`.
        extractor: name of the extractor, such as "inception", "clip:<name>", "embedded:clip".
        layer: of the extractor; None means the one of the metric's definition.
    """
    head = extractor.split(":")[0]
    if (score, head, layer) in _NAMES_OF_LAYERS:
        return f"{_NAMES_OF_LAYERS[score, head, layer]}[{extractor}]"
    published_name, kind, published_layer, other_name = _NAMES.get(score, (score, "", None, score))
    is_published_layer = layer in (None, published_layer)
    if extractor == kind == INCEPTION and is_published_layer:
        return published_name
    if not is_published_layer:
        return f"{other_name}[{extractor}:{layer}]"
    if kind != INCEPTION and head == kind:
        return f"{published_name}[{extractor}]"
    return f"{other_name}[{extractor}]"
