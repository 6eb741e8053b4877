"""What the README says, done."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import diffadapt as da

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_the_first_two_commands_are_the_main_job_and_the_tests():
    assert [block.strip() for block in blocks("bash")[:2]] == [
        "python -m pip install -e . -c constraints.txt && "
        "accelerate launch --config_file accelerate_config.yaml train_scripts/dreambooth.py --adapter flora",
        'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest',
    ]


def test_the_python_example_runs_and_leaves_the_pipeline_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks("python")[0], names)
    assert (tmp_path / "parrot.safetensors").is_file()
    assert names["adapter"].merged
    assert names["adapter"].strength == 0.8


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_named_path_of_the_table_exists():
    table = README.split("## Where things are")[1].split("## ")[0]
    for name in re.findall(r"`([\w/.]+)`", table):
        assert list(ROOT.glob(name)) or list(ROOT.glob(f"*/{name}")), name


def test_every_method_is_named():
    named = set(re.findall(r"`([\w]+)`", README.split("## Methods")[1].split("##")[0]))
    assert set(da.METHODS) <= named


@pytest.mark.parametrize("block", blocks("bash")[2:])
def test_the_options_of_every_command_exist(block, monkeypatch, capsys):
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    for command in commands:
        if command[0] == "diffadapt":
            program, further = ROOT / "diffadapt" / "__main__.py", [command[1]]
        else:
            script = next(word for word in command if word.endswith(".py"))
            program, further = ROOT / script, []
            command = command[command.index(script) :]  # what stands before it is for the launcher
            monkeypatch.syspath_prepend(program.parent)
        monkeypatch.setattr(sys, "argv", [program.name, *further, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(program), run_name="__main__")
        assert end.value.code == 0
        words = capsys.readouterr().out.replace(",", " ").split()
        for word in command:
            assert not word.startswith("--") or word in words, (word, program)
