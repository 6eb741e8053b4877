"""A family that this file alone adds: three text encoders, one class, one registration.

It trains, samples, caches, offloads, saves, resumes and exports, though nothing in the package knows
of a third text encoder.
"""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers.pipelines import clip_tokenizer, tiny_text_encoder, tiny_unet, tiny_vae, write_pictures
from helpers.scripts import runner
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.adapters import architectures
from diffadapt.cli.main import main as diffadapt
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models import families
from diffadapt.models.families import load_base, profile_of
from diffadapt.models.sd import STABLE_DIFFUSION
from diffadapt.models.text_conditioned import IDS, TextConditionedBase
from diffadapt.training.encoder_offload import unused_components

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class ThreeEncoderPipeline(DiffusionPipeline):
    """Samples without guidance; the states of three encoders follow one another."""

    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        text_encoder_3,
        tokenizer,
        tokenizer_2,
        tokenizer_3,
        unet,
        scheduler,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            unet=unet,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 4

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, generator):
        model = ThreeEncoders(self, "", STABLE_DIFFUSION)
        states = model.text_states(model.tokens(prompt))["encoder_hidden_states"]
        latents = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            predicted = self.unet(latents, timestep, states, return_dict=False)[0]
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        return dataclasses.make_dataclass("Output", ["images"])(latents)


class ThreeEncoders(TextConditionedBase):
    family = "three_encoders"
    pipeline_classes = ("ThreeEncoderPipeline",)
    profile_of_family = dataclasses.replace(STABLE_DIFFUSION, name="three_encoders")

    @classmethod
    def pipeline_type(cls, class_name):
        return ThreeEncoderPipeline

    def text_states(self, tokens):
        states = []
        for number, encoder in enumerate(self.text_encoders.values(), 1):
            ids = tokens[IDS if number == 1 else f"{IDS}_{number}"]
            states.append(encoder(ids.to(encoder.device))[0])
        return {"encoder_hidden_states": torch.cat(states, dim=1)}

    def denoise(self, denoiser, noisy, timesteps, conditions):
        return denoiser(noisy, timesteps, return_dict=False, **conditions)[0]

    @classmethod
    def pipeline_arguments(cls, requests, config):
        return {"prompt": [request.prompt for request in requests]}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(architectures, "_DESCRIPTIONS", list(architectures._DESCRIPTIONS))
    families.register_family(ThreeEncoders)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizers = [clip_tokenizer(folder / "words") for _ in ENCODERS]
    encoders = [tiny_text_encoder(tokenizer) for tokenizer in tokenizers]
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = ThreeEncoderPipeline(tiny_vae(), *encoders, *tokenizers, tiny_unet(), scheduler)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), 2)


@pytest.fixture
def train(base, images, monkeypatch):
    """Trains two steps of denoiser and text encoders with the stock script."""

    def train(output, *options):
        fixed = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": images,
            "instance_prompt": "a sks dog",
            "output_dir": output,
            "adapter": "lora",
            "rank": 2,
            "resolution": 32,
            "max_train_steps": 2,
            "train_batch_size": 1,
            "checkpointing_steps": 1,
            "num_validation_images": 1,
            "num_inference_steps": 2,
            "num_threads": 1,
            "mixed_precision": "no",
        }
        arguments = [part for name, value in fixed.items() for part in (f"--{name}", value)]
        assert runner("dreambooth", monkeypatch)(*arguments, "--train_text_encoder", *options) == 0
        return output

    return train


def encoder_prefixes(names):
    return {name.partition(".")[0] for name in names} & set(ENCODERS)


def test_it_is_known_by_its_pipeline(base):
    assert profile_of(str(base)).name == "three_encoders"
    model = load_base(str(base))
    assert tuple(model.text_encoders) == ENCODERS
    assert len(model.tokenizers) == 3
    assert model.encode_captions(["a dog"])["encoder_hidden_states"].shape == (1, 3 * 24, 32)


def test_it_trains_samples_saves_exports_and_resumes(train, base, tmp_path):
    output = train(tmp_path / "run", "--export_formats", "kohya")
    adapter = da.load(load_base(str(base)).pipe, output / "adapter.safetensors")
    assert encoder_prefixes(site.name for site in adapter.sites) == set(ENCODERS)
    assert all(tensor.any() for name, tensor in adapter.named_parameters() if ".up" in name)
    assert len(list((output / "samples" / "after").glob("*.png"))) == 2

    kohya = load_file(output / "adapter_comfyui.safetensors")
    for prefix in ("lora_unet_", "lora_te_", "lora_te2_", "lora_te3_"):
        assert any(key.startswith(prefix) for key in kohya), prefix
    read = da.load(load_base(str(base)).pipe, output / "adapter_comfyui.safetensors")
    assert encoder_prefixes(site.name for site in read.sites) == set(ENCODERS)

    again = train(tmp_path / "again", "--resume_from_checkpoint", output / "checkpoint-1")
    first, second = (load_file(folder / "adapter.safetensors") for folder in (output, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    arguments = ["--adapter", output / "adapter.safetensors", "--prompt", "a sks dog", "--num_images", 1]
    arguments += ["--num_inference_steps", 2, "--out", tmp_path / "samples", "--num_threads", 1]
    assert diffadapt(["sample", *map(str, arguments)]) == 0
    assert (tmp_path / "samples" / "sheet.png").is_file()


def test_a_merged_pipeline_holds_the_third_encoder(base, tmp_path):
    pipe = load_base(str(base)).pipe
    adapter = da.attach(pipe, da.LoRA(rank=2), text_encoder_targets="attention")
    before = pipe.text_encoder_3.state_dict()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    da.export(adapter, tmp_path / "merged", to="merged")
    merged = load_base(str(tmp_path / "merged")).pipe.text_encoder_3.state_dict()
    assert any(not torch.equal(merged[name], tensor) for name, tensor in before.items())


def batches(model, images, folder):
    return Batches(
        model,
        folder_examples(images, "a sks dog"),
        resolution=32,
        center_crop=True,
        seed=0,
        cache_latents="disk",
        cache_dir=folder,
    )


def test_the_cache_on_disk_notices_another_third_encoder(base, images, tmp_path, monkeypatch):
    calls = []
    encode = ThreeEncoders.encode_captions
    monkeypatch.setattr(
        ThreeEncoders, "encode_captions", lambda *given: calls.append(given) or encode(*given)
    )
    first = batches(load_base(str(base)), images, tmp_path).batch([0])
    assert len(calls) == 1
    batches(load_base(str(base)), images, tmp_path)
    assert len(calls) == 1
    model = load_base(str(base))
    for parameter in model.pipe.text_encoder_3.parameters():
        parameter.data.mul_(1.1)
    second = batches(model, images, tmp_path).batch([0])
    assert len(calls) == 2
    changed = first.conditions["encoder_hidden_states"] != second.conditions["encoder_hidden_states"]
    assert changed[:, :48].sum() == 0
    assert changed[:, 48:].any()


def test_the_third_encoder_rests_unless_it_is_trained(base, images, tmp_path):
    model = load_base(str(base))
    unused = unused_components(model, batches(model, images, tmp_path))
    assert set(ENCODERS) <= set(unused)
    model.enable_text_encoder_training()
    unused = unused_components(model, batches(model, images, tmp_path))
    assert not set(ENCODERS) & set(unused)
