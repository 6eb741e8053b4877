"""The header of an exported file: for CivitAI and image programs, and about where it came from."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import Architecture, PublishedNames
from diffadapt.adapters.attach import pipeline_of
from diffadapt.adapters.fingerprint import fingerprint, quantisation
from diffadapt.formats.export.exported_layer import ExportedLayer

# keys of our own files that say something of the file, not of the training
_FILE_KEYS = ("format", "format_version", "adapter", "sha256")
# ends of the keys of factors (r, ...), of which the number of rows is the rank
_DOWN_KEYS = ("lora_down.weight", "lora_A.weight", "lora_linear_layer.down.weight", "hada_w1_b")


def metadata_of(
    adapter: Adapter,
    base: Architecture,
    *,
    title: str,
    base_name: str | None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The header: `modelspec.*` and `ss_*` keys, and `diffadapt.*` with the method and the base.

    Args:
        title: name of the file.
        base_name: name or path of the base, where known.
        extra: further entries, which the others override.
    """
    method = []
    for member in adapter.method.members:
        method.append({"name": member.name, "options": member.config})
    header = dict(extra or {})
    header |= {
        "format": "pt",
        "diffadapt.method": json.dumps(method),
        "diffadapt.seed": str(adapter.seed),
        "diffadapt.strength": f"{adapter.strength:g}",
        "diffadapt.base_fingerprint": fingerprint(list(adapter.layer_states.values())),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.implementation": "diffusers",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "ss_output_name": title,
    }
    stored_as = quantisation(list(adapter.layer_states.values()))
    if stored_as is not None:
        header["diffadapt.base_quantisation"] = stored_as
    if base_name:
        header |= {"diffadapt.base": base_name, "ss_sd_model_name": base_name}
    # CivitAI and image programs read modelspec.*, kohya's programs ss_*
    if base.published_names is not None:
        header |= _architecture(base.published_names)
        header |= _prediction(adapter)
    return header


def training_metadata(header: Mapping[str, object]) -> dict[str, str]:
    """The entries of a file's header, as `read_metadata` gives it, that say how it was trained."""
    metadata = {}
    for key, value in header.items():
        if key not in _FILE_KEYS:
            metadata[key] = value if isinstance(value, str) else json.dumps(value)
    return metadata


def base_only_note(adapter: Adapter) -> str:
    """The entry in the header of a file that holds whole differences."""
    base = fingerprint(list(adapter.layer_states.values()))
    return f"whole differences of weights: valid for the base with fingerprint {base} only"


def quantised_base_note(layers: Sequence[ExportedLayer]) -> str:
    """A warning about changes that were computed from quantised weights; empty where there are none."""
    states = [layer.layer_state for layer in layers if layer.reads_base]
    stored_as = quantisation(states)
    if stored_as is None:
        return ""
    return (
        f"{len(states)} of {len(layers)} changes are computed from the base's quantised weights "
        f"({stored_as}), so on its unquantised weights they are right to that rounding only"
    )


def _architecture(names: PublishedNames) -> dict[str, str]:
    ending = "" if names.has_published_sizes else "-like"
    header = {
        "modelspec.architecture": f"{names.architecture}{ending}/lora",
        "ss_base_model_version": names.base_version,
        "ss_v2": str(names.base_version == "sd_v2"),
    }
    if names.has_published_sizes:
        header["modelspec.resolution"] = f"{names.resolution}x{names.resolution}"
    return header


def _prediction(adapter: Adapter) -> dict[str, str]:
    """The base's prediction type, where its pipeline is known."""
    scheduler = getattr(pipeline_of(adapter), "scheduler", None)
    prediction = None if scheduler is None else scheduler.config.get("prediction_type")
    if prediction is None:
        return {}
    return {"modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}


def network_of(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, str]:
    """kohya's words for what kind of network a file holds."""
    is_plain_lora = True
    ranks = set()
    for key, tensor in tensors.items():
        # layers' names begin with lora_ too
        end = key.split(".", 1)[1] if "lora_" in key else key.rsplit(".", 1)[-1]
        is_factor = "lora_" in end and "mid" not in end
        if not is_factor and end != "alpha":
            is_plain_lora = False
        if key.endswith(_DOWN_KEYS):
            ranks.add(tensor.shape[0])
    rank = "None"
    if ranks:
        rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {
        "ss_network_module": "networks.lora" if is_plain_lora else "lycoris.kohya",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({"algo": str(adapter.method)}),
    }


def additional_hashes(path: Path) -> dict[str, str]:
    """The two hashes kohya's sd-scripts write for programs that index files by them.

    Args:
        path: the file with no other metadata than its `ss_*` keys, so that what people write into the
            header later changes nothing.

    Source: sd-scripts 48d368f, library/train_util.py, precalculate_safetensors_hashes.
    """
    with path.open("rb") as file:
        file.seek(0x100000)  # A1111's first hash, of 64 KiB behind the first MiB
        legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        file.seek(0)
        # safetensors: 8 bytes with the length of the header, the header, the tensors
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return {"sshs_model_hash": hasher.hexdigest(), "sshs_legacy_hash": legacy}
