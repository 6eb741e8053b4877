"""`diffadapt params`: tables from configurations alone."""

import json
from pathlib import Path

import pytest
from helpers.pipelines import tiny_sd_pipeline

from diffadapt.cli.main import main
from diffadapt.models.from_config import model_from_config

CONFIGS = Path(__file__).parents[1] / "configs"
SDXL = str(CONFIGS / "sdxl_unet.json")


def run(capsys, *arguments):
    assert main(["params", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def table(capsys, *arguments):
    return json.loads(run(capsys, "--json", *arguments))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base") / "pipe")


@pytest.mark.parametrize(
    ("config", "base", "layers", "parameters"),
    [  # what diffusers' LoRA training reports at rank 4: files of 23.2 and 3.2 MB
        ("sdxl_unet.json", 2_567_463_684, 560, 5_806_080),
        ("sd15_unet.json", 859_520_964, 128, 797_184),
    ],
)
def test_the_unets_of_stable_diffusion(capsys, config, base, layers, parameters):
    found = table(capsys, "--model", CONFIGS / config, "--adapter", "lora(rank=4)")
    assert found["base_parameters"] == base
    assert found["parameters"] == parameters
    assert sum(block["layers"] for block in found["blocks"]) == layers
    assert sum(block["parameters"] for block in found["blocks"]) == parameters
    assert found["bytes"] == 4 * parameters
    assert found["percent"] == pytest.approx(100 * parameters / base)
    assert found["method"][0]["options"]["rank"] == 4


def test_nothing_but_shapes_is_made():
    model = model_from_config(SDXL)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_table_for_people(capsys, pipe):
    shown = run(capsys, "--model", pipe, "--adapter", "lora(rank=2)", "--blocks", "1").splitlines()
    assert shown[0] == "lora(rank=2)"
    assert shown[1].split() == ["block", "layers", "parameters", "percent", "bytes"]
    rows = {line.split()[0]: line.split()[1:] for line in shown[2:-1]}
    assert "total" in rows
    numbers = [int(row[1].replace(",", "")) for name, row in rows.items() if name != "total"]
    assert sum(numbers) == int(rows["total"][1].replace(",", ""))
    assert int(rows["total"][3].replace(",", "")) == 4 * sum(numbers)


def test_a_budget_chooses_the_rank(capsys, pipe):
    base = ("--model", pipe, "--targets", "attention+conv")
    found = table(capsys, *base, "--adapter", "flora(kernel_rank=1)", "--param_budget", "20k")
    rank = found["method"][0]["options"]["rank"]
    assert rank > 1
    assert found["parameters"] <= 20_000
    more = table(capsys, *base, "--adapter", f"flora(kernel_rank=1, rank={rank + 1})")
    assert more["parameters"] > 20_000


def test_text_encoders_of_a_pipeline_take_part(capsys, pipe):
    arguments = ("--model", pipe, "--adapter", "lora(rank=1)", "--text_encoder_targets", "attention")
    names = [block["name"] for block in table(capsys, *arguments)["blocks"]]
    assert any(name.startswith("unet.") for name in names)
    assert any(name.startswith("text_encoder.") for name in names)


def test_a_folder_of_one_model_and_its_file_give_the_same_table(capsys, pipe):
    folder = Path(pipe) / "unet"
    of_folder = table(capsys, "--model", folder, "--adapter", "1lora")
    assert of_folder == table(capsys, "--model", folder / "config.json", "--adapter", "1lora")
    assert of_folder["parameters"] > 0


def test_a_model_of_transformers_is_built_from_its_config(capsys, pipe):
    found = table(capsys, "--model", Path(pipe) / "text_encoder", "--adapter", "1lora", "--targets", "qv")
    assert found["parameters"] > 0


def test_rank_patterns(capsys, pipe):
    arguments = ("--model", pipe, "--adapter", "lora(rank=1)", "--targets", "attention")
    more = table(capsys, *arguments, "--rank_pattern", "*.to_q=3")
    assert more["parameters"] > table(capsys, *arguments)["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no model at './nowhere'"),
        (["--model", "{tmp}"], "no configuration at"),
        (["--model", "{tmp}/list.json"], "is not the configuration of a model"),
        (["--model", "{tmp}/torn.json"], "is not JSON"),
        (["--model", "{tmp}/other.json"], "names neither"),
        (["--model", "{tmp}/class.json"], "'DDIMScheduler' is not a model of diffusers"),
        (["--model", "{tmp}/architecture.json"], "'AutoTokenizer' is not a model of transformers"),
        (["--model", SDXL, "--targets", "attn"], "target 'attn' matches no layer"),
        (["--model", SDXL, "--text_encoder_targets", "qv"], "not a pipeline with text encoders"),
        (["--model", SDXL, "--param_budget", "lots"], "such as 500000"),
        (["--model", SDXL, "--param_budget", "7"], "more than the budget of 7"),
        (["--model", SDXL, "--rank_pattern", "to_q"], "--rank_pattern is a glob"),
        (["--model", SDXL, "--blocks", "0"], "--blocks must be at least 1, got 0"),
    ],
)
@pytest.mark.slow
def test_mistakes_end_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "torn.json").write_text("{", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    (tmp_path / "class.json").write_text('{"_class_name": "DDIMScheduler"}', encoding="utf-8")
    (tmp_path / "architecture.json").write_text(
        '{"architectures": ["AutoTokenizer"], "model_type": "clip"}', encoding="utf-8"
    )
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main(["params", "--adapter", "lora", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "\n" not in errors.strip()
