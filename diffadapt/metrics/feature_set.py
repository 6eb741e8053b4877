"""The features of one image set, and what several metrics derive from them, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    "subjects",
    "mirrored",
    "preference",
)
STATISTICS = {  # role of Frechet statistics -> role of the features they are computed from
    "statistics": "features",
    "raw_statistics": "raw",
    "spatial_statistics": "spatial",
}
NEIGHBOURS = 5  # distances kept per image: radii for every k up to this


class FeatureSet:
    """What metrics read of one image set.

    Use one object for a reference that several sets are compared with: what it derives is computed once.

    Args:
        features: tensors by role; their first axis is the images:
            "features" (N, D), for distances and neighbours;
            "unit" (N, D), of length 1, for cosines; "features" where it is missing;
            "raw" (N, D), not scaled to length 1, where "features" are;
            "spatial" (N, D), early features of all places in an image;
            "logits" (N, classes);
            "texts" (N, D), the embedding of each image's text;
            "pixels" (N, 3, H, W), uint8 or in [0, 1];
            "groups" (N,), integers, the prompt of each image;
            "subjects" (N,), integers, the subject of each image, an index into `subject_names`;
            "mirrored" (N, D), features of the images flipped left to right;
            "preference" (N, 1), one number per image.
        statistics: published Frechet statistics by a role of STATISTICS, used in place of the features'.
        subject_names: of role "subjects", for messages.

    Raises:
        ValueError: a role is unknown, there is none, or roles have different numbers of images.
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        *,
        statistics: Mapping[str, Statistics] | None = None,
        subject_names: Sequence[str] = (),
    ):
        unknown = [role for role in features if role not in ROLES]
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; expected some of {', '.join(ROLES)}")
        counts = {role: len(tensor) for role, tensor in features.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"roles of different numbers of images: {counts}")
        if not counts and not statistics:
            raise ValueError("a set without features")
        self.features = dict(features)
        self.subject_names = tuple(subject_names)
        self._imported = dict(statistics or {})
        # derived when first asked for, and kept
        self._statistics: dict[str, Statistics] = {}
        self._samples: dict[tuple[int, int], FeatureSet] = {}
        self._neighbours: dict[int, Tensor] = {}
        self._discrepancy: tuple[FeatureSet, tuple[float, float]] | None = None

    @classmethod
    def of_statistics(cls, statistics: Statistics) -> FeatureSet:
        """A reference of which only Frechet statistics are known."""
        return cls({}, statistics={"statistics": statistics})

    @property
    def n(self) -> int | None:
        """Number of images; None for statistics that do not say."""
        for tensor in self.features.values():  # all have the same number
            return len(tensor)
        return None

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles that metrics can read, also those of STATISTICS."""
        roles = list(self.features)
        if "features" in self.features and "unit" not in self.features:
            roles.append("unit")
        for name, role in STATISTICS.items():
            if name in self._imported or role in self.features:
                roles.append(name)
        return tuple(roles)

    def __getitem__(self, role: str) -> Tensor:
        if role == "unit" and role not in self.features:
            role = "features"  # cosines do not depend on the length of the features
        return self.features[role]

    @property
    def statistics(self) -> Statistics:
        """Frechet statistics of "features"."""
        return self.statistics_of("statistics")

    def statistics_of(self, name: str) -> Statistics:
        """Frechet statistics by a role of STATISTICS, imported or of the features; kept with their factor."""
        if name in self._imported:
            return self._imported[name]
        if name not in self._statistics:
            self._statistics[name] = Statistics.of(self[STATISTICS[name]])
        return self._statistics[name]

    def is_imported(self, role: str) -> bool:
        """Whether a role is published statistics, whose images are not at hand."""
        return role in self._imported

    def count(self, role: str) -> int | None:
        """Number of images behind a role; None for statistics that do not say."""
        if role in self._imported:
            return self._imported[role].n
        return self.n

    def neighbours(self, k: int) -> Tensor:
        """Distances of each image to its nearest others, (N, at least k), ascending."""
        depth = max(k, min(NEIGHBOURS, self.n - 1))  # enough for the k of other metrics too
        if depth not in self._neighbours:
            self._neighbours[depth] = neighbour_distances(self["features"], depth)
        return self._neighbours[depth]

    def discrepancy(self, generated: FeatureSet) -> tuple[float, float]:
        """MMD^2 of KID's kernel and its variance (`kernel.discrepancy`); kept for the last generated set."""
        if self._discrepancy is None or self._discrepancy[0] is not generated:
            estimate = discrepancy(real=self["features"], generated=generated["features"])
            self._discrepancy = (generated, estimate)
        return self._discrepancy[1]

    def rows_by_subject(self) -> dict[int, Tensor]:
        """Row numbers of each subject's images, subjects in order of first appearance."""
        subjects = self["subjects"]
        numbers = dict.fromkeys(subjects.tolist())
        return {number: (subjects == number).nonzero()[:, 0] for number in numbers}

    def rows(self, rows: Tensor) -> FeatureSet:
        """The set of the images with these row numbers."""
        features = {role: tensor[rows] for role, tensor in self.features.items()}
        return FeatureSet(features, subject_names=self.subject_names)

    def sample(self, n: int, seed: int) -> FeatureSet:
        """A random sample of n images without replacement; the same object for the same n and seed."""
        if n == self.n:
            return self
        if (n, seed) not in self._samples:
            rows = np.sort(np.random.default_rng(seed).permutation(self.n)[:n])
            self._samples[n, seed] = self.rows(torch.from_numpy(rows))
        return self._samples[n, seed]

    def parts(self, n: int, m: int, seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Two disjoint random samples, of n and of m images."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(self.n))
        return self.rows(order[:n]), self.rows(order[n : n + m])
