"""The rules of the house, read from the imports and the syntax of the package.

Each room imports only rooms below it, no files import one another in a circle, nothing asks a class for its name, and names are
nouns. The tables of exceptions are to become shorter, never longer.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent.parent / "fewstep"


def _drawing() -> ModuleType:
    spec = spec_from_file_location("draw_rooms", PACKAGE.parent / "docs" / "draw_rooms.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawing = _drawing()  # it reads the imports, too

# What each room may import, besides the ground.
BELOW = {
    "config": set(),
    "batch": set(),
    "diffusion": {"batch", "config"},
    "parallel": set(),
    "networks": {"batch", "config", "diffusion", "parallel"},
    "methods": {"batch", "config", "diffusion"},
    "data": {"batch", "config"},
    "evaluation": {"batch", "config", "data"},
    "inference": {"batch", "config", "diffusion", "parallel", "networks", "data", "evaluation"},
    "export": {"batch", "config", "diffusion", "parallel", "networks", "methods", "data", "inference", "training"},
    "training": {"batch", "config", "diffusion", "parallel", "networks", "methods", "data", "evaluation", "inference"},
    "prepare": {"batch", "config", "diffusion", "parallel", "networks", "data"},
    "recipes": {
        "batch",
        "config",
        "diffusion",
        "parallel",
        "networks",
        "methods",
        "data",
        "evaluation",
        "inference",
        "training",
    },
}
BELOW["distill"] = {"batch", "config", "data", "diffusion", "evaluation", "inference", "networks", "parallel", "training"}
TOP = {"cli", "toyworld", "train", "__main__", "__init__"}  # entry points and the toy world: they may import every room
# The floors inside of rooms, the lowest first: a file or folder imports what stands on lower floors, and itself.
FLOORS = {
    "data": (
        ("safe_pickle",),
        ("files",),
        ("controls", "contract", "order"),
        ("folder",),
        ("shards", "mix", "mock", "loader"),
        ("check",),
    ),
    "networks": (
        ("files", "grid", "tokens"),
        ("taps", "causal_attention"),
        ("encoders",),
        ("contract",),
        ("causal",),
        ("analytic", "frozen", "heads", "lora", "saved", "tiny"),
        ("families",),
        ("support", "weights"),
        ("roles",),
    ),
}
HEAVY = {
    *("diffusers", "transformers", "peft", "av", "cv2", "tensorboard", "scipy"),
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp"),  # each as long as torch itself
}
# No names of parameters, variables or fields: a noun says what the thing is.
PARTICIPLES = {"told", "found", "made", "asked", "known", "seen", "said", "shown", "wanted", "kept", "given"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


# --- imports


def test_no_arrow_points_up() -> None:
    wrong: list[str] = []
    for module, targets in drawing.arrows().items():
        room, name = drawing.room_of(module), name_of(drawing.modules()[module])
        allowed = TOP_IMPORTS if room in TOP else set() if room in drawing.GROUND else BELOW[room]
        imported = {drawing.room_of(target) for target in targets} - {room, *drawing.GROUND}
        # `from fewstep import TOY` and __version__ come from the package itself, which imports the ground alone.
        wrong += [f"{name} may not import {other}" for other in sorted(imported - allowed - {"__init__"})]
    assert not wrong, "\n".join(wrong)


TOP_IMPORTS = {*BELOW, *TOP}


def test_no_arrow_points_up_inside_of_a_room() -> None:
    wrong: list[str] = []
    for module, targets in drawing.arrows().items():
        room = drawing.room_of(module)
        for target in targets if room in FLOORS else ():
            if drawing.room_of(target) != room or target.count(".") < 2 or module.count(".") < 2:
                continue
            (own, low), (other, high) = ((word.split(".")[2], _floor(room, word.split(".")[2])) for word in (module, target))
            if own != other and high >= low:
                wrong.append(f"{module} may not import {target}: {other} does not lie below {own} in {room}/")
            if own == other and _family(module) and _family(target) and _family(module) != _family(target):
                wrong.append(f"{module} may not import {target}: no family imports another one")
    assert not wrong, "\n".join(wrong)


def _floor(room: str, name: str) -> int:
    floor = next((number for number, names in enumerate(FLOORS[room]) if name in names), None)
    assert floor is not None, f"{room}/{name} is on no floor: add it to FLOORS in tests/test_rooms.py"
    return floor


def _family(module: str) -> str:
    """The folder of a family: fewstep.networks.families.wan.network -> wan"""
    words = module.split(".")
    return words[3] if words[1:3] == ["networks", "families"] and len(words) > 4 else ""


def test_no_files_import_one_another_in_a_circle() -> None:
    imported = {module: set(targets) for module, targets in drawing.arrows().items()}
    while free := [module for module, targets in imported.items() if not targets & imported.keys()]:
        for module in free:
            del imported[module]
    # What is left is in a circle, or imports one.
    while above := [module for module in imported if not any(module in targets for targets in imported.values())]:
        for module in above:
            del imported[module]
    assert not imported, f"these files import one another in a circle: {sorted(imported)}"


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong: list[str] = []
    for path in files():
        names = set(drawing.imports_of(drawing.tree_of(path).body))
        heavy = {root for name in names for root in HEAVY if name == root or name.startswith(f"{root}.")}
        wrong += [f"{name_of(path)} imports {heavy} at its top: move it into the function that uses it"] if heavy else []
    assert not wrong, "\n".join(wrong)


def test_the_picture_of_the_rooms_is_current() -> None:
    assert drawing.PICTURE.read_text() == drawing.draw(), "run: python docs/draw_rooms.py"


# --- names


def test_nothing_asks_a_class_for_its_name() -> None:
    """`type(x).__name__` is for messages: where it is compared or looked up, a member of a contract is missing."""
    found = {f"{name_of(path)}:{line}" for path in files() for line in _dispatches(drawing.tree_of(path))}
    wrong = sorted(found)
    assert not wrong, f"dispatch by the name of a class: {wrong}"


def _dispatches(tree: ast.Module) -> Iterator[int]:
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and _is_class_name(node.value, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(scope):
            parts: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Subscript):
                parts = [node.slice]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                parts = [node.func.value] if node.func.attr in ("startswith", "endswith", "removesuffix") else []
                parts += node.args[:1] if node.func.attr == "get" else []
            if any(_is_class_name(part, names) for part in parts):
                yield node.lineno


def _is_class_name(node: ast.expr, names: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names
    return isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__")


def test_parameters_variables_and_fields_are_nouns() -> None:
    found = {name_of(path): sorted(set(_names(drawing.tree_of(path))) & PARTICIPLES) for path in files()}
    wrong = {name: words for name, words in found.items() if words}
    assert not wrong, f"participles as names of parameters, variables or fields: {wrong}"


def _names(tree: ast.Module) -> Iterator[str]:
    """The names of all parameters and variables, and of all annotated fields of classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ClassDef):
            yield from (n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


def test_one_kind_of_type_ignore_each_with_its_reason() -> None:
    wrong: list[str] = []
    for path in files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            place = f"{name_of(path)}:{number}"
            if "# type: " + "ignore" in line:
                wrong.append(f"{place}: write # pyright: ignore[rule]  # reason")
            if "# pyright: ignore" in line and not line.partition("# pyright: ignore")[2].partition("]")[2].strip(" #"):
                wrong.append(f"{place}: no rule or no reason")
    assert not wrong, "\n".join(wrong)


# --- what is loaded


def test_every_module_is_ascii() -> None:
    for path in files():
        path.read_text(encoding="ascii")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_and_the_command_loads_no_torch() -> None:
    assert not loaded_by("import fewstep, fewstep.cli, fewstep.config") & (HEAVY | {"torch"})


def test_importing_every_room_loads_torch_at_the_most() -> None:
    assert not loaded_by("import fewstep.recipes, fewstep.training.loop") & HEAVY


def test_the_configuration_imports_no_network() -> None:
    code = "import sys, fewstep.config; print([m for m in sys.modules if m.startswith('fewstep.networks')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
