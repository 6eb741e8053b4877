"""What the header of an exported file says: to CivitAI and image programs, and about where it came from."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fingerprint import fingerprint
from diffadapt.formats.export.layer_names import Base

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_OWN_KEYS = ("format", "format_version", "adapter", "sha256")  # said again, in other words
_SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # pixels the published models were made for


def metadata_of(
    adapter: Adapter,
    base: Base,
    *,
    title: str,
    base_name: str | None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The header: ``modelspec.*``, ``ss_*`` and ``sshs_*`` keys, and ``diffadapt.*`` with all we know."""
    method = [{"name": part.name, "options": part.config} for part in adapter.method.members]
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
    if base_name:
        header |= {"diffadapt.base": base_name, "ss_sd_model_name": base_name}
    if base.family in ARCHITECTURES:
        header |= _architecture(base)
    return header


def carried(header: Mapping[str, object]) -> dict[str, str]:
    """Of the header of one of our files, as ``read_metadata`` gives it, what another file should keep: how it
    was trained."""
    kept = {key: value for key, value in header.items() if key not in _OWN_KEYS}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in kept.items()}


def base_only_note(adapter: Adapter) -> str:
    """What a file of whole differences says of itself."""
    values = fingerprint(list(adapter.layer_states.values()))
    return f"whole differences of weights: valid for the base with fingerprint {values} only"


def _architecture(base: Base) -> dict[str, str]:
    kind = ARCHITECTURES[base.family] if base.sizes else f"{ARCHITECTURES[base.family]}-like"
    side = _SIDES[base.family]
    header = {
        "modelspec.architecture": f"{kind}/lora",
        "ss_base_model_version": BASE_VERSIONS[base.family],
        "ss_v2": str(base.family == "sd2"),
    }
    if base.sizes:
        header["modelspec.resolution"] = f"{side}x{side}"
    if base.prediction:
        header["modelspec.prediction_type"] = "v" if base.prediction == "v_prediction" else base.prediction
    return header


def network_of(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, str]:
    """kohya's words for what kind of network a file holds."""
    ends = {key.rsplit(".", 1)[-1] if "lora_" not in key else key.split(".", 1)[1] for key in tensors}
    plain = all(("lora_" in end and "mid" not in end) or end == "alpha" for end in ends)
    ranks = Counter(
        tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(("lora_down.weight", "lora_A.weight", "lora_linear_layer.down.weight", "hada_w1_b"))
    )
    rank = str(ranks.most_common(1)[0][0]) if len(ranks) == 1 else "Dynamic" if ranks else "None"
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({"algo": str(adapter.method)}),
    }


def additional_hashes(path: Path) -> dict[str, str]:
    """The two hashes kohya's sd-scripts write for programs that index files by them.

    Args:
        path: the file with no other metadata than its ``ss_*`` keys, so that what people write into the
            header later changes nothing.

    Source: sd-scripts 48d368f, library/train_util.py, precalculate_safetensors_hashes.
    """
    with path.open("rb") as file:
        file.seek(0x100000)
        legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        file.seek(0)
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return {"sshs_model_hash": hasher.hexdigest(), "sshs_legacy_hash": legacy}
