"""Commands that start a training script: by its path in a clone, by its module in an installed package."""

import shlex
import sys

PACKAGE = "diffadapt.scripts"  # where `train_scripts/` is installed


def module_started() -> str | None:
    """The module that this process runs, as `diffadapt.scripts.dreambooth`; None when it runs a file."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is None or not specification.name.startswith(f"{PACKAGE}."):
        return None
    return specification.name


def start_command(script: str) -> str:
    """The beginning of a command that starts a training script, in the form this process was started in.

    Args:
        script: `dreambooth`, `style_transfer` or `class_conditional`.
    """
    if module_started():
        return f"accelerate launch -m {PACKAGE}.{script}"
    return f"accelerate launch --config_file accelerate_config.yaml train_scripts/{script}.py"


def this_command(*arguments: str) -> str:
    """The command of this process with more arguments, to be repeated in a shell."""
    module = module_started()
    script = ["-m", module] if module else sys.argv[:1]
    return f"accelerate launch {shlex.join([*script, *sys.argv[1:], *arguments])}"
