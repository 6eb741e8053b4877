"""Bases from strangers: what their folders hold is never run as code."""

import json
import sys

import pytest

from diffadapt.models.base_names import pipeline_class
from diffadapt.models.families import load_base
from diffadapt.models.open_pipeline import open_pipeline

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"


def hostile(folder, index, *files):
    """A pipeline's folder with that index, and code in those files."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("opener", [load_base, open_pipeline])
@pytest.mark.parametrize(
    ("index", "file"),
    [
        ({"_class_name": "StableDiffusionPipeline", "unet": ["evil", "Evil"]}, "unet/evil.py"),
        ({"_class_name": ["evil", "Evil"], "unet": ["diffusers", "UNet2DConditionModel"]}, "evil.py"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["antigravity", "Evil"]}, "antigravity.py"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}, "pipeline.py"),
    ],
    ids=["component", "pipeline", "module", "function"],
)
def test_code_in_a_bases_folder_is_refused_and_not_run(tmp_path, monkeypatch, opener, index, file):
    folder = hostile(tmp_path / "base", index, file)
    monkeypatch.chdir(folder)
    with pytest.raises(
        ValueError, match=r"is of '\w+'; components of a base come from diffusers or transformers"
    ):
        opener(str(folder))
    assert not list(tmp_path.rglob("ran"))
    assert "antigravity" not in sys.modules


def test_parts_of_diffusers_own_pipelines_are_known(tmp_path):
    parts = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "sizes": [64, 128],
    }
    folder = hostile(tmp_path / "base", {"_class_name": "StableDiffusionPipeline", **parts})
    assert pipeline_class(str(folder)) == "StableDiffusionPipeline"
