"""Files that LyCORIS writes: same outputs here as there, every kind it has in common with us."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.foreign_cases import TOLERANCE, error, output, shake, unet
from safetensors.torch import load_file, save_file

import diffadapt as da

lycoris = pytest.importorskip("lycoris")

KINDS = {
    "LoRA and LoCon": {"algo": "locon"},
    "LoCon, Tucker": {"algo": "locon", "use_tucker": True},
    "rank-stabilised": {"algo": "locon", "rs_lora": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr"},
    "LoKr, both decomposed": {
        "algo": "lokr",
        "decompose_both": True,
        "factor": 8,
        "linear_dim": 1,
        "conv_dim": 1,
    },
    "LoKr, Tucker": {"algo": "lokr", "use_tucker": True},
    "LoKr, whole factors": {"algo": "lokr", "full_matrix": True, "linear_dim": 1000, "conv_dim": 1000},
    "DoRA by outputs": {"algo": "locon", "dora_wd": True},
    "DoRA by inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "DoRA of LoHa": {"algo": "loha", "dora_wd": True},
    "DoRA of LoKr": {"algo": "lokr", "dora_wd": True},
    "full": {"algo": "full"},
    "with norms": {"algo": "locon", "train_norm": True},
}


def written(folder, *, seed: int = 0, prefix: str = "lora_unet", **options):
    """A file of LyCORIS and the outputs of the model it was made on, as LyCORIS computes them."""
    model = unet(seed)
    base = output(model)
    lycoris.LycorisNetwork.apply_preset(
        {
            "enable_conv": True,
            "target_module": ["UNet2DConditionModel"],
            "target_name": [],
            "lora_prefix": prefix,
        }
    )
    options = {"linear_dim": 2, "linear_alpha": 1.5, "conv_dim": 2, "conv_alpha": 3.0, **options}
    network = lycoris.create_lycoris(model, 1.0, **options)
    network.apply_to()
    network.eval()
    shake([p for p in network.parameters() if p.requires_grad])
    theirs = output(model)
    path = folder / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    return path, base, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_file_of_lycoris_gives_its_outputs(tmp_path, kind):
    path, base, theirs = written(tmp_path, **KINDS[kind])
    model = unet()
    da.load(model, path)
    assert error(output(model), theirs, base) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_was_opened_can_be_saved_as_our_file_and_opened_again(tmp_path, kind):
    path, base, _ = written(tmp_path, **KINDS[kind])
    first, second = unet(), unet()
    adapter = da.load(first, path)
    da.save(adapter, tmp_path / "ours.safetensors")
    again = da.load(second, tmp_path / "ours.safetensors")
    assert again.method.name == "imported"
    assert torch.equal(output(first), output(second))
    da.detach(again)
    assert torch.equal(output(second), base)


@pytest.mark.parametrize("kind", ["DoRA by inputs", "LoHa, Tucker", "LoKr, both decomposed"])
@pytest.mark.slow
def test_what_was_opened_merges_and_can_be_trained_on(tmp_path, kind):
    path, *_ = written(tmp_path, **KINDS[kind])
    model = unet()
    adapter = da.load(model, path)
    live = output(model)
    da.merge(adapter)
    assert torch.allclose(output(model), live, atol=1e-5)
    da.unmerge(adapter)
    model(
        sample=torch.ones(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.ones(1, 5, 32)
    ).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_was_opened_can_be_exported_to_every_format_that_holds_it(tmp_path, kind):
    path, *_ = written(tmp_path, **KINDS[kind])
    model = unet()
    adapter = da.load(model, path)
    live = output(model)
    for to, options in {"kohya": {}, "diffusers": {"rank": 1000}}.items():
        if (kind, to) == ("with norms", "diffusers"):
            with pytest.raises(ValueError, match="norms"):
                da.export(adapter, tmp_path / "no.safetensors", to=to, **options)
            continue
        da.export(adapter, tmp_path / f"{to}.safetensors", to=to, **options)
        again = unet()
        da.load(again, tmp_path / f"{to}.safetensors")
        assert torch.allclose(output(again), live, atol=1e-4), to
    da.export(adapter, tmp_path / "merged", to="merged")
    assert torch.allclose(output(UNet2DConditionModel.from_pretrained(tmp_path / "merged")), live, atol=1e-4)


def test_the_tucker_file_has_a_core_and_the_decomposed_lokr_its_factors(tmp_path):
    tucker = load_file(written(tmp_path, **KINDS["LoCon, Tucker"])[0])
    assert any(key.endswith("lora_mid.weight") for key in tucker)
    both = load_file(written(tmp_path, **KINDS["LoKr, both decomposed"])[0])
    assert any(key.endswith("lokr_w1_a") for key in both)
    assert any(key.endswith("lokr_w2_a") for key in both)
    inputs = load_file(written(tmp_path, **KINDS["DoRA by inputs"])[0])
    assert any(key.endswith("dora_scale") and tensor.shape[0] == 1 for key, tensor in inputs.items())


def test_the_prefix_of_lycoris_own_wrapper_is_known(tmp_path):
    path, base, theirs = written(tmp_path, prefix="lycoris", algo="locon")
    model = unet()
    da.load(model, path)
    assert error(output(model), theirs, base) < TOLERANCE


def test_a_missing_alpha_means_a_multiplier_of_one(tmp_path):
    path, *_ = written(tmp_path, algo="locon")
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("alpha")}, tmp_path / "without.safetensors")
    adapter = da.load(unet(), tmp_path / "without.safetensors")
    assert {own["multiplier"] for own in adapter.method.forms.values()} == {1.0}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_conv_in.oft_blocks", "oft_blocks"),
        ("lora_unet_no_such_layer.alpha", "no_such_layer"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b", "lora_te_text_model"),
        ("something", "something"),
    ],
)
@pytest.mark.slow
def test_a_key_that_cannot_be_used_is_named_and_nothing_changes(tmp_path, key, said):
    path, base, _ = written(tmp_path, algo="locon")
    save_file({**load_file(path), key: torch.ones(1)}, path)
    model = unet()
    with pytest.raises(ValueError, match=said):
        da.load(model, path)
    assert torch.equal(output(model), base)
    assert da.attached(model) == {}


def test_a_tensor_of_another_shape_is_named(tmp_path):
    path, *_ = written(tmp_path, algo="locon")
    tensors = load_file(path)
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.ones(7, 2, 1, 1)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lycoris\.safetensors: .*conv_in has shape"):
        da.load(unet(), path)


def test_a_core_with_fewer_channels_than_its_factors_is_refused(tmp_path):
    path, *_ = written(tmp_path, **KINDS["LoCon, Tucker"])
    tensors = load_file(path)
    core = next(
        key for key, value in tensors.items() if key.endswith("lora_mid.weight") and value.shape[1] > 1
    )
    tensors[core] = tensors[core][:, :1].contiguous()  # a product would repeat the one channel unnoticed
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit"):
        da.load(unet(), path)


def test_a_file_with_half_a_pair_is_refused(tmp_path):
    path, *_ = written(tmp_path, algo="locon")
    tensors = load_file(path)
    del tensors["lora_unet_conv_in.lora_up.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lycoris\.safetensors: lora_unet_conv_in lacks"):
        da.load(unet(), path)


def test_infinite_values_are_refused(tmp_path):
    path, *_ = written(tmp_path, algo="locon")
    tensors = load_file(path)
    tensors["lora_unet_conv_in.lora_up.weight"][0] = torch.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not finite"):
        da.load(unet(), path)


def test_info_says_what_is_in_a_foreign_file(tmp_path, capsys):
    from diffadapt.cli.main import main

    path, *_ = written(tmp_path, **KINDS["DoRA by inputs"])
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "kohya" in said
    assert "magnitudes of inputs" in said
    assert "lycoris.kohya" in said
