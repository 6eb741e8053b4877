"""Options: the command line wins over the file, the file over defaults; mistakes name what was meant."""

from dataclasses import dataclass, fields

import pytest
from helpers.pipelines import tiny_unet

import diffadapt as da
from diffadapt.methods.parse_method import make_method
from diffadapt.models.families import profiles
from diffadapt.training.adapter_options import build_method, fit_to_budget, text_encoder_targets
from diffadapt.training.base_defaults import complete_options, fill_missing
from diffadapt.training.option_checks import check_effects, check_ranges, check_text_encoder_lr
from diffadapt.training.options import TrainOptions, option
from diffadapt.training.parsing import DIFFUSERS_ALIASES, parse, parse_pairs, read_config, write_config


@dataclass(frozen=True)
class Options(TrainOptions):
    """Subject images"""

    instance_data_dir: str | None = option(None, "pictures")
    instance_prompt: str | None = option(None, "prompt")


DEMO = {"pretrained_model_name_or_path": "embedded:emoji", "instance_data_dir": "x", "instance_prompt": "a y"}


@pytest.fixture
def base(tmp_path):
    """A folder that is a pipeline as far as its index says."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8"
    )
    return str(tmp_path / "base")


def choose(**given):
    return complete_options(Options(**given), DEMO, data="instance_data_dir", command="THE COMMAND")


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "max_train_steps: 7\nlearning_rate: 1e-4\ncenter_crop: true\nseed: 3\n", encoding="utf-8"
    )
    options = parse(Options, ["--config", str(tmp_path / "a.yaml"), "--seed", "5", "--no-center_crop"])
    assert (options.max_train_steps, options.learning_rate, options.seed) == (7, 1e-4, 5)
    assert options.center_crop is False


def test_what_was_written_can_be_read_back(tmp_path):
    options = fill_missing(choose(adapter="flora(rank=3)", learning_rate=1e-3), {"resolution": 64})
    write_config(options, tmp_path)
    assert Options(**read_config(Options, tmp_path / "config.yaml")) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat' .* did you mean learning_rate"),
        ("seed: many", "seed in .* must be of type int, got 'many'"),
        ("lr_scheduler: cosin", "lr_scheduler in .* must be one of constant"),
        ("just text", "must hold lines of the form"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("adapter: &a lora\ntargets: *a", "aliases"),
        ("a: " + "[" * 20_000, "nests deeper"),
        ("seed: 010", "YAML reads 010 as 8; write the number in decimal"),
        ("max_train_steps: 1:30", "YAML reads 1:30 as 90"),
        ("adapter_options: 'rank=2'\nclass_labels: 010", "YAML reads 010 as 8; .* or a text in quotes"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(Options, ["--config", str(tmp_path / "a.yaml")])


def test_zeros_and_texts_in_quotes_are_what_they_say(tmp_path):
    text = "seed: 0\nlr_warmup_steps: -0\nnoise_offset: 0.05\noutput_dir: '010'\nlearning_rate: 1e-4\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    options = parse(Options, ["--config", str(tmp_path / "a.yaml")])
    assert (options.seed, options.lr_warmup_steps, options.noise_offset) == (0, 0, 0.05)
    assert options.output_dir == "010"


def test_neither_base_nor_data_is_the_demonstration():
    options = choose()
    assert options.pretrained_model_name_or_path == "embedded:emoji"
    assert options.max_train_steps == profiles()["emoji"].defaults["max_train_steps"]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"pretrained_model_name_or_path": "base"}, "--instance_data_dir and --instance_prompt are missing"),
        ({"instance_data_dir": "mine", "instance_prompt": "a"}, "--pretrained_model_name_or_path is missing"),
        ({"pretrained_model_name_or_path": "b", "instance_data_dir": "m"}, "--instance_prompt is missing"),
    ],
)
def test_one_without_the_other_is_an_error_with_the_full_command(given, missing):
    with pytest.raises(ValueError, match=f"{missing}.*(.|\n)*THE COMMAND"):
        choose(**given)


def test_what_was_tuned_on_the_embedded_base_never_reaches_another(base):
    options = choose(pretrained_model_name_or_path=base, instance_data_dir="m", instance_prompt="p")
    assert options.max_train_steps == profiles()["sd"].defaults["max_train_steps"]
    assert options.targets == "attention"


def test_the_method_takes_options_from_everywhere(base):
    embedded = {"pretrained_model_name_or_path": "embedded:emoji"}
    method = build_method(
        Options(adapter="flora", rank=6, adapter_options="kernel_rank=3,init=gaussian", **embedded)
    )
    assert (method.rank, method.kernel_rank, method.init) == (6, 3, "gaussian")
    assert build_method(Options(adapter="flora(rank=5)", **embedded)).rank == 5
    assert (
        build_method(Options(adapter="lora", **embedded)).rank
        == profiles()["emoji"].tuned_methods["lora"]["rank"]
    )
    assert build_method(Options(adapter="vera", **embedded)) == make_method("vera")
    assert build_method(Options(adapter="lora", pretrained_model_name_or_path=base)) == make_method("lora")
    with pytest.raises(ValueError, match="kernel_rank"):
        build_method(Options(adapter="flora", adapter_options="kernel_rang=3", **embedded))
    with pytest.raises(ValueError, match="name=value"):
        build_method(Options(adapter="flora", adapter_options="gaussian", **embedded))


def test_pairs_keep_brackets_together_and_know_numbers():
    assert parse_pairs("betas=(0.9, 0.99),lr=1e-4, nesterov=true ,mode=fast", "--x") == {
        "betas": (0.9, 0.99),
        "lr": 1e-4,
        "nesterov": True,
        "mode": "fast",
    }
    assert parse_pairs(None, "--x") == {}
    with pytest.raises(ValueError, match="--x takes name=value"):
        parse_pairs("momentum", "--x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpointing_steps": -1}, "--checkpointing_steps must be at least 0, got -1"),
        ({"validation_steps": -5}, "--validation_steps must be at least 1, got -5"),
        ({"learning_rate": float("nan")}, "--learning_rate must be at least 0, got nan"),
        ({"noise_offset": -0.1}, "--noise_offset must be at least 0, got -0.1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(given, message):
    check_ranges(Options())
    with pytest.raises(ValueError, match=message):
        check_ranges(Options(**given))


def test_a_budget_chooses_the_rank_and_excludes_another():
    model, base = tiny_unet(), {"pretrained_model_name_or_path": "embedded:emoji", "targets": "attention"}
    options = Options(adapter="lora", param_budget="5k", alpha=2.0, **base)
    method = fit_to_budget(options, build_method(options), model)
    count = da.attach(model, method, "attention").num_parameters
    assert count <= 5000
    assert method.alpha == 2.0
    larger = da.make_method("lora", rank=method.rank + 1)
    assert da.count_parameters(tiny_unet(), larger, "attention").total > 5000
    assert fit_to_budget(Options(adapter="lora", **base), method, model) is method
    for wrong, message in (({"rank": 3}, "leave --rank out"), ({"param_budget": "lots"}, "500k or 1.5M")):
        options = Options(**{"adapter": "lora", "param_budget": "5k", **base, **wrong})
        with pytest.raises(ValueError, match=message):
            fit_to_budget(options, build_method(options), model)


def test_options_of_text_encoders_need_the_one_that_trains_them():
    assert text_encoder_targets(Options()) is None
    assert text_encoder_targets(Options(train_text_encoder=True)) == "attention"
    assert text_encoder_targets(Options(train_text_encoder=True, text_encoder_targets="all")) == "all"
    check_text_encoder_lr(Options(train_text_encoder=True, text_encoder_targets="all", text_encoder_lr=1e-4))
    for given in ({"text_encoder_targets": "all"}, {"text_encoder_lr": 1e-4}):
        with pytest.raises(ValueError, match=f"--{next(iter(given))} .* needs --train_text_encoder"):
            check_effects(Options(**given))
    with pytest.raises(ValueError, match="prodigy finds one rate for everything; leave it out"):
        check_text_encoder_lr(Options(train_text_encoder=True, text_encoder_lr=1e-4, optimizer="prodigy"))


def test_what_is_called_otherwise_here_is_an_option_here():
    names = {field.name for field in fields(Options)}
    for other, own in DIFFUSERS_ALIASES.items():
        assert other not in names
        assert own.startswith("the environment") or own.split()[0].removeprefix("--") in names, own


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--learning_rat=1", "unknown option --learning_rat=1; did you mean --learning_rate"),
        ("--use_8bit_adam", "--use_8bit_adam is called --optimizer adamw8bit here"),
        ("--zzz", r"unknown option --zzz \(--help"),
        ("dog", "'dog' belongs to no option"),
    ],
)
def test_an_unknown_option_is_answered_with_what_was_meant(argument, message):
    with pytest.raises(ValueError, match=message):
        parse(Options, ["--seed", "1", argument])


def test_help_lists_every_option_under_its_subject(capsys):
    with pytest.raises(SystemExit):
        parse(Options, ["--help"])
    text = capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[:3] == ["options:", "Subject images:", "Base model:"]
    assert headings[-1] == "Config file:"
    words = text.replace(",", " ").split()
    assert [field.name for field in fields(Options) if f"--{field.name}" not in words] == []
    images = text.split("Subject images:")[1].split("Base model:")[0]
    assert "--instance_data_dir" in images
    assert "--adapter " not in images
