"""Memory from shapes: against sums by hand, and against the models themselves."""

import shutil

import pytest
import torch
from helpers.family_pipelines import FAMILIES, tiny_folder
from helpers.pipelines import train_options, write_pictures
from helpers.scripts import runner
from torch import nn

import diffadapt as da
from diffadapt.models.block_offload import outermost_blocks
from diffadapt.models.families import load_base
from diffadapt.training.memory import size_text
from diffadapt.training.peak_memory import peak_memory
from diffadapt.training.stage_memory import denoiser_bytes, quantised_layers, stage_memory

pytestmark = pytest.mark.slow

SIDE = 64


def test_what_lives_at_a_time_is_counted_and_what_died_is_not():
    weight = torch.empty(100, 100, device="meta")
    x = torch.empty(10, 100, device="meta")
    with peak_memory([weight]) as memory:
        hidden = x @ weight.t()  # a view of a weight is no memory
        assert memory.now == 4 * 1000
        hidden = hidden.relu()
        assert memory.now == 4 * 1000
        hidden.add_(1)
        kept = [hidden, hidden @ weight, hidden[:5]]
        assert memory.now == 4 * 2000
        del kept, hidden
    assert memory.now == 0
    assert memory.peak == 4 * 2000


def test_a_backward_pass_is_counted_with_what_the_forward_pass_keeps():
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).to("meta").requires_grad_(False)
    x = torch.empty(1000, 8, device="meta", requires_grad=True)
    with peak_memory([x, *layers.parameters()]) as memory:
        output = layers(x)
        assert memory.now == 32_000  # frozen Linear layers keep no input
        output.square().sum().backward()
    # The output, and what the derivative of its square is made of.
    assert 2 * 32_000 <= memory.peak <= 5 * 32_000


def test_attention_keeps_no_matrix_of_all_pairs():
    query = torch.empty(1, 2, 500, 8, device="meta", requires_grad=True)
    with peak_memory([query]) as memory:
        output = nn.functional.scaled_dot_product_attention(query, query, query)
    assert output.shape == query.shape
    assert memory.now == 4 * (500 * 2 * 8 + 500 * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_caption_has_the_shapes_that_are_counted(family, tmp_path_factory):
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    conditions = model.encode_captions(["a " * 1000])
    assert {name: tuple(value.shape[1:]) for name, value in conditions.items()} == model.longest_conditions()


@pytest.fixture
def count(tmp_path_factory):
    """Counts a tiny base with LoRA: the base, the adapter, and the stages by name."""

    def count(family, batch_size=1, **options):
        folder = str(tiny_folder(family, tmp_path_factory))
        model = load_base(folder, is_staged=True, is_shapes_only=True)
        assert not model.has_weights
        adapter = da.attach(model.pipe, da.LoRA(rank=2), targets="attention")
        if options.get("gradient_checkpointing"):
            model.denoiser.enable_gradient_checkpointing()
        options = train_options(**options)
        stages = stage_memory(model, adapter, options, resolution=SIDE, batch_size=batch_size)
        return model, adapter, {stage.name: stage for stage in stages}

    return count


def bytes_of(*modules):
    return sum(p.numel() * p.element_size() for m in modules for p in [*m.parameters(), *m.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_has_its_models(family, count, tmp_path_factory):
    _, adapter, stages = count(family)
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    assert list(stages) == ["encode captions", "encode images", "train", "sample"]
    trained = 4 * 4 * adapter.num_parameters  # with gradients and two values of AdamW
    assert stages["encode captions"].weights == bytes_of(*model.text_encoders.values())
    assert stages["encode images"].weights == bytes_of(model.autoencoder)
    assert stages["train"].weights == bytes_of(model.denoiser) + trained
    assert stages["sample"].weights == bytes_of(model.denoiser, model.autoencoder) + trained
    for stage in list(stages.values())[1:]:
        assert stage.activations > 0
        assert stage.total == stage.weights + stage.activations


def test_options_of_memory_change_the_estimate(count):
    _, _, plain = count("flux")
    _, _, larger = count("flux", batch_size=2)
    _, _, checkpointed = count("flux", gradient_checkpointing=True)
    assert larger["train"].activations == pytest.approx(2 * plain["train"].activations, rel=0.1)
    assert checkpointed["train"].activations < 0.7 * plain["train"].activations
    assert count("flux", text_encoder_device="cpu")[2]["encode captions"].total == 0
    model, _, offloaded = count("flux", offload_blocks=1)
    assert offloaded["train"].weights < plain["train"].weights
    blocks = [bytes_of(block) for block in outermost_blocks(model.denoiser)]
    outside = bytes_of(model.denoiser) - sum(blocks)
    assert denoiser_bytes(model.denoiser, resident_blocks=2) == outside + sum(sorted(blocks)[-2:])


@pytest.mark.parametrize("family", ["sd3", "flux2_klein", "qwen_image", "z_image"])
def test_a_dry_run_loads_no_weights_and_shows_the_stages(
    family, count, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder(family, tmp_path_factory), folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"no weights")
    write_pictures(tmp_path / "mine", 2)
    output = tmp_path / "out"
    arguments = {
        "pretrained_model_name_or_path": folder,
        "instance_data_dir": tmp_path / "mine",
        "instance_prompt": "a sks dog",
        "output_dir": output,
        "resolution": SIDE,
        "adapter": "lora(rank=2)",
        "num_threads": 1,
    }
    told = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    assert runner("dreambooth", monkeypatch)(*told, "--dry_run", "--gradient_checkpointing") == 0
    text = capsys.readouterr().out
    _, _, stages = count(family, gradient_checkpointing=True)
    for stage in stages.values():
        assert f"{stage.name:<15} {size_text(stage.total):>9}: " in text
    assert "untried  the adapter's file and its exports" in text
    assert not list(output.rglob("*.safetensors"))


def test_quantised_layers_take_less_and_a_file_its_size(count, tmp_path):
    model, _, plain = count("flux")
    layers = quantised_layers(model.denoiser)
    assert model.denoiser.transformer_blocks[0].attn.to_q in layers
    assert model.denoiser.proj_out not in layers
    weights = sum(layer.weight.numel() for layer in layers)
    for precision, size in {"int8": 1, "fp8": 1, "nf4": 0.5 + 4 / 64}.items():
        _, _, quantised = count("flux", base_precision=precision)
        saved = plain["train"].weights - quantised["train"].weights
        assert saved == pytest.approx((4 - size) * weights, abs=len(layers))
        assert quantised["train"].activations > plain["train"].activations  # a dequantised weight
    file = tmp_path / "denoiser.gguf"
    file.write_bytes(bytes(12345))
    _, adapter, from_file = count("flux", transformer=str(file))
    assert from_file["train"].weights == 12345 + 4 * 4 * adapter.num_parameters
