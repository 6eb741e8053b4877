"""What the registry says of one metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.intervals import Estimate

Minimum = Callable[[int, Mapping[str, object]], int]  # (width of the features, options) -> images
Bias = Callable[[int, int], float]  # (generated, real images) -> sampling bias, up to a constant factor


@dataclass(frozen=True)
class Metric:
    """A metric of the registry.

    Attributes:
        key: its name on the command line.
        scores: the numbers it gives; "precision_recall" gives two.
        generated, real: roles it reads of each set (see `FeatureSet`); no `real` when it needs no reference.
        better: "lower" or "higher".
        value: the scores, in order.
        estimate: the scores with intervals, in order.
        minimum: images needed in the generated set.
        minimum_real: the same for the reference; None: as many as generated ones.
        options: what it can be given, with defaults; part of a score's identity. `metric_options.RULES` has
            their types and ranges.
        extractor: kind of extractor its own name belongs to.
        equal_n: whether its value moves with the numbers of images, so that both sets are cut to one size.
        floor: what real images get, of real images alone. "halves": between two parts of the reference;
            "sizes": the same where the parts can have the sizes of the score, else none; "self": of as many
            images of the reference as were generated; "self_any": the same or fewer; a function of the
            reference; "": none. A metric whose mean moves with the numbers of images must not take parts of
            other sizes, unless `bias` corrects for it.
        bias: how the sampling bias goes with the sizes: a floor of two parts is multiplied by bias(sizes of
            the score) / bias(sizes of the parts).
        train: roles it reads of the generator's training images.
        per_image: of a metric that is a mean over generated images, the figure of each, (M,).
        is_extra: only computed when named: it needs a layer of its own, or much time.
        version: changed whenever the same features would give another value.
    """

    key: str
    scores: tuple[str, ...]
    generated: tuple[str, ...]
    real: tuple[str, ...]
    better: str
    value: Callable[[MetricCall], tuple[float, ...]]
    estimate: Callable[[MetricCall], tuple[Estimate, ...]]
    minimum: Minimum
    minimum_real: Minimum | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    extractor: str = "inception"
    equal_n: bool = False
    floor: str | Callable[[FeatureSet], tuple[float, ...]] = "halves"
    bias: Bias | None = None
    train: tuple[str, ...] = ()
    per_image: Callable[[MetricCall], Tensor] | None = None
    is_extra: bool = False
    version: str = "1"
