"""Published weight files of extractors: where they are searched for, their hashes, and their download.

Nothing is downloaded without permission, and no file is read before its SHA-256 agrees.
"""

from __future__ import annotations

import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.atomic_files import write_atomically

BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class WeightFile:
    """One published weight file.

    Attributes:
        name: of the file.
        url: its source.
        size: in bytes.
        sha256: of its bytes.
    """

    name: str
    url: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} ({self.size / 2**20:.1f} MiB, sha256 {self.sha256}) from {self.url}"


_TORCHVISION = "https://download.pytorch.org/models"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
FILES = {  # extractor -> its weight file
    # the network of the first FID, of TensorFlow's archive of 2015-12-05, as torch-fidelity converted it
    "inception": WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        f"{_FIDELITY}/weights-inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # trained on ImageNet by torchvision, whose versions of all backbones LPIPS was published with
    "vgg16": WeightFile(
        "vgg16-397923af.pth",
        f"{_TORCHVISION}/vgg16-397923af.pth",
        553_433_881,
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "lpips:alex": WeightFile(
        "alexnet-owt-7be5be79.pth",
        f"{_TORCHVISION}/alexnet-owt-7be5be79.pth",
        244_408_911,
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "lpips:squeeze": WeightFile(
        "squeezenet1_1-b8a52dc0.pth",
        f"{_TORCHVISION}/squeezenet1_1-b8a52dc0.pth",
        4_958_839,
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    ),
}
FILES["lpips:vgg"] = FILES["vgg16"]  # the same network
OTHER_NAMES = {"inception": ("pt_inception-2015-12-05-6726825d.pth",)}  # of the same file in other programs


def caches() -> list[Path]:
    """Folders in which weight files are searched for: torch hub's."""
    return [Path(torch.hub.get_dir()) / "checkpoints"]


def find(extractor: str) -> Path | None:
    """The weight file of an extractor in the usual caches; None where it is in none."""
    names = (FILES[extractor].name, *OTHER_NAMES.get(extractor, ()))
    for folder in caches():
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def parse_weights(pairs: Sequence[str]) -> dict[str, Path]:
    """Parses `--weights`: `["inception=/path"]` to {"inception": Path("/path")}.

    Raises:
        ValueError: a pair is of another form, or an extractor is named twice.
        FileNotFoundError: there is no such path.
    """
    paths: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ValueError(
                f"--weights takes EXTRACTOR=PATH, such as inception=/path/file.pth, got {pair!r}"
            )
        if name in paths:
            raise ValueError(f"--weights names {name!r} twice: {paths[name]} and {path}; give one")
        if not Path(path).exists():
            raise FileNotFoundError(f"--weights {pair}: there is nothing at {path!r}")
        paths[name] = Path(path)
    return paths


def locate(extractor: str, *, weights: Mapping[str, Path], download: bool, available: list[str]) -> Path:
    """The weight file of an extractor: from `--weights`, from a cache, or downloaded where allowed.

    Args:
        extractor: a key of FILES.
        weights: parsed `--weights`.
        download: whether a missing file may be downloaded.
        available: extractors that need no download, for the error.

    Raises:
        FileNotFoundError: the file is missing; names the file, its size, its source, and where to put it.
    """
    path = weights.get(extractor) or find(extractor)
    if path is not None:
        return path
    file = FILES[extractor]
    if download:
        return fetch(file, caches()[0])
    raise FileNotFoundError(
        f"the weights of {extractor!r} are not on this machine: {file}\n"
        f"  put the file into {caches()[0]}, or give --weights {extractor}=PATH, or allow --download\n"
        f"  available now: {', '.join(available)}"
    )


def fetch(file: WeightFile, folder: Path) -> Path:
    """Downloads a file after printing its size, source and hash; a file with another hash is removed.

    Raises:
        OSError: the download failed.
        ValueError: it is not the published file.
    """
    print(f"downloading {file} to {folder}", file=sys.stderr)
    target = folder / file.name
    try:
        write_atomically(target, lambda temporary: _download(file, temporary))
    except urllib.error.URLError as error:
        raise OSError(
            f"cannot download {file.url}: {error.reason}; download it on another machine, see --weights"
        ) from None
    return target


def _download(file: WeightFile, target: Path) -> None:
    with (
        urllib.request.urlopen(file.url) as source,
        target.open("wb") as out,
        tqdm(desc=file.name, total=file.size, unit="B", unit_scale=True) as bar,
    ):
        while (block := source.read(BLOCK)) and bar.n <= file.size:  # a longer file is not the published one
            out.write(block)
            bar.update(len(block))
    check(target, file)


def check(path: Path, file: WeightFile) -> str:
    """The SHA-256 of a file, which must be the published one.

    Raises:
        ValueError: it has another hash.
    """
    sha256 = sha256_of(path)
    if sha256 != file.sha256:
        raise ValueError(
            f"{path} is not the published {file.name}: sha256 {sha256}, {path.stat().st_size:,} bytes; "
            f"expected {file.sha256}, {file.size:,} bytes; it was not read. Download it again from {file.url}"
        )
    return sha256


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a .pth file; the latter by torch's weights-only reader.

    Raises:
        ValueError: the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no readable weights: {reason}") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, which is read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
