"""Every parameter count printed in the papers that follows from shapes."""

import pytest
import torch
from helpers.layer_lists import (
    CONVNEXT_V2_B,
    CONVNEXT_V2_L,
    convnext_v2,
    deberta_v3,
    depth_anything_vit_l,
    dit_xl_2,
    llama,
    vit_b_hf,
)

import diffadapt as da
from diffadapt.adapters.budget import count_parameters

NO_EMBEDDERS = "linear+!t_embedder.*"
LLAMA_LINEARS = "linear+!lm_head"
LLAMA_FIVE = "*.q_proj+*.k_proj+*.v_proj+*.up_proj+*.down_proj"
LLAMA_QKV = "*.q_proj+*.k_proj+*.v_proj"
MORA = "mora(rank=1, type={}, sized_like=1lora)"
LORALIB = "conv_reshape=loralib"
ADDED_BIASES = "difffit(gamma=false, norms=false, class_embedding=false)"  # BitFit where there are none
MODELS = {
    "DiT-XL/2": dit_xl_2,
    "ViT-B": vit_b_hf,
    "Depth-Anything-L": depth_anything_vit_l,
    "DeBERTaV3-base": deberta_v3,
    "DeBERTaV3-large": lambda: deberta_v3(1024, 24),
    "LLaMA-7B": llama,
    "LLaMA-13B": lambda: llama(5120, 13824, 40),
    "LLaMA3-8B": lambda: llama(4096, 14336, 32, key_width=1024),
    "ConvNeXt-V2-L": lambda: convnext_v2(CONVNEXT_V2_L),
    "ConvNeXt-V2-B": lambda: convnext_v2(CONVNEXT_V2_B),
}
COUNTS = [  # model, method, targets, count
    # 1LoRA, table of DiT-XL/2 on Food-101; every row with the class table of 101 + 1 rows
    ("DiT-XL/2", "1lora+class_embedding", NO_EMBEDDERS, 603_680),
    ("DiT-XL/2", "bitfit+class_embedding", NO_EMBEDDERS, 603_680),
    ("DiT-XL/2", "lora(rank=1)+class_embedding", NO_EMBEDDERS, 864_032),
    ("DiT-XL/2", "vera(rank=1)+class_embedding", NO_EMBEDDERS, 603_822),
    ("DiT-XL/2", f"{MORA.format(1)}+class_embedding", NO_EMBEDDERS, 604_412),
    ("DiT-XL/2", f"{MORA.format(6)}+class_embedding", NO_EMBEDDERS, 596_516),
    ("DiT-XL/2", "difffit", NO_EMBEDDERS, 1_089_856),
    # 1LoRA, tables S9, S10 and S12: ViT-B; the printed counts are four times these
    ("ViT-B", "1lora", "linear", 331_776 // 4),
    ("ViT-B", "bitfit", "linear", 331_776 // 4),
    ("ViT-B", "gamma", "linear", 331_776 // 4),
    ("ViT-B", "lora(rank=1)", "linear", 663_552 // 4),
    ("ViT-B", "vera(rank=1)", "linear", 332_064 // 4),
    ("ViT-B", "dora(rank=1)", "linear", 995_328 // 4),
    ("ViT-B", MORA.format(1), "linear", 333_360 // 4),
    ("ViT-B", MORA.format(6), "linear", 328_128 // 4),
    ("ViT-B", "norms", "norm", 153_600 // 4),
    ("ViT-B", "1lora+norms", "linear", 485_376 // 4),
    ("ViT-B", "difffit", "linear", 817_152 // 4),
    ("ViT-B", "1lora+bitfit", "linear", 663_552 // 4),
    ("ViT-B", "1lora+gamma", "linear", 663_552 // 4),
    ("ViT-B", "1lora+bitfit+norms", "linear", 817_152 // 4),
    ("ViT-B", "1lora+bitfit+gamma", "linear", 995_328 // 4),
    ("ViT-B", "1lora+gamma+norms", "linear", 817_152 // 4),
    ("ViT-B", "1lora+difffit", "linear", 1_148_928 // 4),
    # 1LoRA, tables S2 to S5 and S11: the encoder of Depth Anything
    ("Depth-Anything-L", "1lora", "linear", 221_184),
    ("Depth-Anything-L", "bitfit", "linear", 221_184),
    ("Depth-Anything-L", "lora(rank=1)", "linear", 393_216),
    ("Depth-Anything-L", "vera(rank=1)", "linear", 221_280),
    ("Depth-Anything-L", "dora(rank=1)", "linear", 614_400),
    ("Depth-Anything-L", MORA.format(1), "linear", 220_056),
    ("Depth-Anything-L", MORA.format(6), "linear", 217_440),
    ("Depth-Anything-L", "norms", "norm", 100_352),
    ("Depth-Anything-L", "difffit(gamma=false)", "linear", 321_536),
    ("Depth-Anything-L", "gamma", "linear", 221_184),
    ("Depth-Anything-L", "1lora+bitfit", "linear", 442_368),
    ("Depth-Anything-L", "1lora+norms", "linear", 321_536),
    ("Depth-Anything-L", "1lora+gamma", "linear", 442_368),
    ("Depth-Anything-L", "1lora+bitfit+norms", "linear", 542_720),
    ("Depth-Anything-L", "1lora+bitfit+gamma", "linear", 663_552),
    ("Depth-Anything-L", "1lora+gamma+norms", "linear", 542_720),
    ("Depth-Anything-L", "1lora+difffit", "linear", 763_904),
    # 1LoRA, tables S6 and S7: LLaMA-2
    ("LLaMA-7B", "1lora", LLAMA_LINEARS, 1_359_872),
    ("LLaMA-7B", ADDED_BIASES, LLAMA_LINEARS, 1_359_872),
    ("LLaMA-7B", "lora(rank=1)", LLAMA_LINEARS, 2_498_560),
    ("LLaMA-7B", "vera(rank=1)", LLAMA_LINEARS, 1_360_096),
    ("LLaMA-7B", MORA.format(1), LLAMA_LINEARS, 1_360_960),
    ("LLaMA-7B", MORA.format(6), LLAMA_LINEARS, 1_347_584),
    ("LLaMA-7B", "lora(rank=1)", LLAMA_QKV, 786_432),
    ("LLaMA-13B", "1lora", LLAMA_LINEARS, 2_129_920),
    ("LLaMA-13B", ADDED_BIASES, LLAMA_LINEARS, 2_129_920),
    ("LLaMA-13B", "lora(rank=1)", LLAMA_QKV, 1_228_800),
    # FLoRA and LieRA on GLUE; their scripts also adapt attention.output
    ("DeBERTaV3-base", "lora(rank=2)", "linear", 331_776),
    ("DeBERTaV3-base", "lora(rank=8)", "linear", 1_327_104),
    ("DeBERTaV3-base", "liera(rank=2)", "linear", 331_776),
    ("DeBERTaV3-base", "flora(rank=2)", "linear", 332_064),
    ("DeBERTaV3-base", "flora(rank=8)", "linear", 1_331_712),
    ("DeBERTaV3-base", "dora(rank=2)", "linear", 414_720),
    ("DeBERTaV3-base", "dora(rank=8)", "linear", 1_410_048),
    ("DeBERTaV3-base", "bitfit", "linear", 82_944),
    ("DeBERTaV3-large", "lora(rank=2)", "linear", 884_736),
    ("DeBERTaV3-large", "lora(rank=8)", "linear", 3_538_944),
    # FLoRA and LieRA on LLaMA: q, k, v, up, down
    ("LLaMA-7B", "lora(rank=1)", LLAMA_FIVE, 1_753_088),
    ("LLaMA-7B", "liera(rank=16)", LLAMA_FIVE, 28_049_408),
    ("LLaMA-7B", "liera(rank=32)", LLAMA_FIVE, 56_098_816),
    ("LLaMA3-8B", "lora(rank=1)", LLAMA_FIVE, 1_769_472),
    ("LLaMA3-8B", "dora(rank=16)", LLAMA_FIVE, 29_097_984),
    ("LLaMA3-8B", "liera(rank=32)", LLAMA_FIVE, 56_623_104),
    # FLoRA, ConvNeXt-V2-L; LieRA, ConvNeXt-V2-B on COCO
    ("ConvNeXt-V2-L", "bitfit", "all", 165_312),
    ("ConvNeXt-V2-L", f"lora(rank=1, {LORALIB})", "all", 1_618_260),
    ("ConvNeXt-V2-L", f"lora(rank=8, {LORALIB})", "all", 12_946_080),
    ("ConvNeXt-V2-L", f"lora(rank=16, {LORALIB})", "all", 25_892_160),
    ("ConvNeXt-V2-L", f"lora(rank=32, {LORALIB})", "all", 51_784_320),
    ("ConvNeXt-V2-L", f"dora(rank=32, {LORALIB})", "all", 51_949_632),
    ("ConvNeXt-V2-L", "flora(rank=80, kernel_rank=2)", "all", 25_650_248),
    ("ConvNeXt-V2-L", "flora(rank=41, kernel_rank=2)", "all", 12_775_295),
    ("ConvNeXt-V2-L", "flora(rank=128, kernel_rank=1)", "all", 40_498_572),
    ("ConvNeXt-V2-L", "flora(rank=160, kernel_rank=1)", "all", 51_196_524),
    ("ConvNeXt-V2-B", f"liera(rank=1, {LORALIB})", "conv", 898_964),
    ("ConvNeXt-V2-B", f"liera(rank=16, {LORALIB})", "all", 17_271_104),
    ("ConvNeXt-V2-B", f"liera(rank=32, {LORALIB})", "all", 34_542_208),
]


@pytest.fixture(scope="module")
def models():
    return {name: build() for name, build in MODELS.items()}


@pytest.mark.parametrize(
    ("model", "method", "targets", "count"),
    COUNTS,
    ids=[f"{model}-{method}-{count}".replace(" ", "") for model, method, _, count in COUNTS],
)
@pytest.mark.slow
def test_a_printed_count_is_reproduced(models, model, method, targets, count):
    assert count_parameters(models[model], da.make_method(method), targets).total == count


def test_the_closed_form_of_flora_on_convnext_holds_for_every_rank(models):
    for rank in (1, 3, 8, 41, 80, 200):
        for kernel_rank in (1, 2):
            expected = rank**2 * (40 * kernel_rank**2 + 72) + 302_055 * rank + 524 * kernel_rank
            method = da.FLoRA(rank=rank, kernel_rank=kernel_rank)
            assert count_parameters(models["ConvNeXt-V2-L"], method, "all").total == expected


def test_liera_on_vtab_is_within_a_hundredth_of_a_million(models):
    head = 1024 * 100 + 100  # a hundred classes; no single number of classes fits all four roundings
    for rank, printed in ((2, 1.90), (4, 3.70), (8, 7.30), (16, 14.48)):
        method = da.LieRA(rank=rank, conv_reshape="loralib")
        total = count_parameters(models["ConvNeXt-V2-B"], method, "conv").total + head
        assert abs(total / 1e6 - printed) < 0.0101


@pytest.mark.parametrize(
    ("model", "method", "base", "printed", "digits"),
    [
        ("LLaMA-7B", "lora(rank=16)", 6_738_415_616, 0.42, 2),
        ("LLaMA-7B", "lora(rank=32)", 6_738_415_616, 0.83, 2),
        ("LLaMA3-8B", "lora(rank=16)", 8_030_261_248, 0.35, 2),
        ("LLaMA3-8B", "flora(rank=16)", 8_030_261_248, 0.353, 3),
        ("LLaMA3-8B", "dora(rank=16)", 8_030_261_248, 0.36, 2),
        ("LLaMA3-8B", "liera(rank=32)", 8_030_261_248 + 56_623_104, 0.70, 2),
    ],
)
def test_printed_percentages_of_llama(models, model, method, base, printed, digits):
    total = count_parameters(models[model], da.make_method(method), LLAMA_FIVE).total
    assert round(100 * total / base, digits) == printed


@pytest.fixture(scope="module")
def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=101,
        )


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("1lora+class_embedding", 486_176 + 117_504),  # the sum of outputs does not see how they are split
        ("bitfit+class_embedding", 486_176 + 117_504),
        ("lora(rank=1)+class_embedding", 811_040 + 117_504),  # an input side each for q, k and v
        ("vera(rank=1)+class_embedding", 603_878),  # 198 layers instead of 142
        (f"{MORA.format(1)}+class_embedding", 604_048),
        (f"{MORA.format(6)}+class_embedding", 599_428),
        ("difffit", 1_089_856),
    ],
)
def test_the_same_on_the_dit_of_diffusers_which_splits_queries_keys_and_values(diffusers_dit, method, count):
    targets = "linear+!*.timestep_embedder.*"
    assert count_parameters(diffusers_dit, da.make_method(method), targets).total == count


def test_the_dit_of_diffusers_copies_its_embedders_into_every_block(diffusers_dit):
    everything = count_parameters(diffusers_dit, da.OneLoRA(), "linear")
    tables = count_parameters(diffusers_dit, da.ClassEmbedding(), "class_embedding")
    assert everything.total == 486_176 + 28 * (1152 + 1152)
    assert tables.total == 117_504
    assert sum(sites for _, sites, _ in tables.blocks) == 28
    assert count_parameters(diffusers_dit, da.Full(), "class_embedding").total == 28 * 117_504
