"""One-file checkpoints in the original layout: the same weights, the same images, clear errors."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from helpers.sgm_layout import write_single_file
from safetensors.torch import load_file, save_file

from diffadapt.models.families import load_base, profile_of
from diffadapt.models.sampling import SamplingConfig, generate_all, image_requests

FOLDERS = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family -> (folder, single file of the same weights)"""
    place, made = tmp_path_factory.mktemp("bases"), {}
    for family, write in FOLDERS.items():
        folder = write(place / f"{family}-folder", vae="kl", prediction_type="v_prediction", scheduler="ddim")
        made[family] = str(folder), str(write_single_file(folder, place / f"{family}.safetensors"))
    return made


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.slow
def test_a_single_file_is_the_base_of_its_folder(bases, family):
    folder, file = (load_base(name) for name in bases[family])
    assert file.family == profile_of(bases[family][1]).name == family
    for name, part in folder.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = getattr(file.pipe, name).state_dict(), part.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert file.training_schedule().config.prediction_type == "v_prediction"
    assert torch.equal(
        file.encode_captions(["a dog"])["encoder_hidden_states"],
        folder.encode_captions(["a dog"])["encoder_hidden_states"],
    )
    images = [
        generate_all(m.pipe, image_requests("a dog", 1), SamplingConfig(num_inference_steps=2))
        for m in (folder, file)
    ]
    assert torch.equal(*images)


@pytest.mark.slow
def test_marks_of_v_prediction_and_zero_terminal_signal_are_read(tmp_path, bases):
    folder = tiny_sdxl_pipeline(tmp_path / "eps", vae="kl")
    file = write_single_file(folder, tmp_path / "noob.safetensors", marks=("v_pred", "ztsnr"))
    model = load_base(str(file))
    assert model.training_schedule().config.prediction_type == "v_prediction"
    assert model.training_schedule().alphas_cumprod[-1] == 0
    assert model.pipe.scheduler.config.timestep_spacing == "trailing"


def test_files_that_are_no_base_are_errors_that_say_why(tmp_path, bases):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_base(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(ValueError, match="can run any code"):
        load_base(str(tmp_path / "old.ckpt"))
    state = load_file(bases["sd"][1])
    wrong = {
        "a UNet without text encoders": {k: v for k, v in state.items() if not k.startswith("cond_stage")},
        "no UNet in the original layout": {"lora_unet_conv_in.alpha": torch.ones(1)},
        "takes 9 channels": {
            **state,
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3),
        },
    }
    for message, tensors in wrong.items():
        save_file(tensors, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            load_base(str(tmp_path / "wrong.safetensors"))
    save_file({k: v for k, v in state.items() if "first_stage" not in k}, tmp_path / "whole.safetensors")
    shutil.copytree(Path(bases["sd"][1]).with_suffix(""), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"is not a whole checkpoint: .*AutoencoderKL"):
        load_base(str(tmp_path / "whole.safetensors"))
    shutil.copyfile(bases["sd"][1], tmp_path / "whole.safetensors")
    (tmp_path / "whole" / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=f"does not fit the configurations at {tmp_path / 'whole'}"):
        load_base(str(tmp_path / "whole.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "wrong.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_base(str(tmp_path / "cut.safetensors"))


def test_without_a_configuration_and_a_network_the_error_says_where_to_put_one(tmp_path, bases):
    lonely = tmp_path / "lonely.safetensors"
    shutil.copyfile(bases["sd"][1], lonely)
    with pytest.raises(
        OSError, match=f"put the pipeline's folder without weights .* at {tmp_path / 'lonely'}"
    ):
        load_base(str(lonely))
