"""Folders that PEFT writes: same outputs here as there."""

import json

import pytest
import torch
from helpers.foreign_cases import TOLERANCE, check_every_format, error, output, shake, unet

import diffadapt as da

peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WITH_CONV = [*ATTENTION, "conv1", "conv2", "conv_in"]
KINDS = {
    "LoRA": (peft.LoraConfig, {"r": 2, "lora_alpha": 5, "target_modules": WITH_CONV}),
    "rank-stabilised": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION},
    ),
    "patterns": (
        peft.LoraConfig,
        {
            "r": 2,
            "lora_alpha": 4,
            "rank_pattern": {"to_q": 3, "down_blocks.*to_k": 1},
            "alpha_pattern": {"to_v": 7},
            "target_modules": WITH_CONV,
        },
    ),
    "DoRA": (peft.LoraConfig, {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": WITH_CONV}),
    "biases": (peft.LoraConfig, {"r": 2, "bias": "lora_only", "target_modules": WITH_CONV}),
    "bias of the branch": (
        peft.LoraConfig,
        {"r": 2, "lora_bias": True, "target_modules": ["to_out.0", "conv1"]},
    ),
    "whole modules": (
        peft.LoraConfig,
        {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["conv_out"]},
    ),
    "LoHa": (peft.LoHaConfig, {"r": 2, "alpha": 3, "target_modules": WITH_CONV}),
    "LoHa, Tucker": (
        peft.LoHaConfig,
        {"r": 2, "alpha": 3, "use_effective_conv2d": True, "target_modules": WITH_CONV},
    ),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 3, "target_modules": WITH_CONV}),
    "LoKr, Tucker": (
        peft.LoKrConfig,
        {"r": 2, "alpha": 3, "use_effective_conv2d": True, "target_modules": WITH_CONV},
    ),
    "LoKr, both decomposed": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 8, "target_modules": ATTENTION},
    ),
    "LoKr, whole factors": (peft.LoKrConfig, {"r": 64, "alpha": 32, "target_modules": ATTENTION}),
    "VeRA": (peft.VeraConfig, {"r": 6, "target_modules": ATTENTION}),
}


def written(folder, kind):
    """A folder of PEFT, the outputs of the bare model, and those PEFT computes."""
    cls, options = KINDS[kind]
    model = unet()
    base = output(model)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, cls(**options)).eval()
    shake([p for p in wrapped.parameters() if p.requires_grad])
    theirs = output(wrapped.base_model.model)
    wrapped.save_pretrained(folder)
    return base, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_folder_of_peft_gives_its_outputs_and_survives_our_file(tmp_path, kind):
    base, theirs = written(tmp_path, kind)
    model, again = unet(), unet()
    adapter = da.load(model, tmp_path)
    assert error(output(model), theirs, base) < TOLERANCE
    da.save(adapter, tmp_path / "ours.safetensors")
    da.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("kind", ["patterns", "DoRA", "biases", "LoHa, Tucker", "LoKr, Tucker", "VeRA"])
@pytest.mark.slow
def test_what_was_opened_can_be_written_for_every_program(tmp_path, kind):
    written(tmp_path / "peft", kind)
    check_every_format(tmp_path / "peft", unet, tmp_path)


def test_the_tensors_may_be_named_instead_of_the_folder(tmp_path):
    base, theirs = written(tmp_path, "rank-stabilised")
    model = unet()
    da.load(model, tmp_path / "adapter_model.safetensors")
    assert error(output(model), theirs, base) < TOLERANCE


def changed(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | options), encoding="utf-8")


def test_other_types_are_refused_with_what_to_do(tmp_path):
    written(tmp_path, "LoRA")
    changed(tmp_path, peft_type="BOFT")
    with pytest.raises(ValueError, match="peft:BOFT"):
        da.load(unet(), tmp_path)


def test_options_that_change_the_meaning_are_refused(tmp_path):
    written(tmp_path, "LoRA")
    changed(tmp_path, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        da.load(unet(), tmp_path)


def test_a_start_that_changed_the_base_is_refused(tmp_path):
    written(tmp_path, "LoRA")
    changed(tmp_path, init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        da.load(unet(), tmp_path)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    written(tmp_path, "LoRA")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        da.load(unet(), tmp_path)
    with pytest.raises(ValueError, match="convert it to safetensors"):
        da.load(unet(), tmp_path / "adapter_model.bin")


def test_a_folder_without_an_adapter_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        da.load(unet(), tmp_path)
