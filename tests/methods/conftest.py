"""Class-conditional bases that tests of methods share."""

import pytest
from helpers.class_models import copied
from helpers.class_pipelines import class_pipeline, dit_pipeline

from diffadapt.models.open_pipeline import open_pipeline


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {"unet": class_pipeline, "dit": dit_pipeline}
    return {kind: open_pipeline(str(make(tmp_path_factory.mktemp(kind)))) for kind, make in made.items()}


@pytest.fixture
def fresh(bases):
    """Bases without adapters, with networks of their own."""
    return lambda kind: copied(bases[kind])
