"""Protocols of papers: extractor, resize, neighbours and numbers of images as their authors used them.

piq           SuperLoRA's metrics as PIQ 0.8 computes them: IS gap, FID, KID, MSID, precision and recall with
              k = 5, on Inception after torch's plain bilinear resize. PIQ's own slips (softmax over pooled
              features, real radii in recall's near-tie rule) are not repeated.
adm           guided-diffusion's evaluator (arXiv 2105.05233): Inception, k = 3, 50,000 samples against a
              reference batch (of 10,000 in the published files); FID and sFID of the statistics in that file
dgm           dgm-eval (arXiv 2306.04675): DINOv2 ViT-L/14, its unscaled class token, images squeezed to 224
              pixels as Pillow does, k = 5; Frechet distance (FD-DINOv2), kernel distance, P, R, D, C, Vendi
cmmd          CMMD (arXiv 2401.09603): CLIP ViT-L/14 at 336 pixels, 30,000 images of COCO
clip-fid      clean-fid's CLIP-FID (arXiv 2203.06026): CLIP ViT-B/32, its unscaled embedding
kynkaanniemi  improved precision and recall (arXiv 1904.06991): VGG16, k = 3, 50,000 against 50,000
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffadapt.common.messages import did_you_mean


@dataclass(frozen=True)
class Protocol:
    """The settings of `--protocol`; options on the command line take precedence.

    Attributes:
        extractor: name of the extractor.
        preset: of the resize.
        metrics: keys of the registry.
        n_generated: generated images behind the published numbers.
        n_real: real images behind the published numbers.
        options: metric -> its options.
    """

    extractor: str
    preset: str
    metrics: tuple[str, ...]
    n_generated: int
    n_real: int
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


PROTOCOLS = {
    "piq": Protocol(
        extractor="inception",
        preset="bilinear",
        metrics=("is_gap", "fid", "kid", "msid", "precision_recall"),  # those of SuperLoRA's tables
        n_generated=50_000,
        n_real=50_000,
        options={"precision_recall": {"k": 5}, "msid": {"k": 5}},
    ),
    "adm": Protocol(
        extractor="inception",
        preset="tf1",
        metrics=("inception_score", "fid", "sfid", "precision_recall"),
        n_generated=50_000,
        n_real=10_000,  # images in a reference batch; its statistics are of the whole training set
        options={"precision_recall": {"k": 3}},
    ),
    "dgm": Protocol(
        extractor="dinov2:facebook/dinov2-large",
        preset="pil",
        metrics=("fid", "fid_infinity", "kid_subsets", "precision_recall", "density_coverage", "vendi"),
        n_generated=50_000,
        n_real=50_000,
        options={"precision_recall": {"k": 5}, "density_coverage": {"k": 5}},
    ),
    "cmmd": Protocol(
        extractor="clip:openai/clip-vit-large-patch14-336",
        preset="crop-336",  # the side of this CLIP, whose positions are not interpolated
        metrics=("cmmd",),
        n_generated=30_000,
        n_real=30_000,
    ),
    "clip-fid": Protocol(
        extractor="clip:openai/clip-vit-base-patch32",
        preset="crop-224",
        metrics=("clip_fid",),
        n_generated=50_000,
        n_real=50_000,
    ),
    "kynkaanniemi": Protocol(
        extractor="vgg16",
        preset="tf1",
        metrics=("precision_recall",),
        n_generated=50_000,
        n_real=50_000,
        options={"precision_recall": {"k": 3}},
    ),
}


def protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def shortfall(name: str, *, n_generated: int, n_real: int) -> list[str]:
    """A warning when fewer images are scored than a protocol's published numbers are based on."""
    published = protocol(name)
    if n_generated >= published.n_generated and n_real >= published.n_real:
        return []
    return [
        f"the protocol {name} takes {published.n_generated:,} generated and {published.n_real:,} real "
        f"images; these are {n_generated:,} and {n_real:,}: not comparable with published numbers"
    ]
