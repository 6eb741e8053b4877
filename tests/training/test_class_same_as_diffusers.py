"""The loop gives the losses of diffusers' unconditional script and of DiT's, restated here with PEFT."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiTPipeline
from helpers.class_pipelines import class_pipeline, class_tables, dit_pipeline, write_classes
from helpers.pipelines import train_options
from peft import LoraConfig, get_peft_model

import diffadapt as da
from diffadapt.common.images import open_image, to_pixels
from diffadapt.common.keyed_random import normal, uniform
from diffadapt.data.batches import Batches
from diffadapt.data.folders import read_class_folders
from diffadapt.models.families import load_base
from diffadapt.pipelines import ClassConditionalPipeline
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

STEPS, BATCH, RATE, SEED, DROPPED = 20, 3, 1e-3, 3, 0.3


def our_run(base, examples, method, targets="attention"):
    """Losses, the adapter's starting factors, and the draws of every step."""
    model = load_base(str(base))
    batches = Batches(
        model, examples, resolution=model.resolution, center_crop=True, seed=SEED, caption_dropout=DROPPED
    )
    adapter = da.attach(model.pipe, da.make_method(method), targets=targets, seed=1)
    start = {name: value.detach().clone() for name, value in adapter.parts[0].named_tensors().items()}
    steps = [range(step * BATCH, (step + 1) * BATCH) for step in range(STEPS)]
    draws = [
        (batches.order.sample_indices(s), batches.batch(s).noise, batches.batch(s).timesteps) for s in steps
    ]
    options = train_options(max_train_steps=STEPS, train_batch_size=BATCH, learning_rate=RATE)
    told = {"predict": model.predict, "schedule": model.training_schedule()}
    train_state = initial_state(Accelerator(cpu=True), Objective(model.denoiser, adapter, **told), options)
    return [step.loss for step in train(train_state, batches)], start, draws, adapter, model


def with_peft(denoiser, start):
    """The denoiser with PEFT's LoRA at our start, and what is trained."""
    denoiser.requires_grad_(False).eval()
    names = ["to_k", "to_q", "to_v", "to_out.0"]
    wrapped = get_peft_model(denoiser, LoraConfig(r=4, lora_alpha=4, target_modules=names))
    for name, value in start.items():
        _, site, factor = name.split("/")
        layer = denoiser.get_submodule(site.partition(".")[2])
        with torch.no_grad():
            (layer.lora_A if factor == "down" else layer.lora_B)["default"].weight.copy_(value)
    return wrapped, [p for p in wrapped.parameters() if p.requires_grad]


def labels_of(chosen, examples, null):
    """Each draw's class, or the null class where the label is dropped."""
    keys = [("dropped", SEED, d.role, d.epoch, d.sample) for d in chosen]
    is_dropped = [uniform(key, 1)[0] < DROPPED for key in keys]
    return torch.tensor(
        [null if lost else examples[d.index].caption for d, lost in zip(chosen, is_dropped, strict=True)]
    )


def descend(loss, parameters, optimizer):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.slow
def test_first_20_losses_of_a_unet2d_equal_the_unconditional_script_with_labels(tmp_path, prediction):
    base = class_pipeline(tmp_path / "base", prediction_type=prediction)
    examples, _ = read_class_folders(write_classes(tmp_path / "classes", side=8))
    ours, start, draws, *_ = our_run(base, examples, "lora(rank=4)")
    pipe = ClassConditionalPipeline.from_pretrained(base)
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    model, parameters = with_peft(pipe.unet, start)
    optimizer, theirs = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2), []
    for chosen, noise, timesteps in draws:
        clean = torch.stack([to_pixels(open_image(examples[d.index].source), 8) for d in chosen])
        labels = labels_of(chosen, examples, null=3)
        output = model(schedule.add_noise(clean, noise, timesteps), timesteps, class_labels=labels).sample
        if prediction == "epsilon":
            loss = F.mse_loss(output.float(), noise.float())
        elif prediction == "sample":
            loss = F.mse_loss(output.float(), clean.float())
        else:
            root = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            loss = F.mse_loss(output, root.sqrt() * noise - (1 - root).sqrt() * clean)
        theirs.append(descend(loss, parameters, optimizer))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert len(set(theirs)) == STEPS


@pytest.mark.parametrize("learns_sigma", [True, False])
@pytest.mark.slow
def test_first_20_losses_of_a_dit_equal_its_simple_loss(tmp_path, learns_sigma):
    base = dit_pipeline(tmp_path / "base", learns_sigma=learns_sigma)
    examples, _ = read_class_folders(write_classes(tmp_path / "classes"))
    ours, start, draws, *_ = our_run(base, examples, "lora(rank=4)")
    pipe = DiTPipeline.from_pretrained(base)
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    model, parameters = with_peft(pipe.transformer, start)
    optimizer, theirs = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2), []
    for chosen, noise, timesteps in draws:
        pixels = torch.stack([to_pixels(open_image(examples[d.index].source), 16) for d in chosen])
        keys = [("posterior", SEED, d.role, d.epoch, d.sample) for d in chosen]
        with torch.no_grad():
            moments = pipe.vae.encode(pixels).latent_dist
        posterior = torch.stack([normal(key, noise.shape[1:]) for key in keys])
        latents = (moments.mean + moments.std * posterior) * 0.18215
        labels = labels_of(chosen, examples, null=1000)
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = model(noisy, timestep=timesteps, class_labels=labels).sample
        predicted = torch.split(output, 4, dim=1)[0]  # the other half is the variance
        theirs.append(descend(F.mse_loss(predicted, noise), parameters, optimizer))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert len(set(theirs)) == STEPS


def test_the_class_tables_in_the_blocks_of_a_dit_are_trained_as_one(tmp_path):
    base = dit_pipeline(tmp_path / "base")
    examples, _ = read_class_folders(write_classes(tmp_path / "classes"))
    *_, adapter, model = our_run(base, examples, "class_embedding", targets="class_embedding")
    assert [tuple(p.shape) for p in adapter.parameters()] == [(1001, 16)]
    assert len(adapter.sites) == 2
    da.merge(adapter)
    first, second = (table.weight for table in class_tables(model.denoiser))
    assert torch.equal(first, second)
    before = class_tables(DiTPipeline.from_pretrained(base).transformer)[0].weight
    used = [0, 1, 2, 1000]
    moved = (first - before).abs().amax(dim=1)
    assert moved[used].min() > 10 * moved[3:1000].max()  # the rest only decays
