"""Prompts that show and measure what a subject run has learned, per family of bases."""

import re

# The subject where training never put it; {} is the subject as in "sks dog".
_EMOJI_CONTEXTS = (
    "a {} emoji on a red background",
    "a {} emoji on a blue background",
    "a {} emoji on a green background",
    "a {} emoji on a purple background",
    "a {} emoji on a black background",
    "a {} emoji on a pink background",
    "a {} emoji next to a pizza emoji",
    "a {} emoji and a rocket emoji",
    "a {} emoji next to a red apple emoji",
    "a {} emoji and a soccer ball emoji",
)
_PHOTO_CONTEXTS = (
    "a photo of {} in the jungle",
    "a photo of {} in the snow",
    "a photo of {} on the beach",
    "a photo of {} on a cobblestone street",
    "a photo of {} on top of a wooden floor",
    "a photo of {} with a city in the background",
    "a photo of {} with a mountain in the background",
    "a photo of {} on top of a purple rug",
    "a photo of {} floating on top of water",
    "a watercolor painting of {}",
)
# Prompts that have nothing to do with a subject: what is drawn for them should not change.
_EMOJI_THINGS = (
    "a pizza emoji",
    "a red apple emoji",
    "a sunflower emoji",
    "a full moon emoji",
    "a rocket emoji",
    "a soccer ball emoji",
    "a house emoji",
    "an octopus emoji",
    "a guitar emoji",
    "a hamburger emoji",
    "a christmas tree emoji",
    "a key emoji",
)
_PHOTO_THINGS = (
    "a photo of a mountain lake",
    "a photo of a sports car",
    "a bowl of fruit on a table",
    "a portrait of an old man",
    "a city street at night",
    "a red brick house",
    "a field of sunflowers",
    "a steam locomotive",
    "an astronaut on the moon",
    "a wooden chair",
    "a slice of pizza",
    "a sailing ship at sea",
)
CONTEXTS = {"emoji": _EMOJI_CONTEXTS, "sd": _PHOTO_CONTEXTS, "sdxl": _PHOTO_CONTEXTS}
UNRELATED = {"emoji": _EMOJI_THINGS, "sd": _PHOTO_THINGS, "sdxl": _PHOTO_THINGS}


def subject_of(prompt: str) -> str:
    """'sks dog' of 'a photo of sks dog' or 'a sks dog emoji'."""
    prompt = re.sub(r"^(an?|the)\s+", "", prompt.strip())
    prompt = re.sub(r"^(photo|picture|image|painting|drawing) of\s+((an?|the)\s+)?", "", prompt)
    return re.sub(r"\s+emoji$", "", prompt)


def contexts(family: str, instance_prompt: str) -> list[str]:
    """New-context prompts for the subject of `instance_prompt`."""
    return [template.format(subject_of(instance_prompt)) for template in CONTEXTS[family]]


def without_identifier(prompt: str, *, instance_prompt: str, class_prompt: str | None) -> str:
    """The prompt in words an independent encoder knows: without what only the instance prompt says."""
    if class_prompt is None:
        return prompt
    private = set(instance_prompt.split()) - set(class_prompt.split())
    return " ".join(word for word in prompt.split() if word not in private)
