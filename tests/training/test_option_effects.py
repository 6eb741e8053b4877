"""Every option has its condition in one table; one that would change nothing is an error."""

from dataclasses import fields, replace

import pytest
from helpers.scripts import runner

from diffadapt.models.families import profiles
from diffadapt.training.adapter_options import build_method, fit_to_budget
from diffadapt.training.option_checks import ALWAYS, CONDITIONS, check_effects
from diffadapt.training.options import TrainOptions
from diffadapt.training.parsing import parse

BASE = {"pretrained_model_name_or_path": "embedded:emoji", "lr_scheduler": "constant"}
# option -> (a value, options with which it has no effect, options with which it has one)
CASES = {
    "revision": ("main", {}, {"pretrained_model_name_or_path": "someone/base"}),
    "variant": ("fp16", {}, {"pretrained_model_name_or_path": "someone/base"}),
    "alpha": (2.0, {"scale": 1.0}, {}),
    "cache_dir": ("cache", {"cache_latents": "memory"}, {"cache_latents": "disk"}),
    "text_encoder_targets": ("all", {}, {"train_text_encoder": True}),
    "text_encoder_lr": (1e-4, {}, {"train_text_encoder": True}),
    "accept_changes": ("data", {}, {"resume_from_checkpoint": "latest"}),
    "lr_warmup_steps": (50, {}, {"lr_scheduler": "constant_with_warmup"}),
    "lr_num_cycles": (3, {"lr_scheduler": "cosine"}, {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (2.0, {}, {"lr_scheduler": "polynomial"}),
    "adam_beta1": (0.8, {"optimizer": "SGD"}, {"optimizer": "AdamW"}),
    "adam_beta2": (0.8, {"optimizer": "SGD"}, {"optimizer": "prodigy"}),
    "adam_weight_decay": (0.1, {"optimizer": "Adam"}, {"optimizer": "adamw8bit"}),
    "adam_epsilon": (1e-6, {"optimizer": "SGD"}, {}),
    "ema_decay": (0.9, {}, {"use_ema": True}),
    "validation_prompt": ("a cat", None, {}),
    "logging_dir": ("logs", {}, {"report_to": "tensorboard"}),
    "hub_model_id": ("me/it", {}, {"push_to_hub": True}),
    "hub_private": (True, {}, {"push_to_hub": True}),
    "offload_blocks": (2, {"shard_base": True}, {}),
    "text_encoder_device": ("cpu", {"train_text_encoder": True}, {}),
    "class_data_dir": ("dogs", {}, {"with_prior_preservation": True}),
    "prior_loss_weight": (0.5, {}, {"with_prior_preservation": True}),
    "num_class_images": (7, {}, {"with_prior_preservation": True}),
    "dataset_config_name": ("digits", {"train_data_dir": "x"}, {"dataset_name": "x"}),
    "split": ("digits", {"train_data_dir": "x"}, {"dataset_name": "x"}),
    "label_column": ("digit", {"train_data_dir": "x"}, {"dataset_name": "x"}),
    "shuffle_buffer": (7, {"dataset_name": "x"}, {"dataset_name": "x", "streaming": True}),
}


def script_options(monkeypatch):
    """The option classes of the three scripts."""
    import sys

    kinds = []
    for name in ("dreambooth", "style_transfer", "class_conditional"):
        runner(name, monkeypatch)
        kinds.append(sys.modules[name].Options)
    return kinds


def test_every_option_of_every_script_is_in_the_table_once(monkeypatch):
    names = {field.name for kind in script_options(monkeypatch) for field in fields(kind)}
    assert names == ALWAYS | CONDITIONS.keys()
    assert not ALWAYS & CONDITIONS.keys()
    assert CASES.keys() == CONDITIONS.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_option_has_its_effect_or_is_an_error(monkeypatch, name):
    value, without, enough = CASES[name]
    kinds = [kind for kind in script_options(monkeypatch) if name in kind.__dataclass_fields__]
    words = next((kind for kind in kinds if kind.__name__ and not hasattr(kind(), "class_labels")), kinds[0])
    check_effects(words(**{**BASE, **enough, name: value}))
    if without is None:  # of a script that is conditioned on classes
        words, without = kinds[-1], {}
    options = words(**{**BASE, **without})
    check_effects(options)
    with pytest.raises(ValueError, match=f"--{name} .* has no effect: it needs "):
        check_effects(replace(options, **{name: value}))


def test_what_a_family_sets_by_default_is_not_held_against_a_person():
    steps = profiles()["sd"].defaults["num_inference_steps"]
    check_effects(TrainOptions(**BASE, num_validation_images=0, num_inference_steps=steps), profiles()["sd"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"adapter": "lora(rank=3)", "rank": 8},
            "rank 8 has no effect: .* sets rank itself",
        ),
        ({"adapter": "lora(alpha=2)", "alpha": 8.0}, "alpha 8.0 has no effect"),
        (
            {"adapter": "lora", "rank": 8, "adapter_options": "rank=3"},
            "--rank 8 and --adapter_options rank",
        ),
        ({"adapter": "lora(rank=3)", "adapter_options": "rank=4"}, "rank 4 has no effect"),
    ],
)
def test_options_of_the_adapter_that_contradict_each_other_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        build_method(TrainOptions(**BASE, **given))


def test_a_part_that_does_not_set_it_takes_the_rank():
    method = build_method(TrainOptions(**BASE, adapter="lora(rank=3)+flora", rank=8))
    assert [part.rank for part in method.members] == [3, 8]


@pytest.mark.parametrize("adapter", ["1lora", "bitfit", "full", "1lora+norms", "peft:LOHA"])
def test_a_budget_for_a_method_without_a_rank_says_so(adapter):
    from helpers.pipelines import tiny_unet

    options = TrainOptions(**BASE, adapter=adapter, param_budget="5k", targets="attention")
    with pytest.raises(ValueError, match="has no rank to choose, so a budget does not apply"):
        fit_to_budget(options, None, tiny_unet())


def test_a_number_of_a_file_can_be_taken_back(tmp_path):
    (tmp_path / "a.yaml").write_text("rank: 4\nlearning_rate: 1e-3\nparam_budget: 5k\n", encoding="utf-8")
    taken = ["--rank", "none", "--learning_rate", "none", "--param_budget", "none"]
    options = parse(TrainOptions, ["--config", str(tmp_path / "a.yaml"), *taken])
    assert (options.rank, options.learning_rate, options.param_budget) == (None, None, None)


def test_home_folders_and_the_word_no(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("mixed_precision: no\noutput_dir: ~/out\n", encoding="utf-8")
    options = parse(TrainOptions, ["--config", "~/a.yaml", "--cache_dir=~/cache"])
    assert options.mixed_precision == "no"
    assert options.output_dir == str(tmp_path / "out")
    assert options.cache_dir == str(tmp_path / "cache")


def test_epochs_are_answered_with_how_to_count_steps():
    with pytest.raises(ValueError, match="counted in optimizer steps here; give --max_train_steps"):
        parse(TrainOptions, ["--num_train_epochs", "3"])


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("sd3", "snr_gamma", 5.0),
        ("sd3", "prediction_type", "epsilon"),
        ("flux", "noise_offset", 0.1),
        ("sd", "timestep_density", "uniform"),
        ("sdxl", "timestep_shift", "3"),
        ("pixart_sigma", "timestep_density", "uniform"),
    ],
)
def test_options_of_the_other_kind_of_schedule_say_why_they_do_not_apply(family, option, value):
    profile = profiles()[family]
    check_effects(TrainOptions(**BASE), profile)
    with pytest.raises(ValueError, match=f"--{option} {value}: .*flow|--{option} {value}: .*betas"):
        check_effects(TrainOptions(**BASE, **{option: value}), profile)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_clip_can_be_trained(family):
    check_effects(TrainOptions(**BASE, train_text_encoder=True), profiles()[family])


@pytest.mark.parametrize(
    "family", ["flux2_klein", "flux2_dev", "qwen_image", "z_image", "krea2", "chroma", "pixart_sigma"]
)
def test_a_language_model_cannot_be_trained(family):
    with pytest.raises(ValueError, match=r"--train_text_encoder True: .* with a language model"):
        check_effects(TrainOptions(**BASE, train_text_encoder=True), profiles()[family])
