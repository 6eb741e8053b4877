"""What the header of an adapter file says of the adapter, checked before anything is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diffadapt.adapters.fingerprint import ROUNDED


class StoredSite(NamedTuple):
    """One changed layer: its component and path there, its weight's shape, and a rank of its own."""

    component: str
    path: str
    shape: tuple
    rank: int | None


@dataclass(frozen=True)
class Configuration:
    """The ``adapter`` entry of a header.

    Attributes:
        whole: all of it, as JSON values.
        name: of the adapter.
        seed: what its frozen tensors are drawn from.
        method: names and options, for ``read_method``.
        sites: what it changes, in its order.
        base_name: of the base it was trained on, where recorded.
        base_values: fingerprints of that base.
    """

    whole: dict
    name: str
    seed: int
    method: object
    sites: tuple[StoredSite, ...]
    base_name: str | None
    base_values: frozenset[str]


def read_configuration(text: str | None, path: str | Path) -> Configuration:
    """Raises ValueError for a configuration that is missing, no JSON, or has not what every file has."""
    try:
        config = json.loads(text or "")
        base, seed = config["base"], config["seed"]
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise TypeError(f"seed must be a whole number, got {seed!r}")
        if not isinstance(base["name"], str | None):
            raise TypeError(f"the base's name must be text, got {base['name']!r}")
        sites = tuple(
            StoredSite(str(s["component"]), str(s["path"]), tuple(s["shape"]), s.get("rank"))
            for s in config["sites"]
        )
        values = frozenset([base["values"], *(base[key] for key in ROUNDED if key in base)])
        return Configuration(config, str(config["name"]), seed, config["method"], sites, base["name"], values)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is malformed ({error!r:.300})") from error
