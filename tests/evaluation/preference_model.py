"""A model of preference for tests: how red an image is, times the length of its prompt."""

import numpy as np


class Redness:
    def __call__(self, images, prompts):
        assert all(image.mode == "RGB" for image in images)
        red = [np.asarray(image)[..., 0].mean() / 255 for image in images]
        return [value * len(prompt) for value, prompt in zip(red, prompts, strict=True)]


class OneNumber:
    def __call__(self, images, prompts):
        return [1.0]
