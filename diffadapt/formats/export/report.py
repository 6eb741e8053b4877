"""The report of an export: what was written, which programs read it and how exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffadapt.formats.export.verify import Verdict


@dataclass(frozen=True)
class ExportReport:
    """The outcome of one export.

    Attributes:
        path: of the file or folder.
        to: the kind of file.
        layers: number of layers changed.
        verdicts: of the programs that read such files, from re-stating their arithmetic.
        meant_for: the programs it must be right in to be written.
        base_only: whether it holds whole differences, which are right on this base alone.
        lost_in_rounding: share of the change lost to half precision.
        rank_error: share of the change that a cut to `rank` left out; 0 where nothing was cut.
        note: what else its user must know.
    """

    path: Path
    to: str
    layers: int
    verdicts: tuple[Verdict, ...]
    meant_for: tuple[str, ...]
    base_only: bool = False
    lost_in_rounding: float = 0.0
    rank_error: float = 0.0
    note: str = ""

    @property
    def accepted_by(self) -> tuple[str, ...]:
        """The programs that give the adapter's weights from it."""
        return tuple(verdict.program for verdict in self.verdicts if verdict.accepted)

    @property
    def max_error(self) -> float:
        """The largest difference from the live adapter's weights in a program that accepts the file."""
        errors = [verdict.max_error for verdict in self.verdicts if verdict.accepted]
        return max(errors, default=math.inf)

    @property
    def good(self) -> bool:
        """Whether every program the file is meant for gives what it should."""
        return set(self.meant_for).issubset(self.accepted_by)

    def verdict(self, program: str) -> Verdict:
        """The verdict of one program, by name."""
        return next(verdict for verdict in self.verdicts if verdict.program == program)

    @property
    def line(self) -> str:
        """The report in one line."""
        accepted = ", ".join(self.accepted_by) or "no program"
        text = f"{self.path}: right in {accepted} (maximum error {self.max_error:.1e})"
        return f"{text}; {self.note}" if self.note else text

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layers} layers, for {', '.join(self.meant_for)}"]
        lines += [f"  {verdict}" for verdict in self.verdicts]
        lines.append(
            f"  maximum error {self.max_error:.1e}; accepted by {', '.join(self.accepted_by) or 'none'}"
        )
        if self.rank_error:
            lines.append(f"  the cut to a lower rank leaves out {self.rank_error:.1%} of the change")
        if self.lost_in_rounding:
            lines.append(f"  {self.lost_in_rounding:.2%} of the change is lost to rounding")
        if self.note:
            lines.append(f"  {self.note}")
        if self.base_only:
            lines.append("  it holds whole differences of weights: valid for this base only")
        return "\n".join(lines)
