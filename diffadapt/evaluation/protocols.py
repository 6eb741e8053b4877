"""Ways of scoring that papers share: extractor, resize, neighbours and numbers of images as those did.

piq           SuperLoRA's metrics as PIQ 0.8 has them: IS gap, FID, KID, MSID, precision and recall with
              k = 5, on Inception after torch's plain bilinear resize. PIQ's own slips (softmax over pooled
              features, real radii in recall's near-tie rule) are not repeated.
adm           guided-diffusion's evaluator (arXiv 2105.05233): Inception, k = 3, 50,000 samples against a
              reference batch (of 10,000 in the published files); FID and sFID of the statistics in that file
dgm           dgm-eval (arXiv 2306.04675): DINOv2 ViT-L/14, its class token as it is, images squeezed to 224
              pixels as Pillow does, k = 5; Frechet distance (FD-DINOv2), kernel distance, P, R, D, C, Vendi
cmmd          CMMD (arXiv 2401.09603): CLIP ViT-L/14 at 336 pixels, 30,000 images of COCO
clip-fid      clean-fid's CLIP-FID (arXiv 2203.06026): CLIP ViT-B/32, its embedding as it is
kynkaanniemi  improved precision and recall (arXiv 1904.06991): VGG16, k = 3, 50,000 against 50,000
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffadapt.common.messages import did_you_mean


@dataclass(frozen=True)
class Protocol:
    """What `--protocol` sets. Options given on the command line go before it."""

    extractor: str
    preset: str
    metrics: tuple[str, ...]
    n_generated: int  # images the protocol's numbers were made with
    n_real: int
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # metric -> its options


PROTOCOLS = {
    "piq": Protocol(
        "inception",
        "bilinear",
        ("is_gap", "fid", "kid", "msid", "precision_recall"),
        50_000,
        50_000,
        {"precision_recall": {"k": 5}, "msid": {"k": 5}},
    ),
    "adm": Protocol(
        "inception",
        "tf1",
        ("inception_score", "fid", "sfid", "precision_recall"),
        50_000,
        10_000,
        {"precision_recall": {"k": 3}},
    ),
    "dgm": Protocol(
        "dinov2:facebook/dinov2-large",
        "pil",
        ("fid", "fid_infinity", "kid_subsets", "precision_recall", "density_coverage", "vendi"),
        50_000,
        50_000,
        {"precision_recall": {"k": 5}, "density_coverage": {"k": 5}},
    ),
    "cmmd": Protocol("clip:openai/clip-vit-large-patch14-336", "crop-336", ("cmmd",), 30_000, 30_000),
    "clip-fid": Protocol("clip:openai/clip-vit-base-patch32", "crop-224", ("clip_fid",), 50_000, 50_000),
    "kynkaanniemi": Protocol(
        "vgg16", "tf1", ("precision_recall",), 50_000, 50_000, {"precision_recall": {"k": 3}}
    ),
}


def protocol(name: str) -> Protocol:
    """Raises: ValueError for an unknown name."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def shortfall(chosen: Protocol, name: str, *, n_generated: int, n_real: int) -> list[str]:
    """A warning when fewer images are scored than the protocol's published numbers rest on."""
    if n_generated >= chosen.n_generated and n_real >= chosen.n_real:
        return []
    return [
        f"the protocol {name} takes {chosen.n_generated:,} generated and {chosen.n_real:,} real images; "
        f"these are {n_generated:,} and {n_real:,}: not comparable with published numbers"
    ]
