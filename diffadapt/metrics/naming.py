"""Names of scores: the published name only where a score was computed as the publication says."""

from __future__ import annotations

from typing import NamedTuple

INCEPTION = "inception"


class _Publication(NamedTuple):
    """What a score was published with, and its name with anything else.

    Attributes:
        extractor: kind of extractor; "" for scores that were published with many.
        layer: of the extractor; None where it has one for the purpose.
        other_name: what the same formula is called on other features.
    """

    extractor: str
    layer: str | None
    other_name: str


_PUBLICATIONS = {
    "fid": _Publication(INCEPTION, "pool", "frechet_distance"),
    "fid_infinity": _Publication(INCEPTION, "pool", "frechet_distance_infinity"),
    "kid": _Publication(INCEPTION, "pool", "kernel_distance"),
    "kid_subsets": _Publication(INCEPTION, "pool", "kernel_distance_subsets"),
    "inception_score": _Publication(INCEPTION, "logits_unbiased", "classifier_score"),
    "is_gap": _Publication(INCEPTION, "logits_unbiased", "classifier_score_gap"),
    "cmmd": _Publication("clip", None, "gaussian_discrepancy"),
    "clip_fid": _Publication("clip", None, "frechet_distance_unscaled"),
    "clip_t": _Publication("clip", None, "text_similarity"),
    "clip_i": _Publication("clip", None, "image_similarity"),
    "dino": _Publication("dino", None, "image_similarity"),
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
    published = _PUBLICATIONS.get(score, _Publication("", None, score))
    is_published_layer = layer in (None, published.layer)
    if extractor == published.extractor == INCEPTION and is_published_layer:
        return score  # without brackets: there is one Inception
    if not is_published_layer:
        return f"{published.other_name}[{extractor}:{layer}]"
    if published.extractor != INCEPTION and head == published.extractor:
        return f"{score}[{extractor}]"  # there are many CLIPs and DINOs
    return f"{published.other_name}[{extractor}]"
