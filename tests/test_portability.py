"""The same text on every system and in every locale; nothing is imported that some systems do not have."""

import ast
import os
from pathlib import Path

import pytest

from diffadapt import files

ROOT = Path(__file__).parents[1]
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
        is_of_this_project = name in ("read_text", "files.read_text")  # diffadapt.files opens as UTF-8
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf_8(path):
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    lines = [call.lineno for call in calls if reads_text_of_any_encoding(call)]
    assert lines == []


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


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_some_systems_lack_is_asked_for_before_it_is_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try | ast.If):
            guarded |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in guarded:
            assert NOT_EVERYWHERE.isdisjoint(alias.name for alias in node.names), node.lineno
        if isinstance(node, ast.Attribute) and node.attr in POSIX_ONLY:
            assert node in guarded, (node.lineno, node.attr)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffgrüne Äpfel\n".encode())
    assert files.read_text(path) == "grüne Äpfel\n"


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("grüne Äpfel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text .*save it as UTF-8"):
        files.read_text(path)


def test_folders_are_not_synced_where_the_system_opens_none(tmp_path, monkeypatch):
    opened = []
    system_open = os.open

    def windows_open(path, flags, *arguments):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(flags)
        return system_open(path, flags, *arguments)

    monkeypatch.setattr(files, "ON_WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    files.write_atomically(tmp_path / "new" / "a.txt", lambda path: path.write_bytes(b"a"))
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"a"
    assert opened[-1] == os.O_RDWR  # Windows syncs only files that are open for writing
