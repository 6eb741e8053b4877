"""Prompts that show and measure what a subject run has learned; a base's profile names those that fit it."""

import re
from collections.abc import Sequence

# Templates of `BaseProfile.context_prompts`; {} is the subject, as in "sks dog".
EMOJI_CONTEXTS = (
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
PHOTO_CONTEXTS = (
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
# Prompts of `BaseProfile.unrelated_prompts`.
EMOJI_THINGS = (
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
PHOTO_THINGS = (
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


def subject_of(prompt: str) -> str:
    """The subject that a prompt names: "sks dog" of "a photo of sks dog" or "a sks dog emoji"."""
    prompt = re.sub(r"^(an?|the)\s+", "", prompt.strip())
    prompt = re.sub(r"^(photo|picture|image|painting|drawing) of\s+((an?|the)\s+)?", "", prompt)
    return re.sub(r"\s+emoji$", "", prompt)


def context_prompts(templates: Sequence[str], instance_prompt: str) -> list[str]:
    """The templates with the subject of `instance_prompt` in the place of `{}`."""
    subject = subject_of(instance_prompt)
    return [template.format(subject) for template in templates]


def without_identifier(prompt: str, *, instance_prompt: str, class_prompt: str | None) -> str:
    """The prompt without the words that only the instance prompt has, such as the identifier "sks".

    An encoder that was not trained with them does not know them.
    """
    if class_prompt is None:
        return prompt
    identifiers = set(instance_prompt.split()) - set(class_prompt.split())
    return " ".join(word for word in prompt.split() if word not in identifiers)
