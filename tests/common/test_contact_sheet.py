"""Sheets of pictures: everything is on them, small pictures are enlarged by whole factors."""

import numpy as np
import torch
from PIL import Image

from diffadapt.common.contact_sheet import Panel, make_contact_sheet, to_pil_images


def test_every_picture_is_on_the_sheet_enlarged_without_smoothing():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = np.asarray(
        make_contact_sheet([[Panel("three", pictures, 2, ["a", "b", "c"])]], title="a title", note="a note")
    )
    inner = 64 * 3 - 2  # without the frame's pixel on each side
    for colour in colours:
        assert (sheet == colour).all(axis=2).sum() >= inner * inner


def test_large_pictures_are_made_smaller():
    sheet = make_contact_sheet([[Panel("", [Image.new("RGB", (2048, 1024))], 1)]], title="")
    assert max(sheet.size) < 400


def test_long_captions_are_wrapped_not_cut():
    picture = Image.new("RGB", (64, 64))
    short, long = (
        make_contact_sheet([[Panel("", [picture], 1, [words])]], title="")
        for words in ("a", "many words " * 9)
    )
    assert long.width == short.width
    assert long.height > short.height + 40


def test_tensors_become_pictures_with_rounding():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert to_pil_images(images)[0].getpixel((0, 0)) == (0, 128, 255)
