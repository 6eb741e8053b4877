"""The targets of `export`, by name. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from diffadapt.formats.export.diffusers import DIFFUSERS
from diffadapt.formats.export.kohya import KOHYA
from diffadapt.formats.export.merged import MERGED
from diffadapt.formats.export.target import ExportTarget

TARGETS: dict[str, ExportTarget] = {
    "kohya": KOHYA,
    "diffusers": DIFFUSERS,
    "merged": MERGED,
}
DEFAULT_TARGET = "kohya"
