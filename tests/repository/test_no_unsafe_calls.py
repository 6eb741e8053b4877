"""No line of the library or its scripts unpickles, evaluates text, or runs code that a download brings."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("diffadapt", "train_scripts", "eval")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in CODE if path.is_relative_to(ROOT / "diffadapt")]

# writes a file for the benchmark's rival, which reads no other kind
ALLOWED = {"eval/benchmarks/evaluation_speed.py": ["calls torch.save"]}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "torch.save", "torch.hub.load"),
}
# what may read pickles, and the option that it then must be given
WEIGHTS_ONLY = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def name_of(node: ast.expr) -> str:
    """``torch.hub.load`` of an expression; empty for other callables."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def faults(source: str) -> list[str]:
    """What must not be in a file, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        found += [f"{node.lineno}: imports {name}" for name in imported if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {fault}" for fault in _call_faults(node)]
    return found


def _call_faults(call: ast.Call) -> list[str]:
    name, given = name_of(call.func), {word.arg: word.value for word in call.keywords}
    found = [f"calls {name}"] if name in CALLS else []
    if name in WEIGHTS_ONLY:
        option, wanted = WEIGHTS_ONLY[name]
        value = given.get(option)
        if not isinstance(value, ast.Constant) or value.value is not wanted:
            found.append(f"calls {name} without {option}={wanted}")
    trusted = given.get("trust_remote_code")
    if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
        found.append(f"{name} trusts remote code")
    shell = given.get("shell")
    if isinstance(shell, ast.Constant) and shell.value:
        found.append(f"{name} starts a shell")
    return found


def test_no_file_unpickles_evaluates_or_trusts_remote_code():
    faults_by_file = {}
    for path in CODE:
        unsafe = [fault.partition(": ")[2] for fault in faults(path.read_text(encoding="utf-8"))]
        if unsafe:
            faults_by_file[path.relative_to(ROOT).as_posix()] = unsafe
    assert faults_by_file == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import torch; torch.load(f)", "eval(text)"),
        *("torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "np.load(f)", "yaml.load(f)"),
        *("AutoModel.from_pretrained(n, trust_remote_code=True)", "subprocess.run(c, shell=True)"),
        *("load(n, trust_remote_code=given)", "torch.save(x, f)", "__import__(name)", "os.system(c)"),
    ],
)
def test_such_a_line_would_be_found(line):
    assert len(faults(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)"),
        *("model.eval()", "torch.compile(model)", "f(trust_remote_code=False)", "re.compile(x)"),
    ],
)
def test_harmless_lines_are_not(line):
    assert faults(line) == []


def test_weights_of_pretrained_models_are_read_as_safetensors():
    without_weights = ("Tokenizer", "ImageProcessor", "Config")
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name_of(node.func).endswith(".from_pretrained"):
                options = {word.arg for word in node.keywords}
                class_name = name_of(node.func).split(".")[0]
                reads_safetensors = "use_safetensors" in options or class_name.endswith(without_weights)
                assert reads_safetensors, f"{path}, line {node.lineno}"


def test_nothing_pickled_lies_in_the_package():
    endings = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npy"}
    assert [path for path in (ROOT / "diffadapt").rglob("*") if path.suffix in endings] == []
