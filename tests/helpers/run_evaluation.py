"""Runs command lines of the scripts in eval/ one after the other; started as one process or as several."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT / "tests" / "evaluation")]


def run_all(commands):
    """Each a list: the script's name, then its arguments."""
    for script, *arguments in commands:
        assert importlib.import_module(script).main(arguments) == 0, script


def refuse(source, target):
    raise AssertionError(f"{target} is written by another process than the first")


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        os.replace = refuse  # every file of a result is written under another name, then renamed
    run_all(json.loads(sys.argv[1]))
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout.days == 1  # the others wait while the first one scores
