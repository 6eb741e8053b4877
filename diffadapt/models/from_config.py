"""A model from its configuration alone, on the meta device: every shape and no weight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from diffadapt.common.pipeline_components import AUTOENCODER, DENOISERS, is_text_encoder
from diffadapt.models.base_names import pipeline_index, resolve


def model_from_config(source: str, *, text_encoders: bool = False) -> nn.Module | SimpleNamespace:
    """The model of a config file or of a folder with one, or the denoiser of a pipeline's folder.

    Args:
        source: `config.json`, a folder holding `config.json` or `model_index.json`, `embedded:NAME`,
            or a name on the hub, of which only the configurations are fetched.
        text_encoders: a pipeline's denoiser and text encoders, as attributes of one object, instead of the
            denoiser alone.

    Raises:
        FileNotFoundError, ValueError: a file or a part of it is missing; the message says which.
    """
    path = _local(source)
    if not (path / "model_index.json").is_file():
        if text_encoders:
            raise ValueError(
                f"{source!r} is not a pipeline with text encoders; give a folder with model_index.json"
            )
        return _build(path / "config.json" if path.is_dir() else path)
    denoisers = _component_folders(path, DENOISERS)
    if not text_encoders:
        return _build(denoisers[0] / "config.json")
    names = sorted(folder.name for folder in path.iterdir() if is_text_encoder(folder.name))
    model = SimpleNamespace()
    for folder in denoisers + _component_folders(path, names or ["text_encoder"]):
        setattr(model, folder.name, _build(folder / "config.json"))
    return model


def denoiser_from_config(source: str, *, revision: str | None = None) -> tuple[str, nn.Module]:
    """The component name of a pipeline's denoiser, and the denoiser on the meta device.

    Args:
        source: a folder, a hub name or `embedded:NAME`.
        revision: branch, tag or commit on the hub.
    """
    index = pipeline_index(source, revision=revision)
    (component,) = (name for name in DENOISERS if index.get(name) not in (None, [None, None]))
    library, class_name = index[component]
    return component, _component_from_config(source, component, library, class_name, revision)


def models_from_config(source: str, *, revision: str | None = None) -> dict[str, nn.Module]:
    """All models of a pipeline by component name, on the meta device.

    The arguments are those of `denoiser_from_config`.
    """
    models = {}
    for component, entry in pipeline_index(source, revision=revision).items():
        is_model = component in (*DENOISERS, AUTOENCODER) or is_text_encoder(component)
        if is_model and entry not in (None, [None, None]):
            models[component] = _component_from_config(source, component, *entry, revision)
    return models


def _component_from_config(
    source: str, component: str, library: str, class_name: str, revision: str | None
) -> nn.Module:
    import diffusers
    import transformers
    from transformers import AutoConfig

    location = {"subfolder": component, "revision": revision}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the model's use: only its shapes are read
        if library == "diffusers":
            cls = getattr(diffusers, class_name)
            return cls.from_config(cls.load_config(resolve(source), **location))
        config = AutoConfig.from_pretrained(resolve(source), **location)
        return getattr(transformers, class_name)(config)


def _local(source: str) -> Path:
    """The file or folder of a source, fetched from the hub where it is the name of a repository."""
    path = Path(resolve(source)).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or source.endswith(".json"):
        raise FileNotFoundError(f"no model at {source!r}; give a config.json, a model's folder or a hub name")
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(source, allow_patterns=["model_index.json", "config.json", "*/config.json"])
    )


def _component_folders(pipeline: Path, names: Sequence[str]) -> list[Path]:
    """The folders of a pipeline's components with a configuration, of those with the given names."""
    configured = [pipeline / name for name in names if (pipeline / name / "config.json").is_file()]
    if not configured:
        files = [f"{name}/config.json" for name in names]
        raise ValueError(f"{pipeline} has no {' or '.join(files)}")
    return configured


def _build(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {str(path)!r}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a model")
    if "_class_name" in config:
        return _diffusers_model(path, config)
    if config.get("architectures") and config.get("model_type"):
        return _transformers_model(path, config)
    raise ValueError(
        f"{path} names neither a diffusers _class_name nor transformers' model_type and architectures"
    )


def _diffusers_model(path: Path, config: dict) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{path}: {config['_class_name']!r} is not a model of diffusers {diffusers.__version__}"
        )
    # Warnings about the model's use do not matter here: only its shapes are read.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_config(config)


def _transformers_model(path: Path, config: dict) -> nn.Module:
    import transformers

    name = str(config["architectures"][0])
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: {name!r} is not a model of transformers {transformers.__version__}")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(cls.config_class.from_dict(config))
