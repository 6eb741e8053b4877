"""LPIPS diversity: pairs within a prompt, and torchmetrics' network on given weights."""

import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import _LPIPS

from diffadapt.metrics import lpips_diversity
from diffadapt.metrics.diversity import load_lpips, lpips_diversity_with_interval


def _difference(first, second):
    return (first - second).abs().mean(dim=(1, 2, 3))


def test_pairs_are_within_prompts_and_prompts_weigh_alike():
    levels = torch.tensor([0, 51, 153, 0, 255, 7], dtype=torch.uint8)
    pixels = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    groups = ["cat", "cat", "cat", "dog", "dog", "alone"]
    first, second = (0.2 + 0.6 + 0.4) / 3, 1.0
    found = lpips_diversity_with_interval(pixels=pixels, groups=groups, network=_difference)
    assert found.value == pytest.approx((first + second) / 2)
    assert lpips_diversity(pixels=pixels, groups=groups, network=_difference) == pytest.approx(found.value)
    error = (second - first) / 2  # of the mean of two prompts
    assert found.interval.low == 0  # Student's t over two prompts, cut to what a distance can be
    assert found.interval.high == pytest.approx(found.value + 12.7062047362 * error)


def test_more_pairs_than_fit_at_once(monkeypatch):
    pixels = torch.rand(8, 3, 4, 4)
    whole = lpips_diversity(pixels=pixels, groups=[0] * 8, network=_difference)
    monkeypatch.setattr("diffadapt.metrics.diversity.PAIRS", 3)
    assert lpips_diversity(pixels=pixels, groups=[0] * 8, network=_difference) == pytest.approx(whole)
    found = lpips_diversity_with_interval(pixels=pixels, groups=[0] * 8, network=_difference)
    assert found.interval is None  # one prompt tells nothing of others


def test_single_images_and_wrong_lengths_are_refused():
    pixels = torch.rand(3, 3, 4, 4)
    with pytest.raises(ValueError, match="at least two images of one prompt"):
        lpips_diversity(pixels=pixels, groups=[0, 1, 2], network=_difference)
    with pytest.raises(ValueError, match="3 images, but prompts of 2"):
        lpips_diversity(pixels=pixels, groups=[0, 1], network=_difference)


@pytest.mark.parametrize(("net", "build"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
@pytest.mark.slow
def test_network_is_torchmetrics_on_torchvisions_weights(net, build):
    features = getattr(torchvision.models, build)().features.state_dict(prefix="features.")
    network = load_lpips(features, net=net)
    oracle = _LPIPS(net=net, pnet_rand=True)
    for (_, tensor), (_, source) in zip(oracle.net.state_dict().items(), features.items(), strict=True):
        tensor.copy_(source)  # both list the layers in order
    first, second = torch.rand(2, 2, 3, 64, 64)
    expected = oracle(first, second, normalize=True).flatten()
    assert torch.allclose(network(first, second), expected)
    assert float(expected.min()) > 0
    assert torch.equal(network(first, first), torch.zeros(2))


def test_weights_of_another_backbone_are_refused():
    with pytest.raises(
        ValueError, match=r"weights of 'squeeze' need features\.0\.weight of shape \(64, 3, 3, 3\)"
    ):
        load_lpips({"features.0.weight": torch.zeros(64, 3, 11, 11)}, net="squeeze")
    with pytest.raises(ValueError, match="expected one of alex, vgg, squeeze"):
        load_lpips({}, net="resnet")
