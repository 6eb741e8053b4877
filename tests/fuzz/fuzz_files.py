"""Damaged and hostile files: each loads right or is refused with a documented error, and leaves no trace.

    python tests/fuzz/fuzz_files.py                                     # 10,000 files, 2,000 of other kinds
    python tests/fuzz/fuzz_files.py --only files:4711 --keep kept      # one case again, its file kept

A case is a function of the seed and its number, so a stopped run goes on with --first NUMBER.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases_config
import cases_files

DOCUMENTED = (ValueError, TypeError, OSError)  # see docs/security.md
SECONDS, MEMORY = 20, 2**29  # of one case; bytes above what the process has at the start
KINDS: dict[str, Callable] = {
    "files": cases_files.Files,
    "resized": cases_files.Resized,
    "configs": cases_config.Configs,
}


class Hang(BaseException):
    """A case took longer than SECONDS."""


def run(kind: str, numbers: Iterable[int], *, seed: int = 0, folder: Path) -> tuple[Counter, list[str]]:
    """Outcomes of cases by name, and what failed: a line for each."""
    cases, outcomes, failures = KINDS[kind](folder, seed), Counter(), []
    with limited():
        for number in numbers:
            try:
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                outcomes[outcome(cases, number)] += 1
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                failures.append(f"{kind}:{number} {cases.describe(number)}: {error!r:.300} at {where}")
                cases.renew()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return outcomes, failures


def outcome(cases, number: int) -> str:
    """``loaded`` or the name of the documented error; raises anything else, and where a trace is left."""
    opened = cases.write(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cases.open(number, opened)
        except DOCUMENTED as error:
            if isinstance(error, UnicodeError) or not str(error):
                raise
            cases.check_untouched()
            return type(error).__name__
    cases.check_untouched()
    return "loaded"


@contextmanager
def limited():
    """Within the context memory beyond MEMORY is refused, and SIGALRM raises Hang."""

    def stop(*_):
        raise Hang(f"more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="mutated adapter files (default: 10000)")
    parser.add_argument("--resized", type=int, default=2_000, help="files resized (default: 2000)")
    parser.add_argument("--configs", type=int, default=2_000, help="mutated configurations (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, such as files:4711")
    parser.add_argument("--keep", type=Path, help="folder for the last case's file")
    arguments = parser.parse_args()
    plan = {kind: range(arguments.first, getattr(arguments, kind)) for kind in KINDS}
    if arguments.only:
        kind, _, number = arguments.only.partition(":")
        plan = {kind: [int(number)]}
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for kind, numbers in plan.items():
            start = time.process_time()
            outcomes, failures = run(
                kind, numbers, seed=arguments.seed, folder=arguments.keep or Path(scratch)
            )
            told = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
            seconds = time.process_time() - start
            print(f"{kind}: {len(numbers)} cases, {told}; {len(failures)} failures; {seconds:.0f} s")
            print(*failures, sep="\n")
            failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
