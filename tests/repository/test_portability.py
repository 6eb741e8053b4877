"""The same text on every system and in every locale; nothing is imported that some systems do not have."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pipelines import tiny_sd_pipeline, write_pictures

from diffadapt.common import atomic_files

ROOT = Path(__file__).parents[2]
FOLDERS = ("diffadapt", "train_scripts", "eval", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "diffadapt")]
NOT_EVERYWHERE = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "msvcrt", "winreg"}
POSIX_ONLY = {"fork", "geteuid", "getuid", "sched_getaffinity", "killpg", "SIGHUP", "SIGKILL", "SIGALRM"}


def reads_text_of_any_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file as text and names no encoding, so that the locale decides."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    if method in ("read_text", "write_text"):
        is_of_this_project = name in ("read_text", "atomic_files.read_text")  # opens as UTF-8
        return not is_of_this_project
    if method in ("run", "Popen", "check_output") and name.startswith("subprocess."):
        return "text" in keywords
    if name == "open" or (method == "open" and isinstance(call.func, ast.Attribute)):
        position = 1 if name == "open" else 0
        if len(call.args) > position and isinstance(call.args[position], ast.Constant):
            mode = call.args[position].value
        elif "mode" in keywords:
            mode = ast.literal_eval(keywords["mode"])
        else:
            mode = "r" if name == "open" or not call.args else "rb"  # Image.open(path) takes no mode
        return isinstance(mode, str) and "b" not in mode
    return False


@pytest.mark.slow
def test_every_text_file_is_opened_as_utf_8():
    places = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and reads_text_of_any_encoding(node):
                places.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert places == []


@pytest.mark.parametrize(
    "line",
    [
        *("path.read_text()", "path.write_text(text)", "open(path)", "open(path, 'w')", "path.open()"),
        *("path.open('a')", "path.open(mode='r')", "subprocess.run(command, text=True)"),
    ],
)
def test_a_line_that_leaves_the_encoding_to_the_locale_is_found(line):
    assert reads_text_of_any_encoding(ast.parse(line).body[0].value)


@pytest.mark.parametrize(
    "line",
    [
        *("path.read_text(encoding='utf-8')", "open(path, 'rb')", "path.open('wb')", "Image.open(path)"),
        *("read_text(path)", "subprocess.run(command)", "os.open(path, os.O_RDONLY)"),
    ],
)
def test_lines_without_text_or_with_an_encoding_are_not(line):
    assert not reads_text_of_any_encoding(ast.parse(line).body[0].value)


def unguarded_uses(source: str) -> list[str]:
    """What some systems lack, imported or called outside of `try` and `if`."""
    tree = ast.parse(source)
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try | ast.If):
            guarded |= set(ast.walk(node))
    uses = []
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            uses += [f"line {node.lineno}: {name.name}" for name in node.names if name.name in NOT_EVERYWHERE]
        if isinstance(node, ast.Attribute) and node.attr in POSIX_ONLY:
            uses.append(f"line {node.lineno}: {node.attr}")
    return uses


def test_what_some_systems_lack_is_asked_for_before_it_is_used():
    uses_by_file = {}
    for path in LIBRARY:
        uses = unguarded_uses(path.read_text(encoding="utf-8"))
        if uses:
            uses_by_file[path.relative_to(ROOT).as_posix()] = uses
    assert uses_by_file == {}


@pytest.mark.parametrize("line", ["import resource", "os.killpg(1, 2)", "signal.SIGHUP"])
def test_a_line_that_fails_on_some_systems_is_found(line):
    assert len(unguarded_uses(line)) == 1
    assert unguarded_uses(f"if hasattr(os, 'x'):\n    {line}") == []


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffgrüne Äpfel\n".encode())
    assert atomic_files.read_text(path) == "grüne Äpfel\n"


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("grüne Äpfel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text .*save it as UTF-8"):
        atomic_files.read_text(path)


def test_folders_are_not_synced_where_the_system_opens_none(tmp_path, monkeypatch):
    opened = []
    system_open = os.open

    def windows_open(path, flags, *arguments):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(flags)
        return system_open(path, flags, *arguments)

    monkeypatch.setattr(atomic_files, "ON_WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    atomic_files.write_atomically(tmp_path / "new" / "a.txt", lambda path: path.write_bytes(b"a"))
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"a"
    assert opened[-1] == os.O_RDWR  # Windows syncs only files that are open for writing


WITHOUT_RESOURCE = """
import builtins, runpy, sys

system_import = builtins.__import__


def import_as_on_windows(name, variables=None, *arguments, **named):
    # other packages import it where the platform's name is not Windows
    if name == "resource" and (variables or {}).get("__name__", "").startswith("diffadapt"):
        raise ModuleNotFoundError(name)
    return system_import(name, variables, *arguments, **named)


builtins.__import__ = import_as_on_windows
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_training_needs_neither_the_module_resource_nor_a_utf_8_locale(tmp_path):
    pictures = Path(write_pictures(tmp_path / "mine", 2))
    for picture in pictures.glob("*.png"):
        picture.with_suffix(".txt").write_bytes("\ufeffein süßer “Kater”".encode())
    values = {
        "pretrained_model_name_or_path": tiny_sd_pipeline(tmp_path / "base"),
        "instance_data_dir": pictures,
        "instance_prompt": "a sks dog",
        "output_dir": tmp_path / "out",
        "max_train_steps": 1,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        "mixed_precision": "no",
        "num_threads": 1,
    }
    options = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    script = ROOT / "train_scripts" / "dreambooth.py"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RESOURCE, script, *options, "--instance_captions"],
        env={**os.environ, **locale, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "“a sks dog”" in card
    assert "peak_memory_bytes" not in (tmp_path / "out" / "run.json").read_text(encoding="utf-8")
