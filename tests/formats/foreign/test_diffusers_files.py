"""Files that diffusers writes, in its spellings of all years, and names of SD and SDXL."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.foreign_cases import TOLERANCE, check_every_format, error, output, shake, unet
from helpers.pipelines import tiny_sd_pipeline, tiny_unet
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.formats.foreign.layer_names import LayerNames
from diffadapt.formats.sgm_names import sgm_path

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


def opened(base):
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(pipe):
    with torch.no_grad():
        return pipe.text_encoder(torch.arange(24)[None]).last_hidden_state


def written(folder, base, *, metadata: bool, with_text: bool = True, **options):
    """A file by ``save_lora_weights``, and what the pipeline that diffusers adapted gives."""
    pipe = opened(base)
    plain = output(pipe.unet)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, **options)
    )
    layers = {"unet_lora_layers": peft.get_peft_model_state_dict(pipe.unet)}
    if with_text:
        pipe.text_encoder.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=TEXT_TARGETS))
        shake([p for p in pipe.text_encoder.parameters() if p.requires_grad])
        layers["text_encoder_lora_layers"] = peft.get_peft_model_state_dict(pipe.text_encoder)
    if metadata:
        from diffusers.training_utils import _collate_lora_metadata

        modules = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if with_text else {})
        layers |= _collate_lora_metadata(modules)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    fresh = opened(base)
    fresh.load_lora_weights(folder)
    return plain, output(fresh.unet), states(fresh), states(pipe)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_of_diffusers_gives_its_outputs(tmp_path, base, metadata):
    plain, theirs, their_states, trained = written(tmp_path, base, metadata=metadata)
    pipe = opened(base)
    da.load(pipe, tmp_path)
    assert error(output(pipe.unet), theirs, plain) < TOLERANCE
    assert torch.allclose(states(pipe), their_states, atol=1e-5)
    assert torch.allclose(states(pipe), trained, atol=1e-5)


def test_dora_of_diffusers_is_kept(tmp_path, base):
    plain, theirs, *_ = written(tmp_path, base, metadata=True, with_text=False, use_dora=True)
    model = UNet2DConditionModel.from_pretrained(base / "unet").eval()
    da.load(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert error(output(model), theirs, plain) < TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_diffusers_can_be_written_for_every_program(tmp_path, base, dora):
    written(tmp_path / "in", base, metadata=True, with_text=False, use_dora=dora)
    check_every_format(
        tmp_path / "in", lambda: UNet2DConditionModel.from_pretrained(base / "unet").eval(), tmp_path
    )


def test_both_models_of_a_file_of_diffusers_go_to_every_format(tmp_path, base):
    _, unets, texts, _ = written(tmp_path / "in", base, metadata=True)
    pipe = opened(base)
    adapter = da.load(pipe, tmp_path / "in")
    for to in ("kohya", "diffusers"):
        da.export(adapter, tmp_path / f"{to}.safetensors", to=to)
        again = opened(base)
        da.load(again, tmp_path / f"{to}.safetensors")
        assert torch.allclose(output(again.unet), unets, atol=1e-4)
        assert torch.allclose(states(again), texts, atol=1e-4)
    da.export(adapter, tmp_path / "merged", to="merged")
    merged = opened(tmp_path / "merged")
    assert torch.allclose(output(merged.unet), unets, atol=1e-4)
    assert torch.allclose(states(merged), texts, atol=1e-4)


SPELLINGS = {
    "layers of 2024": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "attention processors": lambda key: (
        key.replace(".to_out.0.", ".to_out.")
        .replace(".to_", ".processor.to_")
        .replace(".lora_A.", "_lora.down.")
        .replace(".lora_B.", "_lora.up.")
    ),
    "without a component": lambda key: key.removeprefix("unet."),
    "PEFT's prefix": lambda key: "base_model.model." + key.removeprefix("unet."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_older_spellings_are_the_same_adapter(tmp_path, spelling):
    model = unet()
    wanted = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=wanted, init_lora_weights=False))
    plain, theirs = output(unet()), output(model)
    state = {f"unet.{key}": value for key, value in peft.get_peft_model_state_dict(model).items()}
    save_file({SPELLINGS[spelling](key): value for key, value in state.items()}, tmp_path / "old.safetensors")
    fresh = unet()
    da.load(fresh, tmp_path / "old.safetensors")
    assert error(output(fresh), theirs, plain) < TOLERANCE


def test_text_layers_of_older_files_are_found(tmp_path, base):
    pipe = opened(base)
    path = "text_encoder.text_model.encoder.layers.0.self_attn"
    old = {
        f"{path}.to_q_lora.down.weight": torch.ones(2, 32),
        f"{path}.to_q_lora.up.weight": torch.ones(32, 2),
        f"{path}.out_proj.lora_linear_layer.down.weight": torch.ones(2, 32),
        f"{path}.out_proj.lora_linear_layer.up.weight": torch.ones(32, 2),
    }
    save_file(old, tmp_path / "old.safetensors")
    adapter = da.load(pipe, tmp_path / "old.safetensors")
    ends = sorted(site.name.rsplit(".", 1)[1] for site in adapter.sites)
    assert ends == ["out_proj", "q_proj"]


def test_a_text_encoder_in_a_kohya_file_is_found(tmp_path, base):
    pipe = opened(base)
    for prefix in ("lora_te_", "lora_te1_"):
        name = f"{prefix}text_model_encoder_layers_1_mlp_fc1"
        file = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(64, 2)}
        save_file(file, tmp_path / "te.safetensors")
        adapter = da.load(pipe, tmp_path / "te.safetensors")
        assert adapter.sites[0].name.endswith("layers.1.mlp.fc1")
        da.detach(adapter)


def xl_unet():
    """The block layout of SDXL's U-Net, tiny."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=8,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    )


def test_sgm_names_are_those_of_diffusers_own_conversion():
    """Every attention layer through the table diffusers uses for kohya's SDXL files."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    model = xl_unet()
    paths = [
        name
        for name, _ in model.named_modules()
        if name.endswith((".to_q", ".to_v", ".proj_in", ".proj_out"))
    ]
    flat = {f"lora_unet_{sgm_path(path, 2).replace('.', '_')}.lora_down.weight": path for path in paths}
    state = dict.fromkeys(flat, torch.zeros(1))
    converted = _maybe_map_sgm_blocks_to_diffusers(dict(state), model.config)
    assert len(converted) == len(paths)
    renamed = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    for theirs, ours in renamed.items():  # diffusers does this in its next step
        converted = {key.replace(theirs, ours): value for key, value in converted.items()}
    expected = {f"lora_unet_{path.replace('.', '_')}.lora_down.weight" for path in paths}
    assert set(converted) == expected


@pytest.mark.parametrize(
    ("sgm", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_1_norm", "up_blocks.1.attentions.2.norm"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_names_of_the_original_unet_are_found(sgm, path):
    """Places as in the original SDXL checkpoint, whose table diffusers' converter prints."""
    names = LayerNames({"unet": xl_unet()})
    assert names.find(f"lora_unet_{sgm}") == ("unet", path)
    assert names.find(f"lora_unet_{path.replace('.', '_')}") == ("unet", path)


def test_the_upsampler_behind_a_block_without_attention_is_in_its_second_place():
    names = LayerNames({"unet": tiny_unet()})  # output_blocks: (0, 1 with upsampler) (2, 3)
    assert names.find("lora_unet_output_blocks_1_1_conv") == ("unet", "up_blocks.0.upsamplers.0.conv")


def test_our_own_exports_open_again(tmp_path, base):
    for method in ("lora", "flora", "loha", "lokr", "dora", "full+norms"):
        pipe = opened(base)
        adapter = da.attach(pipe, da.make_method(method), "conv1+attention")
        shake(adapter.parameters())
        live = output(pipe.unet)
        da.export(adapter, tmp_path / "kohya.safetensors", to="kohya")
        fresh = opened(base)
        da.load(fresh, tmp_path / "kohya.safetensors")
        assert torch.allclose(output(fresh.unet), live, atol=1e-4), method


def test_a_file_without_any_known_key_says_so(tmp_path):
    save_file({"lora_unet_conv_in.lora_A.weight.extra": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="extra"):
        da.load(unet(), tmp_path / "odd.safetensors")


def test_half_precision_files_open(tmp_path):
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(32, 1, 1, 1),
    }
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    adapter = da.load(unet(), tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert load_file(tmp_path / "half.safetensors")["lora_unet_conv_in.lora_up.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_conv_in.oft_blocks", "OFT or BOFT"),
        ("lora_unet_conv_in.oft_diag", "OFT"),
        ("unet.conv_in.oft_R.weight", "OFT"),
        ("unet.conv_in.boft_R", "BOFT"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("lora_unet_conv_in.on_input", "IA3"),
        ("emb_params", "textual inversion"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
    ],
)
@pytest.mark.parametrize("beside", ["lora_unet_conv_in.alpha", "unet.conv_in.lora_A.weight"])
def test_kinds_of_files_that_are_not_opened_are_named(tmp_path, key, kind, beside):
    path = tmp_path / "other.safetensors"
    tensors = {key: torch.ones(1)}
    if beside.endswith("alpha"):
        tensors[beside] = torch.ones(1)
    else:
        tensors |= {beside: torch.ones(2, 4, 3, 3), beside.replace("_A", "_B"): torch.ones(32, 2, 1, 1)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"other\.safetensors holds {kind} .*{key}.*not supported"):
        da.load(unet(), path)


def test_the_prefix_of_other_trainers_for_the_denoiser_is_read(tmp_path):
    path, model = tmp_path / "trainer.safetensors", unet()
    adapter = da.attach(model, da.LoRA(rank=2), "attention")
    shake(adapter.parameters())
    live = output(model)
    tensors = {}
    for site, own in zip(adapter.sites, adapter.parts[0].tensors, strict=True):
        tensors[f"diffusion_model.{site.name}.lora_A.weight"] = own["down"].detach().clone()
        tensors[f"diffusion_model.{site.name}.lora_B.weight"] = own["up"].detach().clone()
    save_file(tensors, path)
    fresh = unet()
    da.load(fresh, path)
    assert torch.allclose(output(fresh), live, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "diffusion_model.single_blocks.3.linear1",
        "transformer.double_blocks.0.img_attn.qkv",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
    ],
)
def test_names_of_original_transformers_are_no_layers_of_a_unet(tmp_path, layer):
    path = tmp_path / "fused.safetensors"
    factors = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(24, 2)}
    save_file({f"{layer}.{key}.weight": value for key, value in factors.items()}, path)
    with pytest.raises(ValueError, match=r"original code of FLUX and SD3.*a base of the family"):
        da.load(unet(), path)
