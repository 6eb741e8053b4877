"""eval/benchmarks/memory_table.py: bytes of published configurations, and what fits on a card."""

from pathlib import Path

import memory_table as script
import published_bases
import pytest
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from diffadapt.training.stage_memory import StageMemory

GIB = 2**30
PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
PUBLISHED = {  # parameters of the denoiser, in billions, as their model cards and papers round them
    "PixArt-Sigma": 0.6,
    "SD 3.5 medium": 2.2,
    "FLUX.2 klein 4B": 3.9,
    "Z-Image": 6.2,
    "SD 3.5 large": 8.1,
    "Chroma": 8.9,
    "FLUX.2 klein 9B": 9.1,
    "FLUX.1": 11.9,
    "Krea 2": 12.8,
    "Qwen-Image": 20.4,
    "FLUX.2 dev": 32.2,
}


def small_base():
    def transformer():
        return PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            cross_attention_dim=16,
            use_additional_conditions=False,
        )

    return published_bases.PublishedBase(
        "small",
        "PixArtSigmaPipeline",
        {
            "transformer": transformer,
            "text_encoder": lambda: T5EncoderModel(T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2)),
            "vae": lambda: AutoencoderKL(latent_channels=4, block_out_channels=(32,)),
        },
    )


def row(train, *, captions=1, int8=0, nf4=0, blocks=4):
    stages = {
        name: StageMemory(name, int(size * GIB), 0)
        for name, size in {"encode captions": captions, "train": train, "sample": train - 1}.items()
    }
    saved = {"int8": int8 * GIB, "nf4": nf4 * GIB}
    return script.Row("a base", 10**9, stages, saved, [GIB * number for number in range(1, blocks + 1)])


def test_a_base_is_counted_from_its_configuration():
    counted = script.count(small_base(), resolution=64, rank=2)
    assert counted.parameters == sum(p.numel() for p in small_base().make().transformer.parameters())
    assert counted.stages["train"].total > 2 * counted.parameters
    assert counted.saved["nf4"] > counted.saved["int8"]
    assert counted.with_blocks(1) < counted.with_blocks(2) < counted.largest
    table = script.stage_table([counted])
    assert "| base | denoiser | encode captions | encode images | train | sample |" in table


@pytest.mark.parametrize(
    ("counted", "card", "cell"),
    [
        (row(7), 8, "bf16"),
        (row(7.5), 8, "3 blocks"),
        (row(20, int8=9, nf4=13), 12, "int8"),
        (row(20, int8=8, nf4=13), 12, "nf4"),
        (row(12.5, int8=5, nf4=6), 12, "int8 or 2 blocks"),
        (row(30), 12, "no"),
        (row(5, captions=9), 8, "bf16 †"),
    ],
)
def test_a_card_names_what_fits_and_keeps_a_reserve(counted, card, cell):
    assert script.card_cell(counted, card) == cell


def test_the_published_bases_have_their_sizes():
    text = PAGE.read_text(encoding="utf-8")
    assert [base.name for base in published_bases.BASES] == list(PUBLISHED)
    for name, billions in PUBLISHED.items():
        assert f"| {name} | {billions:.1f} B |" in text
    assert "computed, not measured" in text
