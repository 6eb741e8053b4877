"""The entry of one metric in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.intervals import Estimate

Minimum = Callable[[int, Mapping[str, object]], int]  # (width of the features, options) -> images
Required = Callable[[Mapping[str, object]], int]  # options -> images
Bias = Callable[[int, int], float]  # (generated, real images) -> sampling bias, up to a constant factor


def _required_for_spread(options: Mapping[str, object]) -> int:
    """Two images: one has neither a covariance nor a pair."""
    return 2


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: what it needs, how it is computed, and how its number is to be read.

    Attributes:
        key: name on the command line.
        scores: names of the numbers it computes; "precision_recall" has two.
        generated: roles it reads of the generated set (see `FeatureSet`).
        real: roles it reads of the reference; empty when it needs none.
        train: roles it reads of the generator's training images.
        extractor: kind of extractor that its published name belongs to.
        better: "lower" or "higher".
        estimate: computes the scores with their intervals.
        value: computes the scores alone; None where the interval costs nothing more.
        per_image: of a metric that is a mean over generated images, the value of each, (M,).
        interval: how the 95 % interval is found.
        source: authors, year and arXiv number; "" where docs/metrics.md defines the metric.
        minimum: images needed in the generated set for a value that can be compared with others.
        minimum_real: images needed in the reference; None: as many as in the generated set.
        required: images of each set without which there is no value at all.
        options: names and defaults of its options, part of a score's identity. `metric_options.RULES` has
            their types and ranges.
        equal_n: whether the value depends on the numbers of images, so that both sets are cut to one size.
        per_subject: whether sets that know their subjects are averaged over prompts, then over subjects
            (DreamBooth's protocol), which fixes the numbers of images itself.
        floor: what real images get, of real images alone. "halves": between two disjoint parts of the
            reference; "sizes": the same where the parts can have the sizes of the score, else none;
            "self": of as many images of the reference as were generated; "self_any": the same or fewer;
            a function of the reference, which may return None; "": none. A metric whose mean depends on
            the numbers of images must not use parts of other sizes, unless `bias` corrects for it.
        bias: how the sampling bias depends on the sizes: a floor of two parts is multiplied by
            bias(sizes of the score) / bias(sizes of the parts).
        is_extra: computed only when asked for by name: it needs a layer of its own, or much time.
        version: changed whenever the same features would give another value.
    """

    key: str
    scores: tuple[str, ...]
    generated: tuple[str, ...]
    real: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    extractor: str = "inception"
    better: str
    estimate: Callable[[MetricCall], Estimate | tuple[Estimate, ...]]
    value: Callable[[MetricCall], float] | None = None
    per_image: Callable[[MetricCall], Tensor] | None = None
    interval: str
    source: str = ""
    minimum: Minimum
    minimum_real: Minimum | None = None
    required: Required = _required_for_spread
    options: Mapping[str, object] = field(default_factory=dict)
    equal_n: bool = False
    per_subject: bool = False
    floor: str | Callable[[FeatureSet], float | None] = "halves"
    bias: Bias | None = None
    is_extra: bool = False
    version: str = "1"

    def estimates(self, call: MetricCall) -> tuple[Estimate, ...]:
        """One value with its interval for each of `scores`."""
        estimates = self.estimate(call)
        return estimates if isinstance(estimates, tuple) else (estimates,)

    def values(self, call: MetricCall) -> tuple[float, ...]:
        """One value for each of `scores`, without intervals."""
        if self.value is not None:
            return (self.value(call),)
        return tuple(estimate.value for estimate in self.estimates(call))
