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
    "clip_t": ("clip_t", "clip", None, "text_similarity"),
    "clip_i": ("clip_i", "clip", None, "image_similarity"),
    "dino": ("dino", "dino", None, "image_similarity"),
}


def score_name(score: str, extractor: str, layer: str | None = None) -> str:
    """The name under which a score is reported.

    "fid" needs Inception's pool; with `embedded:clip` it is "frechet_distance[embedded:clip]". Scores that
    exist for many extractors always carry theirs: "precision[inception]",
    "clip_i[clip:openai/clip-vit-base-patch32]".

    Args:
        score: one of a metric's `scores`.
        extractor: its name, such as "inception", "clip:<name>", "embedded:clip".
        layer: of the extractor; None means the one the metric's own definition takes.
    """
    own, kind, own_layer, other = _NAMES.get(score, (score, "", None, score))
    is_own_layer = layer in (None, own_layer) or own_layer is None
    if extractor == kind == INCEPTION and is_own_layer:
        return own
    where = extractor if is_own_layer or layer is None else f"{extractor}:{layer}"
    is_own = kind != INCEPTION and extractor.split(":")[0] == kind and is_own_layer
    return f"{own if is_own else other}[{where}]"
