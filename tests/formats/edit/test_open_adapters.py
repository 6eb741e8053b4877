"""Adapter files made smaller and joined without their base: what they do, in their own format."""

import json

import pytest
import torch
from helpers.foreign_cases import output, shake, unet
from helpers.models import denoiser
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.cli.main import main
from diffadapt.formats.edit.open_adapters import BaseNeeded, open_without_base

peft = pytest.importorskip("peft")

HEADER = {"ss_tag": "x", "ss_network_dim": "3"}


def kohya_file(path, seed=0, rank=3, dtype=torch.float32, **more):
    """A linear layer, a convolution, one as Tucker, and a norm, each with its own alpha."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors = {
        "lora_te_mlp_fc1.lora_down.weight": draw(rank, 6),
        "lora_te_mlp_fc1.lora_up.weight": draw(7, rank),
        "lora_te_mlp_fc1.alpha": torch.tensor(1.5),
        "lora_unet_conv_in.lora_down.weight": draw(rank, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": draw(8, rank, 1, 1),
        "lora_unet_conv_in.diff_b": draw(8),
        "lora_unet_conv_out.lora_down.weight": draw(2, 8, 1, 1),
        "lora_unet_conv_out.lora_mid.weight": draw(2, 2, 3, 3),
        "lora_unet_conv_out.lora_up.weight": draw(4, 2, 1, 1),
        "lora_unet_conv_out.alpha": torch.tensor(1.0),
        "lora_unet_conv_norm_out.w_norm": draw(8),
        "lora_unet_conv_norm_out.b_norm": draw(8),
    }
    tensors |= more
    save_file({key: value.to(dtype) for key, value in tensors.items()}, path, HEADER)
    return path


def changes(path):
    """Every layer's change by kohya's formula: alpha / rank * up @ (mid *) down."""
    tensors, found = {key: value.double() for key, value in load_file(path).items()}, {}
    for key in tensors:
        layer, _, kind = key.partition(".")
        if kind == "lora_up.weight":
            up, down = tensors[key].flatten(1), tensors[f"{layer}.lora_down.weight"]
            mid = tensors.get(f"{layer}.lora_mid.weight")
            inner = down if mid is None else torch.einsum("abkl,bi->aikl", mid, down.flatten(1))
            alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down))))
            found[layer] = alpha / len(down) * (up @ inner.flatten(1)).reshape(-1, *inner.shape[1:])
        elif kind in ("diff", "diff_b", "w_norm", "b_norm"):
            found[f"{layer}.{kind}" if kind != "diff" else layer] = tensors[key]
    return found


def command(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def close(first, second):
    assert first.keys() == second.keys()
    for layer, change in first.items():
        assert torch.allclose(change, second[layer], atol=1e-5), layer


def test_a_kohya_file_keeps_its_names_its_changes_and_what_its_header_says(tmp_path, capsys):
    path, out = kohya_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    code, said = command(capsys, "resize", path, out, "--rank", 100)
    assert code == 0, said
    assert "100.0000 % of the energy kept" in said
    close(changes(out), changes(path))
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_tag"] == "x"
        assert "ss_network_dim" not in file.metadata()


def test_a_smaller_rank_is_the_truncated_svd_of_every_layer(tmp_path, capsys):
    path, out = kohya_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    assert command(capsys, "resize", path, out, "--rank", 1)[0] == 0
    before, after = changes(path), changes(out)
    for layer in ("lora_te_mlp_fc1", "lora_unet_conv_in", "lora_unet_conv_out"):
        left, values, right = torch.linalg.svd(before[layer].flatten(1), full_matrices=False)
        best = values[0] * left[:, :1] @ right[:1]
        assert torch.allclose(after[layer].flatten(1), best, atol=1e-5)
    assert torch.equal(after["lora_unet_conv_norm_out.w_norm"], before["lora_unet_conv_norm_out.w_norm"])


def test_a_file_in_half_precision_stays_in_it(tmp_path, capsys):
    path = kohya_file(tmp_path / "in.safetensors", dtype=torch.float16)
    assert command(capsys, "resize", path, tmp_path / "out.safetensors", "--rank", 2)[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out.safetensors").values()} == {torch.float16}


def test_kohya_files_are_added_at_their_strengths(tmp_path, capsys):
    one = kohya_file(tmp_path / "one.safetensors", 1, rank=1)
    two = kohya_file(tmp_path / "two.safetensors", 2, rank=2)
    out = tmp_path / "both.safetensors"
    code, said = command(capsys, "combine", f"{one}:0.7", f"{two}:-0.5", "--out", out)
    assert code == 0, said
    first, second = changes(one), changes(two)
    close(changes(out), {layer: 0.7 * first[layer] - 0.5 * second[layer] for layer in first})


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("lora_te_mlp_fc1.dora_scale", (7, 1), "lora with magnitudes"),
        ("lora_te_mlp_fc2.diff", (3, 4), "the form dense"),
        ("lora_te_mlp_fc2.diff_b", (3,), "the form bias"),
    ],
)
def test_what_needs_the_base_is_named(tmp_path, capsys, key, shape, kind):
    path = kohya_file(tmp_path / "in.safetensors", **{key: torch.ones(shape)})
    code, said = command(capsys, "resize", path, tmp_path / "out.safetensors", "--rank", 1)
    assert code == 2
    assert key.partition(".")[0] in said
    assert kind in said
    assert "--base" in said
    assert not (tmp_path / "out.safetensors").exists()


def peft_folder(folder, seed, **options):
    """A folder that PEFT wrote, and the outputs of the model it was made on."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1"], rank_pattern={"to_q": 2}, **options
    )
    model = peft.get_peft_model(unet(), config)
    shake([p for p in model.parameters() if p.requires_grad], seed=seed)
    model.save_pretrained(folder)
    return output(model)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_peft_reads_the_folder_and_gives_the_same_outputs(tmp_path, capsys, options):
    expected = peft_folder(tmp_path / "in", 1, **options)
    assert command(capsys, "resize", tmp_path / "in", tmp_path / "out", "--energy", 1.0)[0] == 0
    ranks = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
    assert set(ranks.values()) == {2}
    model = peft.PeftModel.from_pretrained(unet(), tmp_path / "out")
    assert torch.allclose(output(model), expected, atol=1e-5)
    assert (expected - output(unet())).abs().max() > 1e-3


def test_diffusers_reads_its_file_with_ranks_that_differ(tmp_path, capsys):
    generator, layers, tensors = torch.Generator().manual_seed(3), {}, {}
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1."
    for name, rank, (out, into) in ((f"{attention}to_q", 1, (64, 64)), (f"{attention}to_v", 4, (64, 64))):
        layers[name] = (
            torch.randn(out, rank, generator=generator),
            torch.randn(rank, into, generator=generator),
        )
        tensors |= {f"{name}.lora_B.weight": layers[name][0], f"{name}.lora_A.weight": layers[name][1]}
    for number in (1, 2):
        save_file(tensors, tmp_path / f"{number}.safetensors")
    files = [f"{tmp_path / '1.safetensors'}:0.5", tmp_path / "2.safetensors"]
    assert command(capsys, "combine", *files, "--out", tmp_path / "both.safetensors")[0] == 0
    assert (
        command(
            capsys, "resize", tmp_path / "both.safetensors", tmp_path / "small.safetensors", "--energy", 1.0
        )[0]
        == 0
    )
    model = unet()
    model.load_lora_adapter(str(tmp_path), weight_name="small.safetensors", prefix="unet")
    for name, (up, down) in layers.items():
        layer = model.get_submodule(name.removeprefix("unet."))
        change = layer.get_delta_weight(layer.active_adapters[0])
        assert torch.allclose(change, 1.5 * up @ down, atol=1e-4)


def test_names_of_older_diffusers_files_become_todays(tmp_path, capsys):
    old = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.to_q.lora_linear_layer"
    tensors = {
        f"{layer}.{kind}.weight": torch.ones(shape)
        for layer in (old, text)
        for kind, shape in {"down": (1, 64), "up": (64, 1)}.items()
    }
    save_file(tensors, tmp_path / "old.safetensors")
    assert (
        command(capsys, "resize", tmp_path / "old.safetensors", tmp_path / "new.safetensors", "--rank", 1)[0]
        == 0
    )
    assert set(load_file(tmp_path / "new.safetensors")) == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    }


def own_file(path, method, seed=0, targets="attention+conv"):
    model = denoiser()
    adapter = da.attach(model, da.make_method(method), targets, seed=seed)
    shake(adapter.parameters(), size=0.1, seed=seed + 1)
    da.save(adapter, path, base="a base that is nowhere")
    bases = {name: layer_state.base() for name, layer_state in adapter.layer_states.items()}
    return {site.name: adapter.adapted_weight(site) - bases[site.name] for site in adapter.sites}


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=3)",
        "flora(rank=3)",
        "1lora",
        "pissa(rank=2)",
        "vera(rank=2)",
        "mora(rank=2)",
        "mora(rank=2, type=6)",
        "loha(rank=2)",
        "lokr(rank=2)",
        "superlora(rank=2)",
        "superlora(rank=2, reshape=False)",
        "bitfit",
        "lora+norms",
    ],
)
def test_our_own_files_need_no_base_and_name_the_one_they_had(tmp_path, capsys, method):
    targets = {"lora+norms": "attention+norm", "bitfit": "conv"}.get(method, "attention+conv")
    expected = own_file(tmp_path / "in.safetensors", method, targets=targets)
    code, said = command(
        capsys, "resize", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--rank", 100
    )
    assert code == 0, said
    model = denoiser()
    adapter = da.load(model, tmp_path / "out.safetensors", strict_base=True)
    for site, change in expected.items():
        found = adapter.adapted_weight(site) - adapter.layer_states[site].base()
        assert torch.allclose(found, change, atol=1e-5)
    before, after = (da.read_metadata(tmp_path / f"{name}.safetensors")["adapter"] for name in ("in", "out"))
    assert after["base"] == before["base"]


def test_our_own_files_are_added(tmp_path, capsys):
    one = own_file(tmp_path / "one.safetensors", "lora(rank=1)", 1)
    two = own_file(tmp_path / "two.safetensors", "lora(rank=2)", 2)
    files = [f"{tmp_path / 'one.safetensors'}:2", tmp_path / "two.safetensors"]
    assert command(capsys, "combine", *files, "--out", tmp_path / "both.safetensors")[0] == 0
    adapter = da.load(denoiser(), tmp_path / "both.safetensors", strict_base=True)
    for site in one:
        found = adapter.adapted_weight(site) - adapter.layer_states[site].base()
        assert torch.allclose(found, 2 * one[site] + two[site], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        ("dora(rank=2)", "attention"),
        ("liera(rank=2)", "attention"),
        ("full", "attention"),
        ("gamma", "attention"),
        ("superlora(rank=2, projection=linear_v2, rho=0.5)", "attention"),
    ],
)
def test_our_methods_that_depend_on_the_base_are_named(tmp_path, method, targets):
    own_file(tmp_path / "in.safetensors", method, targets=targets)
    with pytest.raises(BaseNeeded, match=method.partition("(")[0]):
        open_without_base([(str(tmp_path / "in.safetensors"), 1.0)])


def test_files_of_several_formats_and_other_layers_need_a_base(tmp_path):
    kohya = str(kohya_file(tmp_path / "kohya.safetensors"))
    for name, targets in (("a", "to_q"), ("b", "to_k")):
        own_file(tmp_path / f"{name}.safetensors", "lora(rank=1)", targets=targets)
    ours = [(str(tmp_path / f"{name}.safetensors"), 1.0) for name in ("a", "b")]
    with pytest.raises(BaseNeeded, match="several formats"):
        open_without_base([ours[0], (kohya, 1.0)])
    with pytest.raises(BaseNeeded, match="changes other layers"):
        open_without_base(ours)


def test_shapes_that_no_layer_has_are_refused(tmp_path):
    tensors = {
        "lora_unet_x.lora_up.weight": torch.ones(2**15, 1),
        "lora_unet_x.lora_down.weight": torch.ones(1, 2**15),
    }
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(BaseNeeded, match="not sizes of"):
        open_without_base([(str(tmp_path / "wide.safetensors"), 1.0)])


def test_the_zeros_in_the_place_of_a_base_take_no_memory(tmp_path):
    own_file(tmp_path / "in.safetensors", "lora(rank=1)")
    opened = open_without_base([(str(tmp_path / "in.safetensors"), 1.0)])
    assert {layer.base.untyped_storage().nbytes() for layer in opened.layers()} == {4}
