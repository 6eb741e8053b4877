"""Which files of a folder are images, by the endings of their names, and what is said of all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import features

from diffadapt.common.symlinks import visible_files

HEIF = frozenset((".heic", ".heif", ".hif"))  # read with the package pillow-heif
ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))  # written by Windows; as silent as hidden files
MOST_FOLDERS = 3  # that a notice names


def image_endings() -> frozenset[str]:
    """The endings that are read here, in small letters: AVIF and HEIF depend on what is installed."""
    endings = {
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".gif",
    }
    endings |= {".ppm", ".pgm", ".pbm", ".pnm"}
    if features.check("jpg_2000"):
        endings |= {".jp2", ".j2k", ".jpx"}
    if "avif" in features.modules and features.check("avif"):
        endings |= {".avif", ".avifs"}
    if find_spec("pillow_heif") is not None:
        endings |= HEIF
    return frozenset(endings)


IMAGE_SUFFIXES = image_endings()


def describe_unused(
    files: Sequence[Path], folders: Sequence[Path] = (), *, remedies: dict[str, str] | None = None
) -> str:
    """Files and folders that are not used, counted by ending, as "3 .heic (to read them: ...), 1 .psd".

    Args:
        files: that are neither images that are read nor captions that are used.
        folders: whose images are not read.
        remedies: ending -> what would use these files.
    """
    remedies = {**_remedies(), **(remedies or {})}
    visible = [path for path in files if path.name.lower() not in SYSTEM_FILES]
    counts = Counter(path.suffix.lower() for path in visible)
    parts = []
    for ending, count in sorted(counts.items()):
        remedy = f" ({remedies[ending]})" if ending in remedies else ""
        parts.append(f"{count} {ending or 'without ending'}{remedy}")
    if folders:
        names = ", ".join(path.name for path in folders[:MOST_FOLDERS])
        more = ", ..." if len(folders) > MOST_FOLDERS else ""
        noun = "folder" if len(folders) == 1 else "folders"
        parts.append(f"{len(folders)} {noun} in it ({names}{more})")
    return ", ".join(parts)


def folders_with_images(folders: Sequence[Path]) -> list[Path]:
    """Those of the folders that hold an image that is not hidden, at any depth."""
    holders: list[Path] = []
    for folder in folders:
        files, _ = visible_files(folder, recursive=True)
        if any(_is_image(path) for path in files):
            holders.append(folder)
    return holders


def exclude_paths(files: Sequence[Path], used: Collection[Path]) -> list[Path]:
    """The files that are not used."""
    taken = set(used)
    return [path for path in files if path not in taken]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | HEIF


def _remedies() -> dict[str, str]:
    remedies = dict.fromkeys(ARCHIVES, "unpack it first")
    if not HEIF <= IMAGE_SUFFIXES:
        remedies |= dict.fromkeys(HEIF, "to read them: pip install pillow-heif")
    if ".avif" not in IMAGE_SUFFIXES:
        remedies[".avif"] = "to read them: a newer Pillow"
    return remedies
