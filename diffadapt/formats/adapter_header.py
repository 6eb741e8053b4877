"""The `adapter` entry in the header of an adapter file, checked before anything is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diffadapt.adapters.fingerprint import ROUNDED


class StoredSite(NamedTuple):
    """A layer that an adapter file changes.

    Attributes:
        component: the model of the pipeline that holds it; "" for a bare model.
        path: the layer's name in that model.
        shape: of its weight.
        rank: where it differs from the method's, else None.
    """

    component: str
    path: str
    shape: tuple
    rank: int | None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path


@dataclass(frozen=True)
class Configuration:
    """The `adapter` entry of a header.

    Attributes:
        json: all of it, as JSON values.
        name: of the adapter.
        seed: of the constants that are drawn again and not stored.
        method: names and options, for `read_method`.
        sites: the layers it changes, in its order.
        base_name: name or path of the base it was trained on, where recorded.
        base_values: fingerprints of that base.
        base_quantisation: how its weights were stored, as `fingerprint.quantisation` says it; None for plain.
    """

    json: dict
    name: str
    seed: int
    method: object
    sites: tuple[StoredSite, ...]
    base_name: str | None
    base_values: frozenset[str]
    base_quantisation: str | None = None


def read_configuration(text: str | None, path: str | Path) -> Configuration:
    """Parses the entry.

    Raises:
        ValueError: it is missing or no JSON, or lacks what every file has.
    """
    try:
        config = json.loads(text or "")
        return _checked(config)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is malformed ({error!r:.300})") from error


def _checked(config: dict) -> Configuration:
    base = config["base"]
    seed = config["seed"]
    # `type`: JSON's true is an int to isinstance; 64 bits are what torch's generators take
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    if not isinstance(base["name"], str | None):
        raise TypeError(f"the base's name must be text, got {base['name']!r}")
    if not isinstance(base.get("quantisation"), str | None):
        raise TypeError(f"the base's quantisation must be text, got {base['quantisation']!r}")
    sites = []
    for site in config["sites"]:
        shape = tuple(site["shape"])
        sites.append(StoredSite(str(site["component"]), str(site["path"]), shape, site.get("rank")))
    fingerprints = [base["values"]]
    fingerprints += [base[key] for key in ROUNDED if key in base]
    return Configuration(
        json=config,
        name=str(config["name"]),
        seed=seed,
        method=config["method"],
        sites=tuple(sites),
        base_name=base["name"],
        base_values=frozenset(fingerprints),
        base_quantisation=base.get("quantisation"),
    )
