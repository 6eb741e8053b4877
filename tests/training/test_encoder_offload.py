"""Encoders are on the device to encode, the denoiser after them. Moves are recorded: there is no GPU."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.family_pipelines import tiny_folder
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from safetensors.torch import load_file
from torch import nn

from diffadapt.models import placement
from diffadapt.models.families import load_base
from diffadapt.training import encoder_offload, setup
from diffadapt.training.report.base import Report
from diffadapt.training.run import Run

pytestmark = pytest.mark.slow

TEXTS = {"text_encoder", "text_encoder_2"}


def unused_of(*, are_images_encoded=True, are_captions_encoded=True):
    names = ("vae", "text_encoder", "text_encoder_2", "unet", "safety_checker")
    components = {name: nn.Linear(1, 1) for name in names} | {"tokenizer": object()}
    model = SimpleNamespace(
        pipe=SimpleNamespace(components=components),
        denoiser_name="unet",
        text_encoders={name: components[name] for name in TEXTS},
    )
    batches = SimpleNamespace(
        are_images_encoded=are_images_encoded, are_captions_encoded=are_captions_encoded
    )
    return set(encoder_offload.unused_components(model, batches))


def test_what_steps_use_stays():
    assert unused_of() == {"vae", "safety_checker"} | TEXTS
    assert unused_of(are_images_encoded=False) == {"safety_checker"} | TEXTS
    assert unused_of(are_captions_encoded=False) == {"vae", "safety_checker"}


class Watch:
    """What a run has on the device, and what of its text encoders is alive.

    Attributes:
        events: "+NAME" and "-NAME" for components that come to the device and leave it, "sample" and "step".
        text_encoders: weak references.
    """

    def __init__(self, monkeypatch):
        self.events = []
        self.text_encoders = []
        self.on_device = set()
        self.together = False
        self._model = None
        memory = torch.device("meta")  # another name for main memory, to tell it from the CPU that computes
        monkeypatch.setattr(placement, "MAIN_MEMORY", memory)
        monkeypatch.setattr(placement, "move", self._note)
        monkeypatch.setattr(setup, "load_base", self._load)
        generate = Report._generate
        log = Run.log

        def watch_samples(report, requests, label):
            self.events.append("sample")
            return generate(report, requests, label)

        def watch_steps(run, step):
            gc.collect()
            self.events.append("step")
            self.alive = [reference() for reference in self.text_encoders if reference() is not None]
            log(run, step)

        monkeypatch.setattr(Report, "_generate", watch_samples)
        monkeypatch.setattr(Run, "log", watch_steps)

    def _load(self, *arguments, **options):
        self._model = load_base(*arguments, **options)
        self.text_encoders = [weakref.ref(encoder) for encoder in self._model.text_encoders.values()]
        return self._model

    def _note(self, module, device):
        components = self._model.pipe.components
        (name,) = (name for name, component in components.items() if component is module)
        if device.type == "meta":
            self.on_device.discard(name)
            self.events.append(f"-{name}")
        else:
            assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}  # not just shapes
            self.on_device.add(name)
            self.events.append(f"+{name}")
        has_text_encoder = any(name.startswith("text_encoder") for name in self.on_device)
        self.together |= has_text_encoder and bool(self.on_device & {"transformer", "unet"})


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains two steps with one image before, between and after them."""

    def run(base, *more, output="out", exit_code=0):
        write_pictures(tmp_path / "mine", 2)
        options = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": tmp_path / "mine",
            "instance_prompt": "a sks dog",
            "output_dir": tmp_path / output,
            "num_validation_images": 1,
            "num_inference_steps": 1,
            "train_batch_size": 1,
            "max_train_steps": 2,
            "validation_steps": 1,
            "num_threads": 1,
            "rank": 2,
            "targets": "*attn*.to_q",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert runner("dreambooth", monkeypatch)(*arguments, "--center_crop", *more) == exit_code
        return tmp_path / output

    return run


def family_folder(family, tmp_path, tmp_path_factory):
    if family == "sd":
        return tiny_sd_pipeline(tmp_path / "base")
    return tiny_folder(family, tmp_path_factory)


def assert_same_results(first, second):
    """The adapters and the images of two runs have the same bits."""
    adapters = [load_file(folder / "adapter.safetensors") for folder in (first, second)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    images = list((first / "samples").rglob("*.png"))
    assert images
    for image in images:
        assert image.read_bytes() == (second / image.relative_to(first)).read_bytes()


def test_text_encoders_that_sample_are_on_the_device_to_encode_and_to_sample(watch, run, tmp_path):
    run(tiny_sd_pipeline(tmp_path / "base"))
    encoded = ["+text_encoder", "-text_encoder", "+vae", "-vae", "+unet"]
    sampled = ["+text_encoder", "+vae", "sample", "-text_encoder", "-vae"]
    events = [*encoded, *sampled, "step", *sampled, "step", *sampled, *sampled]
    assert [event.lstrip("+-") for event in watch.events] == [event.lstrip("+-") for event in events]
    assert len(watch.alive) == 1


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_text_encoders_that_do_not_sample_are_gone_before_the_denoiser_comes(
    watch, run, family, tmp_path, tmp_path_factory
):
    run(family_folder(family, tmp_path, tmp_path_factory), "--resolution", 64)
    assert not watch.together
    assert watch.alive == []
    first_step = watch.events.index("step")
    texts = [index for index, event in enumerate(watch.events) if event.startswith("-text_encoder")]
    assert len(texts) == len(watch.text_encoders) >= 2
    assert max(texts) < watch.events.index("+transformer") < watch.events.index("sample") < first_step
    # The autoencoder is back for every image, and for nothing else.
    assert watch.events[watch.events.index("+transformer") + 1 :] == [
        *("+vae", "sample", "-vae", "step", "+vae", "sample", "-vae"),
        *("step", "+vae", "sample", "-vae", "+vae", "sample", "-vae"),
    ]


def test_class_images_are_sampled_in_stages_too(watch, run, tmp_path_factory, tmp_path):
    more = (
        "--resolution",
        64,
        "--with_prior_preservation",
        "--class_prompt",
        "a dog",
        "--num_class_images",
        2,
    )
    output = run(tiny_folder("sd3", tmp_path_factory), *more)
    assert not watch.together
    assert watch.alive == []
    assert len(list((output / "class_images").glob("*.png"))) == 2


@pytest.fixture
def run_style(monkeypatch, tmp_path, tmp_path_factory):
    """Learns a style on a tiny base in two steps, with two images before and after."""

    def run_style(*more):
        for name, caption in (("training", "a dog"), ("held_out", "another cat")):
            folder = write_pictures(tmp_path / name, 2)
            for image in folder.glob("*.png"):
                image.with_suffix(".txt").write_text(f"{caption} {image.stem}", encoding="utf-8")
        options = {
            "pretrained_model_name_or_path": tiny_folder("z_image", tmp_path_factory),
            "train_data_dir": tmp_path / "training",
            "trigger_word": "sks",
            "caption_dropout": 0.5,
            "output_dir": tmp_path / "out",
            "resolution": 64,
            "num_validation_images": 2,
            "num_inference_steps": 1,
            "max_train_steps": 2,
            "rank": 2,
            "num_threads": 1,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert runner("style_transfer", monkeypatch)(*arguments, *more) == 0
        return tmp_path / "out"

    return run_style


def test_held_out_captions_are_encoded_before_the_text_encoders_go(watch, run_style, tmp_path):
    output = run_style("--center_crop", "--validation_data_dir", tmp_path / "held_out")
    assert not watch.together
    assert watch.alive == []
    figures = json.loads((output / "run.json").read_text(encoding="utf-8"))["figures"]
    assert set(figures["held_out_loss"]) == {"before", "after"}
    assert len(list((output / "samples").rglob("*.png"))) == 4


def test_a_stream_keeps_everything_on_the_device(watch, run_style):
    output = run_style("--streaming")
    assert watch.events[:3] == ["+vae", "+transformer", "+text_encoder"]
    assert not any(event.startswith("-") for event in watch.events)
    assert len(watch.alive) == 1
    assert len(list((output / "samples").rglob("*.png"))) == 4


def test_text_encoders_stay_for_steps_that_need_them(watch, run, tmp_path_factory):
    run(tiny_folder("sd3_without_t5", tmp_path_factory), "--resolution", 64, "--train_text_encoder")
    assert watch.together
    assert len(watch.alive) == 2


@pytest.fixture
def load_options(monkeypatch):
    """What a run gives to `load_base` besides the name."""
    given = {}

    def load(name, **options):
        given.update(options)
        return load_base(name, **options)

    monkeypatch.setattr(setup, "load_base", load)
    return given


def test_text_encoders_can_compute_on_the_cpu(run, load_options, tmp_path_factory):
    run(tiny_folder("sd3", tmp_path_factory), "--resolution", 64, "--text_encoder_device", "cpu")
    assert load_options["text_encoder_device"] == "cpu"


def test_a_base_that_samples_with_its_text_encoders_keeps_them_on_the_device(run, tmp_path, capsys):
    run(tiny_sd_pipeline(tmp_path / "base"), "--text_encoder_device", "cpu", exit_code=2)
    assert "needs its text encoders beside the denoiser" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_blocks_in_main_memory_change_no_bit(run, load_options, family, tmp_path, tmp_path_factory):
    folder = family_folder(family, tmp_path, tmp_path_factory)
    size = () if family == "sd" else ("--resolution", 64)
    everything = run(folder, *size, output="everything")
    assert load_options["resident_blocks"] is None
    blocks = run(folder, *size, "--offload_blocks", 1, "--gradient_checkpointing", output="blocks")
    assert load_options["resident_blocks"] == 1
    assert_same_results(everything, blocks)


def test_a_merged_pipeline_is_written_with_the_text_encoders(run, tmp_path_factory):
    output = run(tiny_folder("flux", tmp_path_factory), "--resolution", 64, "--export_formats", "merged")
    merged = output / "adapter_merged"
    base = load_base(str(tiny_folder("flux", tmp_path_factory)))
    for name, encoder in load_base(str(merged)).text_encoders.items():
        expected = base.text_encoders[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_stages_change_no_bit(run, monkeypatch, family, tmp_path, tmp_path_factory):
    folder = family_folder(family, tmp_path, tmp_path_factory)
    size = () if family == "sd" else ("--resolution", 64)
    staged = run(folder, *size, output="staged")

    def load_at_once(*arguments, is_staged, **options):
        return load_base(*arguments, **options)

    monkeypatch.setattr(setup, "load_base", load_at_once)
    monkeypatch.setattr(setup, "release_text_encoders", lambda *arguments: None)
    at_once = run(folder, *size, output="at_once")
    assert_same_results(staged, at_once)
