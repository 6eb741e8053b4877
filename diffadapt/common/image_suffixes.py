"""The suffixes of image files, and the description of files in a folder that are not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import features

from diffadapt.common.symlinks import visible_files

COMMON = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
)
NETPBM = frozenset((".ppm", ".pgm", ".pbm", ".pnm"))
JPEG_2000 = frozenset((".jp2", ".j2k", ".jpx"))
AVIF = frozenset((".avif", ".avifs"))
HEIF = frozenset((".heic", ".heif", ".hif"))  # read with the package pillow-heif
ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))  # written by Windows; ignored like hidden files
MAX_FOLDER_NAMES = 3  # in a notice


def readable_suffixes() -> frozenset[str]:
    """The suffixes of images that can be read, in lower case. AVIF and HEIF depend on installed packages."""
    suffixes = COMMON | NETPBM
    # Builds of Pillow differ in what they were linked with.
    if features.check("jpg_2000"):
        suffixes |= JPEG_2000
    if "avif" in features.modules and features.check("avif"):
        suffixes |= AVIF
    if find_spec("pillow_heif") is not None:
        suffixes |= HEIF
    return suffixes


IMAGE_SUFFIXES = readable_suffixes()


def describe_unused(
    files: Sequence[Path], folders: Sequence[Path] = (), *, remedies: dict[str, str] | None = None
) -> str:
    """Describes unused files and folders, counted by suffix: "3 .heic (to read them: ...), 1 .psd".

    Args:
        files: the files that are neither used as images nor as captions.
        folders: the folders whose images are not read.
        remedies: suffix -> how to use these files, in addition to the usual remedies.
    """
    remedies = {**_remedies(), **(remedies or {})}
    counts: Counter[str] = Counter()
    for path in files:
        if path.name.lower() not in SYSTEM_FILES:
            counts[path.suffix.lower()] += 1
    parts = []
    for suffix, count in sorted(counts.items()):
        remedy = f" ({remedies[suffix]})" if suffix in remedies else ""
        parts.append(f"{count} {suffix or 'without suffix'}{remedy}")
    if folders:
        names = ", ".join(path.name for path in folders[:MAX_FOLDER_NAMES])
        if len(folders) > MAX_FOLDER_NAMES:
            names += ", ..."
        noun = "folder" if len(folders) == 1 else "folders"
        parts.append(f"{len(folders)} {noun} in it ({names})")
    return ", ".join(parts)


def folders_with_images(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold at least one visible image, at any depth."""
    with_images: list[Path] = []
    for folder in folders:
        files, _ = visible_files(folder, recursive=True)
        if any(_is_image(path) for path in files):
            with_images.append(folder)
    return with_images


def exclude_paths(files: Sequence[Path], excluded: Collection[Path]) -> list[Path]:
    """The files that are not among the excluded ones."""
    excluded = set(excluded)
    return [path for path in files if path not in excluded]


def _is_image(path: Path) -> bool:
    """Whether a file is an image, readable or not."""
    return path.suffix.lower() in IMAGE_SUFFIXES | HEIF


def _remedies() -> dict[str, str]:
    """Suffix -> how to use files that are not read."""
    remedies = dict.fromkeys(ARCHIVES, "unpack it first")
    if not HEIF <= IMAGE_SUFFIXES:
        remedies |= dict.fromkeys(HEIF, "to read them: pip install pillow-heif")
    if ".avif" not in IMAGE_SUFFIXES:
        remedies[".avif"] = "to read them: a newer Pillow"
    return remedies
