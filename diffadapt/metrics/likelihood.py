"""Feature likelihood score: how likely unseen real images are under the generated ones (FLS, arXiv
2302.04440).

A mixture of isotropic Gaussians, one around each generated image, gets the bandwidths under which the
training images are likeliest. Test images are unlikely under it when the generated images are poor, too much
alike, or copies of training images (whose bandwidths shrink to nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_features, refuse_unequal_widths
from diffadapt.metrics.intervals import Estimate, Interval, mean_interval

MAX_IMAGES = 10_000  # of each of the four sets, as in dgm-eval
STEPS = 100
LEARNING_RATE = 0.5
DECAY_STEP = 50  # from which the learning rate is a tenth
LOG_VARIANCE_RANGE = (-100.0, 20.0)  # a generated copy of a training image would take its bandwidth to 0


def fls(*, training: Features, test: Features, generated: Features, seed: int = 0) -> float:
    """100 exp(-2 (L(generated) - L(other training images)) / D); higher is better, 100 is as real images do.

    L is the mean negative log-likelihood of the test images under the mixture

        p(x) = 1/M sum_j N(x; g_j, s_j I),    log s by 100 steps of Adam on the training images' likelihood.

    Features are first brought to mean 0 and deviation 1 over all four sets together. The training images are
    cut into two random halves: one fits the bandwidths, the other stands in for the generated images in the
    second term. Each set is cut to the number of the smallest, at most 10,000.

    Args:
        training, test, generated: (N, D) features of one layer. The test images must not have been trained
            on.
        seed: of the choice of images.

    Raises:
        ValueError: a feature is NaN, the widths differ, or there are fewer than four training images.

    Source: Jiralerspong et al., arXiv 2302.04440, section 3, as dgm-eval computes it (metrics/fls.py).
    """
    return fls_with_interval(training=training, test=test, generated=generated, seed=seed).value


def fls_with_interval(*, training: Features, test: Features, generated: Features, seed: int = 0) -> Estimate:
    """`fls` and Student's t interval over the test images, the mixtures held fixed."""
    sets = _standardised_sets(training, test, generated, seed)
    width = sets.test.shape[1]
    # how much less likely the test images are than under real images in the place of generated ones, (n,)
    differences = _surprise(sets, sets.generated) - _surprise(sets, sets.baseline)
    spread = mean_interval(differences, over="test images")

    def score(difference: float) -> float:
        return 100 * math.exp(-2 * difference / width)

    # the score falls with the difference, so the ends change places
    interval = Interval(score(spread.high), score(spread.low), f"{spread.method}, mixtures fixed")
    return Estimate(score(float(differences.mean())), interval)


@dataclass(frozen=True)
class _Sets:
    """Four standardised sets of equally many images, (n, D) each.

    Attributes:
        fitting: the half of the training images that the bandwidths are fitted to.
        baseline: the other half, in the place of generated images.
    """

    fitting: Tensor
    baseline: Tensor
    test: Tensor
    generated: Tensor


def _standardised_sets(training: Features, test: Features, generated: Features, seed: int) -> _Sets:
    """Random samples of one size of all sets, at mean 0 and deviation 1 over all of them together."""
    training = as_features("training", training)
    test = as_features("test", test)
    generated = as_features("generated", generated)
    refuse_unequal_widths(test.shape[1], generated.shape[1])
    refuse_unequal_widths(training.shape[1], generated.shape[1])
    n = min(MAX_IMAGES, len(training) // 2, len(test), len(generated))
    if n < 2:
        raise ValueError(f"{len(training)} training images cannot be cut into two halves of at least 2")
    generator = np.random.default_rng(seed)

    def choose(rows: Tensor, count: int) -> Tensor:
        return rows[torch.from_numpy(generator.permutation(len(rows))[:count])]

    test = choose(test, n)
    generated = choose(generated, n)
    fitting, baseline = choose(training, 2 * n).split(n)
    all_rows = torch.cat([fitting, baseline, test, generated])  # (4 n, D)
    mean = all_rows.mean(dim=0)
    deviation = all_rows.std(dim=0)
    deviation[deviation == 0] = 1  # a column without any variation says nothing, and must not divide by 0
    return _Sets(
        fitting=(fitting - mean) / deviation,
        baseline=(baseline - mean) / deviation,
        test=(test - mean) / deviation,
        generated=(generated - mean) / deviation,
    )


def _surprise(sets: _Sets, centres: Tensor) -> Tensor:
    """Negative log-likelihood of each test image, (n,), under the mixture around `centres` (n, D)."""
    width = centres.shape[1]
    log_variances = _fit_log_variances(torch.cdist(sets.fitting, centres).square(), width)
    return -_log_likelihoods(torch.cdist(sets.test, centres).square(), log_variances, width)


def _log_likelihoods(squared: Tensor, log_variances: Tensor, width: int) -> Tensor:
    """Log of the mixture's density up to (2 pi)^(-D/2), (n,).

        log 1/M sum_j exp(-|x - g_j|^2 / (2 s_j)) s_j^(-D/2)

    Args:
        squared: (n, M) squared distances of the images to the centres.
        log_variances: (M,), log s_j.
        width: D.
    """
    exponents = -squared / (2 * log_variances.exp()) - width / 2 * log_variances  # (n, M)
    return exponents.logsumexp(dim=1) - math.log(squared.shape[1])


def _fit_log_variances(squared: Tensor, width: int) -> Tensor:
    """Log variances (M,) by the published descent: Adam from 0, its learning rate a tenth in the second half.

    Args:
        squared: (n, M) squared distances of the fitting images to the centres.
    """
    log_variances = torch.zeros(squared.shape[1], dtype=squared.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([log_variances], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [DECAY_STEP], gamma=0.1)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = -_log_likelihoods(squared, log_variances, width).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                log_variances.clamp_(*LOG_VARIANCE_RANGE)
    return log_variances.detach()
