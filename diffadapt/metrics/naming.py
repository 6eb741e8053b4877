"""What a score may be called: the field's name only where it was made as the field makes it."""

from __future__ import annotations

INCEPTION = "inception"

# score -> (the field's name, kind of extractor and layer it belongs to, name with any other)
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


_OF_LAYERS = {  # (score, kind of extractor, layer) -> the field's name
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
        extractor: its name, such as "inception", "clip:<name>", "embedded:clip".
        layer: of the extractor; None means the one the metric's own definition takes.
    """
    head = extractor.split(":")[0]
    if (score, head, layer) in _OF_LAYERS:
        return f"{_OF_LAYERS[score, head, layer]}[{extractor}]"
    own, kind, own_layer, other = _NAMES.get(score, (score, "", None, score))
    is_own_layer = layer in (None, own_layer)
    if extractor == kind == INCEPTION and is_own_layer:
        return own
    where = extractor if is_own_layer else f"{extractor}:{layer}"
    is_own = kind != INCEPTION and head == kind and is_own_layer
    return f"{own if is_own else other}[{where}]"
