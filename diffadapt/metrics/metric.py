"""What the registry says of one metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from diffadapt.metrics.inputs import Inputs
from diffadapt.metrics.intervals import Estimate
from diffadapt.metrics.jobs import Job

Minimum = Callable[[int, Mapping[str, object]], int]  # (width of the features, options) -> images


@dataclass(frozen=True)
class Metric:
    """A metric of the registry.

    Attributes:
        key: its name on the command line.
        scores: the numbers it gives; "precision_recall" gives two.
        generated, real: roles it reads of each set (see `Inputs`); no `real` when it needs no reference.
        better: "lower" or "higher".
        value: the scores, in order.
        estimate: the scores with intervals, in order.
        minimum: images needed in the generated set.
        minimum_real: the same for the reference; None: as many as generated ones.
        options: what it can be given, with defaults; part of a score's identity.
        extractor: kind of extractor its own name belongs to.
        equal_n: whether its value moves with the numbers of images, so that both sets are cut to one size.
        floor: "halves" (the value between two halves of the reference), "self" (the value of the reference
            alone), a function of the reference, or "" for none.
        version: changed whenever the same features would give another value.
    """

    key: str
    scores: tuple[str, ...]
    generated: tuple[str, ...]
    real: tuple[str, ...]
    better: str
    value: Callable[[Job], tuple[float, ...]]
    estimate: Callable[[Job], tuple[Estimate, ...]]
    minimum: Minimum
    minimum_real: Minimum | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    extractor: str = "inception"
    equal_n: bool = False
    floor: str | Callable[[Inputs], tuple[float, ...]] = "halves"
    version: str = "1"
