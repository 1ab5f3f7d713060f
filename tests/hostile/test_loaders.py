"""No loader of the package runs code of a file, or believes its size: read from the syntax tree, with named exceptions."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fewstep"

# What may be called where it is named here, and why.
EXCEPTIONS = {
    ("load_file", "cli/options.py"): "of config: the user's own --config FILE",
    ("load_file", "inference/command.py"): "the same",
    ("runpy.run_module", "distill/worker.py"): "a command of this package, in a copy of this process",
    ("exec_module", "config/command.py"): "--config FILE.py is the user's own program",
    ("from_pretrained", "networks/files/folders.py"): "the one loader; what it passes is tested below",
    ("from_pretrained", "toyworld/demo/plain_diffusers.py"): "runs pipeline.py of the export that the same demo wrote",
    ("json.loads", "untrusted/text.py"): "the one reader",
    ("json.loads", "networks/encoders/words_alone.py"): "travels with exports, without this package; words.py checks before",
    ("load_file", "networks/encoders/words_alone.py"): "the same",
    ("read_text", "networks/encoders/words_alone.py"): "the same",
    ("read_text", "toyworld/demo/plain_diffusers.py"): "runs without this package",
    ("safe_open", "untrusted/safe_tensors.py"): "the one reader",
}
# Files of the package itself, and text that this process has written or that a library has made.
OWN = (
    *("networks/support.py", "networks/families/published.py", "evaluation/report/page.py", "export/to_diffusers.py"),
    *("prepare/shards.py", "evaluation/report/films.py", "toyworld/release.py", "toyworld/scores.py", "training/resume.py"),
)
MADE_HERE = {
    "json.loads": (
        *(
            "networks/files/folders.py",
            "networks/encoders/text.py",
            "prepare/controls.py",
            "toyworld/dataset.py",
            "inference/generate.py",
        ),
        *("inference/pair_folder.py", "data/loader.py", "toyworld/release.py"),
    )
}
Calls = Iterator[tuple[str, str, ast.Call]]


def calls() -> Calls:
    """The file, the dotted name and the node of each call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node


def says(node: ast.Call, name: str, value: object = ...) -> bool:
    """Whether a call has the keyword, with that value."""
    given = next((word.value for word in node.keywords if word.arg == name), None)
    return given is not None and (value is ... or (isinstance(given, ast.Constant) and given.value == value))


def mode_of(node: ast.Call, place: int) -> str:
    words = [word.value for word in node.keywords if word.arg == "mode"] or node.args[place : place + 1]
    return words[0].value if words and isinstance(words[0], ast.Constant) and isinstance(words[0].value, str) else "r"


# The last word of a call (or two, where one says too little), and what makes it harmless.
FORBIDDEN: dict[str, Callable[[ast.Call], bool]] = {
    "torch.load": lambda node: False,  # untrusted/torch_files.py reads what torch.save writes
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"), lambda node: False),
    **dict.fromkeys(("dcp.load", "checkpoint.load", "FileSystemReader", "DefaultLoadPlanner"), lambda node: False),
    **dict.fromkeys(("jit.load", "hub.load", "hub.load_state_dict_from_url"), lambda node: False),
    "Image.open": lambda node: says(node, "formats"),
    "av.open": lambda node: says(node, "options") or mode_of(node, 1) == "w",
    **dict.fromkeys(("VideoCapture", "imread"), lambda node: False),
    "from_pretrained": lambda node: says(node, "trust_remote_code", False),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load"), lambda node: False),
    **dict.fromkeys(("eval", "exec", "exec_module", "runpy.run_path", "runpy.run_module"), lambda node: False),
    "np.load": lambda node: says(node, "allow_pickle", False),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput"), lambda node: False),
    **dict.fromkeys(("extractall", "unpack_archive"), lambda node: False),
    **dict.fromkeys(("json.load", "json.loads", "safe_open", "load_file", "read_text", "read_bytes"), lambda node: False),
    "open": lambda node: mode_of(node, 1) not in ("r", "rb"),
}


def fits(name: str, forbidden: str, node: ast.Call) -> bool:
    if forbidden in ("eval", "exec", "open"):  # the functions, not methods of these names
        return name == forbidden
    if forbidden in ("read_text", "read_bytes"):  # the methods of paths, not our functions of these names
        return name.endswith(f".{forbidden}") and name != "text.read_text"
    return name == forbidden or name.endswith(f".{forbidden}")


def test_no_loader_runs_what_is_in_a_file() -> None:
    wrong: list[str] = []
    used: set[tuple[str, str]] = set()
    for file, name, node in calls():
        if any(word.arg == "shell" for word in node.keywords):
            wrong.append(f"{file}:{node.lineno} gives {name} a shell")
        for forbidden, is_harmless in FORBIDDEN.items():
            if not fits(name, forbidden, node) or is_harmless(node):
                continue
            if (forbidden, file) in EXCEPTIONS:
                used.add((forbidden, file))
            elif not (file in OWN or file in MADE_HERE.get(forbidden, ())):
                wrong.append(f"{file}:{node.lineno} calls {name}")
    assert not wrong, "\n".join(wrong)
    assert used == EXCEPTIONS.keys(), f"exceptions that nothing needs: {EXCEPTIONS.keys() - used}"


def test_the_one_loader_of_models_runs_no_code_and_takes_no_pickle() -> None:
    """transformers is told to run no code of a folder; both libraries to open no pickle where there are safetensors."""
    loads = [node for file, name, node in calls() if file == "networks/files/folders.py" and name.endswith("from_pretrained")]
    assert len(loads) == 2
    assert any(says(node, "trust_remote_code", False) for node in loads) and any(
        says(node, "use_safetensors") for node in loads
    )
    tree = ast.parse((PACKAGE / "networks/files/folders.py").read_text())
    models = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "load_transformer")
    assert "'trust_remote_code': False" in ast.unparse(models)
