"""The features of one set of images, and what several metrics derive from them, computed once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.frechet import Statistics
from diffadapt.metrics.kernel import discrepancy
from diffadapt.metrics.manifold import neighbour_distances

ROLES = (
    "features",
    "unit",
    "raw",
    "spatial",
    "logits",
    "texts",
    "pixels",
    "groups",
    "mirrored",
    "preference",
)
STATISTICS = {  # role of Frechet statistics -> role of the features they are of
    "statistics": "features",
    "raw_statistics": "raw",
    "spatial_statistics": "spatial",
}
NEIGHBOURS = 5  # distances kept per image: radii for every k up to this


class FeatureSet:
    """What metrics read of one set. Keep the reference's for all generated sets: what it derives is reused.

    Args:
        features: role -> tensor whose first axis is the images: "features" (N, D); "logits" (N, classes);
            "unit" (N, D), of length 1, for cosines (without it "features" serve); "raw" (N, D), not scaled to
            length 1, where "features" are; "spatial" (N, D), early features of all places in an image;
            "texts" (N, D), of the text that belongs to image i; "pixels" (N, 3, H, W), uint8 or in [0, 1];
            "groups" (N,), integers, the prompt or subject of each image; "mirrored" (N, D), features of the
            images flipped left to right; "preference" (N, 1), one number per image.
        statistics: published Frechet statistics by a role of STATISTICS; they go before those of the
        features.
    Raises: ValueError for an unknown role, no role, or roles of different numbers of images.
    """

    def __init__(self, features: Mapping[str, Tensor], *, statistics: Mapping[str, Statistics] | None = None):
        unknown = [role for role in features if role not in ROLES]
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; expected some of {', '.join(ROLES)}")
        counts = {role: len(tensor) for role, tensor in features.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"roles of different numbers of images: {counts}")
        if not counts and not statistics:
            raise ValueError("a set without features")
        self.features = dict(features)
        self._imported = dict(statistics or {})
        self._statistics: dict[str, Statistics] = {}
        self._samples: dict[tuple[int, int], FeatureSet] = {}
        self._neighbours: dict[int, Tensor] = {}
        self._discrepancy: tuple[FeatureSet, tuple[float, float]] | None = None

    @classmethod
    def of_statistics(cls, statistics: Statistics) -> FeatureSet:
        """A reference of which only the Frechet statistics are known."""
        return cls({}, statistics={"statistics": statistics})

    @property
    def n(self) -> int | None:
        """Images; None for statistics that do not say."""
        return next((len(tensor) for tensor in self.features.values()), None)

    @property
    def roles(self) -> tuple[str, ...]:
        """What the set can give; those of STATISTICS where a Frechet distance can be taken of it."""
        unit = ["unit"] if "features" in self.features and "unit" not in self.features else []
        known = [name for name, role in STATISTICS.items() if name in self._imported or role in self.features]
        return (*self.features, *unit, *known)

    def __getitem__(self, role: str) -> Tensor:
        if role == "unit" and role not in self.features:
            role = "features"
        return self.features[role]

    @property
    def statistics(self) -> Statistics:
        """Frechet statistics of "features"; their factor is kept."""
        return self.statistics_of("statistics")

    def statistics_of(self, name: str) -> Statistics:
        """Those of one of STATISTICS, imported or of the features; kept with their factor."""
        if name in self._imported:
            return self._imported[name]
        if name not in self._statistics:
            self._statistics[name] = Statistics.of(self[STATISTICS[name]])
        return self._statistics[name]

    def is_imported(self, role: str) -> bool:
        """Whether a role is statistics that somebody published: their images are not these."""
        return role in self._imported

    def count(self, role: str) -> int | None:
        """Images behind a role; None for statistics that do not say."""
        return self._imported[role].n if role in self._imported else self.n

    def neighbours(self, k: int) -> Tensor:
        """Distances to at least k nearest others, (N, >= k)."""
        depth = max(k, min(NEIGHBOURS, self.n - 1))
        if depth not in self._neighbours:
            self._neighbours[depth] = neighbour_distances(self["features"], depth)
        return self._neighbours[depth]

    def discrepancy(self, generated: FeatureSet) -> tuple[float, float]:
        """What `kernel.discrepancy` gives between the features of both; kept for the last generated set."""
        if self._discrepancy is None or self._discrepancy[0] is not generated:
            found = discrepancy(real=self["features"], generated=generated["features"])
            self._discrepancy = generated, found
        return self._discrepancy[1]

    def rows(self, rows: Tensor) -> FeatureSet:
        """The set of some of the images."""
        return FeatureSet({role: tensor[rows] for role, tensor in self.features.items()})

    def sample(self, n: int, seed: int) -> FeatureSet:
        """n images drawn without replacement; the same object for the same draw."""
        if n == self.n:
            return self
        if (n, seed) not in self._samples:
            drawn = np.sort(np.random.default_rng(seed).permutation(self.n)[:n])
            self._samples[n, seed] = self.rows(torch.from_numpy(drawn))
        return self._samples[n, seed]

    def parts(self, n: int, m: int, seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Two disjoint random samples, of n and of m images."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(self.n))
        return self.rows(order[:n]), self.rows(order[n : n + m])
