"""Extractors give what the field's own programs give, under a name that says which they are."""

import hashlib

import pytest
import torch
import torch_fidelity
import torchvision
from torch import nn
from torch.nn.functional import interpolate, normalize
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from diffadapt import embedded
from diffadapt.evaluation.features import weight_files as weights
from diffadapt.evaluation.features.extractors import canonical, load_extractor
from diffadapt.evaluation.features.extractors.convolutional import Inception, lpips
from diffadapt.metrics.features import load_clip
from diffadapt.metrics.resize import resize

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


def images(count=2, height=21, width=17):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    torch.manual_seed(3)
    path = tmp_path / "inception.pth"
    torch.save(Inception(None).state_dict(), path)
    file = weights.WeightFile("inception.pth", "", 0, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(weights.FILES, "inception", file)
    extractor = load_extractor("inception", weights={"inception": path})
    oracle = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    pool, logits = oracle(images())
    found = extractor(images())
    assert (found["pool"] - pool).abs().max() < 1e-6 * pool.abs().max()
    assert (found["logits_unbiased"] - logits).abs().max() < 2e-6 * logits.abs().max()
    assert (extractor.sha256, extractor.preset, extractor.smoke) == (file.sha256, "tf1", False)
    assert pool.std() > 1e-3  # the signal has not died on the way
    smooth = load_extractor("inception", weights={"inception": path}, preset="torchmetrics")(images())["pool"]
    assert not torch.allclose(smooth, pool, rtol=1e-3)
    metrics = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    assert torch.equal(metrics(images()), pool)  # so what agrees with the one agrees with the other
    metrics.use_antialias = True
    assert (metrics(images()) - smooth).abs().max() < 1e-6 * smooth.abs().max()


class SmallVgg(nn.Module):
    """torchvision's VGG16 in small: the same parts, other sizes."""

    def __init__(self, weights=None):
        super().__init__()
        self.features, self.avgpool = nn.Conv2d(3, 4, 3, stride=8), nn.AdaptiveAvgPool2d(7)
        fc1, fc2, fc3 = nn.Linear(4 * 49, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.classifier = nn.Sequential(fc1, nn.ReLU(), nn.Dropout(), fc2, nn.ReLU(), nn.Dropout(), fc3)

    def forward(self, pixels):
        return self.classifier(self.avgpool(self.features(pixels)).flatten(1))


def test_vgg16_is_torch_fidelitys_second_layer_after_its_relu(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.models, "vgg16", SmallVgg)
    path = tmp_path / "vgg.pth"
    torch.save(SmallVgg().state_dict(), path)
    file = weights.WeightFile("vgg.pth", "", 0, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(weights.FILES, "vgg16", file)
    extractor = load_extractor("vgg16", weights={"vgg16": path})
    oracle = torch_fidelity.feature_extractor_vgg16.FeatureExtractorVGG16("o", ["fc2_relu"], str(path))
    (expected,) = oracle(images(4))
    found = extractor(images(4))["fc2_relu"]
    assert expected.count_nonzero() > 0
    assert torch.allclose(found, expected, atol=1e-6)
    assert (extractor.feature_layer, extractor.logit_layer, extractor.preset) == ("fc2_relu", None, "tf1")


@pytest.mark.parametrize("kind", ["alex", "squeeze"])
def test_squared_distances_of_lpips_rows_are_torchmetrics_lpips(kind):
    torch.manual_seed(0)
    extractor = lpips(None, backbone=kind, sha256="", preset="none", device="cpu")
    torch.manual_seed(0)
    oracle = _LPIPS(net=kind, pnet_rand=True)  # its heads come from its own file
    first, second = images(2, 64, 64)
    rows = extractor(torch.stack([first, second]))["lpips"]
    torch.manual_seed(0)
    oracle.net = type(oracle.net)(pretrained=False)
    expected = oracle(first[None] / 255, second[None] / 255, normalize=True)
    assert torch.allclose((rows[0] - rows[1]).square().sum(), expected.squeeze(), rtol=1e-4)
    assert extractor.feature_layer is None


def test_embedded_clip_is_the_training_figures_clip():
    extractor, clip = load_extractor("embedded:clip"), load_clip("embedded:clip")
    square = images(2, 64, 64)
    assert torch.allclose(extractor(square)["image"], clip.images([square / 255]), atol=1e-6)
    assert torch.equal(extractor.embed_texts(["a cat"]), clip.texts(["a cat"]))
    assert load_extractor("clip:embedded:clip").name == "embedded:clip"
    own = load_extractor(f"clip:{embedded('clip')}")  # any CLIP model in a folder
    assert own.name.startswith("clip:/")
    assert (own.sha256, own.preset) == (extractor.sha256, "crop-64")
    assert torch.equal(own(square)["image"], extractor(square)["image"])


def test_embedded_digits_gives_features_and_logits():
    extractor = load_extractor("embedded:digits")
    found = extractor(images(3, 8, 8))
    assert (found["pool"].shape[1], found["logits"].shape) == (64, (3, 10))
    assert (extractor.feature_layer, extractor.logit_layer) == ("pool", "logits")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_dino_is_the_class_token_of_the_middle_of_the_image(dino_folder):
    extractor = load_extractor(f"dino:{dino_folder}")
    assert (extractor.preset, extractor.side) == ("crop-32", 28)  # 256 and 224, scaled
    image = images(1, 40, 60)
    scaled = interpolate(image.float(), (32, 48), mode="bicubic", antialias=True).clamp(0, 255)
    middle = scaled[..., 2:30, 10:38] / 255 * 2 - 1
    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False)
    with torch.no_grad():
        expected = model(pixel_values=middle).last_hidden_state[:, 0]
    found = extractor(image)
    assert torch.allclose(found["class_token"], expected, atol=1e-5)  # as published: not of length 1
    assert torch.allclose(found["cls"], expected / expected.norm(), atol=1e-5)
    assert (extractor.feature_layer, extractor.layer_of("unit")) == ("class_token", "cls")


def test_dinov2_at_another_size_is_the_authors_own_network(tmp_path):
    """As dgm-eval runs it: the image squeezed, positions looked up at (patches + 0.1) / grid."""
    torch.manual_seed(0)
    config = Dinov2Config(**{**SMALL, "image_size": 70}, patch_size=14)
    model = Dinov2Model(config)
    nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}, do_resize=True).save_pretrained(tmp_path)
    extractor = load_extractor(f"dinov2:{tmp_path}", preset="pil")
    assert extractor.side == 28
    image = images(1, 40, 60)
    squeezed = interpolate(image.float(), (28, 28), mode="bicubic", antialias=True).clamp(0, 255).round()
    embeddings = model.embeddings
    tokens = embeddings.patch_embeddings(squeezed / 255 * 2 - 1)  # (1, 4, 16)
    grid = embeddings.position_embeddings[:, 1:].reshape(1, 5, 5, 16).permute(0, 3, 1, 2)
    places = interpolate(grid, scale_factor=((2 + 0.1) / 5, (2 + 0.1) / 5), mode="bicubic", antialias=False)
    positions = places.permute(0, 2, 3, 1).reshape(1, 4, 16)
    start = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    with torch.no_grad():
        hidden = torch.cat([start, tokens + positions], dim=1)
        for layer in model.eval().encoder.layer:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        expected = model.layernorm(hidden)[:, 0]
    assert torch.allclose(extractor(image)["class_token"], expected, atol=1e-5)


def test_clips_embedding_is_made_when_asked_for_and_is_not_scaled():
    extractor = load_extractor("embedded:clip")
    assert extractor.layers == ("image",)
    asked = extractor.with_layers_for(["raw"])
    assert asked.layers == ("image", "embedding")
    square = images(2, 64, 64)
    clip = load_clip("embedded:clip")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.processor.image_mean, clip.processor.image_std))
    with torch.no_grad():
        hidden = clip.model.vision_model(pixel_values=(square / 255 - mean) / std).pooler_output
        expected = clip.model.visual_projection(hidden)
    found = asked(square)
    assert torch.allclose(found["embedding"], expected, atol=1e-5)
    assert torch.allclose(found["image"], normalize(expected, dim=1), atol=1e-6)
    assert torch.equal(found["image"], extractor(square)["image"])


def test_inceptions_spatial_features_are_mixed_6_conv_as_adms_evaluator_takes_them():
    """Another path through the same network: torch-fidelity's block with a hook, channels last."""
    extractor = load_extractor("inception", smoke=True)
    assert extractor.layers == ("pool", "logits_unbiased")
    torch.manual_seed(0)
    oracle = Inception(None).eval()  # the random weights of --smoke
    seen = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: seen.append(output))
    asked = extractor.with_layers_for(["spatial"])
    assert asked.layers == ("pool", "logits_unbiased", "spatial")
    image = images(1)
    found = asked(image)["spatial"]
    with torch.no_grad():
        oracle(extractor.prepare(image))
    expected = seen[-1].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(1, -1)  # (1, 17 x 17 x 7)
    assert found.shape == (1, 2023)
    assert found.std() > 0
    assert (found - torch.from_numpy(expected)).abs().max() < 1e-5 * float(expected.max())


def test_dinov2_and_a_model_of_another_kind(tmp_path, dino_folder):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    extractor = load_extractor(f"dinov2:{tmp_path}")
    found = extractor(images())
    assert found["class_token"].shape == (2, 16)
    assert torch.allclose(found["unit_class_token"], normalize(found["class_token"], dim=1), atol=1e-6)
    assert (extractor.feature_layer, extractor.layer_of("unit")) == ("class_token", "unit_class_token")
    with pytest.raises(ValueError, match="needs a model of type dinov2"):
        load_extractor(f"dinov2:{dino_folder}")


def test_ones_own_extractor_and_its_contract():
    extractor = load_extractor("toy_extractor:Toy")
    assert extractor(images())["wide"].shape == (2, 16)
    assert (extractor.feature_layer, extractor.logit_layer, extractor.preset) == ("wide", "scores", "clean")
    with pytest.raises(ValueError, match="the contract"):
        load_extractor("toy_extractor:Shapeless")(images())
    with pytest.raises(ValueError, match="cannot be imported"):
        load_extractor("toy_extractor:Nothing")
    with pytest.raises(ValueError, match="contract"):
        load_extractor("collections:OrderedDict")


@pytest.mark.parametrize(
    ("name", "meant"), [("incepton", "inception"), ("embedded:clap", "embedded:clip"), ("vgg", "vgg16")]
)
def test_an_unknown_name_gets_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"did you mean .*{meant}"):
        load_extractor(name)


def test_random_weights_are_marked_repeatable_and_only_for_weight_files():
    extractor = load_extractor("lpips:squeeze", smoke=True)
    assert extractor.smoke
    assert extractor.summary.smoke
    again = load_extractor("lpips:squeeze", smoke=True)
    assert torch.equal(extractor(images())["lpips"], again(images())["lpips"])
    with pytest.raises(ValueError, match="not for 'dino:"):
        load_extractor("dino", smoke=True)


def test_short_names_stand_for_the_papers_models():
    assert canonical("dino") == "dino:facebook/dino-vits16"
    assert canonical("clip") == "clip:openai/clip-vit-base-patch32"


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("torchmetrics", {"mode": "bilinear", "antialias": True}),
        ("bilinear", {"mode": "bilinear"}),
        ("clean", {"mode": "bicubic", "antialias": True}),
    ],
)
def test_resize_presets_are_what_they_are_called(preset, options):
    found = resize(images(), 9, preset)
    expected = interpolate(images().float(), (9, 9), align_corners=False, **options).clamp(0, 255)
    assert torch.equal(found, expected)
    assert torch.equal(resize(images(1, 9, 9), 9, preset), images(1, 9, 9).float())


def test_clean_is_pillows_bicubic_before_rounding():
    import numpy as np
    from PIL import Image

    image = images(1, 64, 64)[0]
    channels = [
        Image.fromarray(c.numpy().astype(np.float32), mode="F").resize((23, 23), Image.Resampling.BICUBIC)
        for c in image
    ]
    expected = torch.from_numpy(np.stack([np.asarray(c) for c in channels])).clamp(0, 255)
    assert (resize(image[None], 23, "clean")[0] - expected).abs().max() < 0.005


def test_pil_is_pillows_bicubic_of_a_file():
    import numpy as np
    from PIL import Image

    image = images(1, 64, 48)[0]
    scaled = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((23, 23), Image.Resampling.BICUBIC)
    difference = resize(image[None], 23, "pil")[0] - torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    assert difference.abs().max() <= 1  # Pillow's weights are whole numbers
    assert difference.abs().mean() < 0.01


@pytest.mark.parametrize("preset", ["crop-8", "crop-0", "crop-", "crop--9", "crop-9.5", "crop"])
def test_crops_that_cannot_be_are_refused(preset):
    with pytest.raises(ValueError, match=r"unknown resize preset|below the 9 pixels that the network takes"):
        resize(images(), 9, preset)
    with pytest.raises(ValueError, match="resize"):
        load_extractor("embedded:clip", preset=preset)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 40), (64, 20), (50, 50)])
def test_crops_are_the_middle_also_of_images_of_the_networks_size(height, width):
    """As the processors of CLIP and DINO: the shorter side becomes 24, then the middle 20 x 20."""
    import numpy as np
    from PIL import Image

    image = images(1, height, width)[0]
    scale = 24 / min(height, width)
    size = (int(width * scale), int(height * scale))
    scaled = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    expected = torch.from_numpy(np.array(scaled.crop((left, top, left + 20, top + 20)))).permute(2, 0, 1)
    assert (resize(image[None], 20, "crop-24")[0] - expected).abs().mean() < 1


def test_a_crop_that_shows_next_to_nothing_is_refused():
    with pytest.raises(ValueError, match="the network would see 64 of 99999999 pixels"):
        load_extractor("embedded:clip", preset="crop-99999999")


def test_a_crop_below_an_extractors_side_is_refused_before_any_image_is_read():
    with pytest.raises(ValueError, match=r"crop-63: .* below the 64 pixels .* give crop-64 or more"):
        load_extractor("embedded:clip", preset="crop-63")
    with pytest.raises(ValueError, match=r"below the 299 pixels"):
        load_extractor("inception", preset="crop-256", smoke=True)
    assert load_extractor("embedded:clip", preset="crop-72")(images(1, 80, 100))["image"].shape == (1, 128)


def test_presets_differ_and_wrong_ones_are_named():
    found = [resize(images(), 9, preset) for preset in ("tf1", "clean", "torchmetrics", "bilinear")]
    assert all((a - b).abs().mean() > 0.5 for i, a in enumerate(found) for b in found[:i])
    with pytest.raises(ValueError, match="did you mean clean"):
        resize(images(), 9, "claen")
    with pytest.raises(ValueError, match="unknown resize preset"):
        load_extractor("embedded:clip", preset="nearest")
    with pytest.raises(TypeError, match="uint8"):
        resize(images().float(), 9, "clean")
