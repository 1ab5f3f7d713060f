"""The one-way rule: each room imports only what stands in its row. An arrow that points up fails here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fewstep"
GROUND = {
    "errors",
    "environment",
    "files",
    "progress",
    "registry",
    "solvers",
}  # every room may import these
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
TOP = {"cli", "toyworld", "train", "__main__", "__init__"}  # verbs: they may import every room
HEAVY = {
    *("diffusers", "transformers", "peft", "av", "cv2", "tensorboard", "scipy"),
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp"),  # each as long as torch itself
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, at_top: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_top else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up(path: Path) -> None:
    room = room_of(path)
    if room in TOP:
        return
    asked = {name.split(".")[1] for name in imports(path) if name.startswith("fewstep.")}
    if room in GROUND:
        assert asked <= GROUND, f"{path} may not import {sorted(asked - GROUND)}"
        return
    asked -= GROUND
    assert asked <= BELOW[room] | {room}, f"{path} may not import {sorted(asked - BELOW[room] - {room})}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    heavy = {root for name in imports(path, at_top=True) for root in HEAVY if name == root or name.startswith(f"{root}.")}
    assert not heavy, f"{path} imports {heavy} at its top: move it into the function that uses it"


def test_every_module_is_ascii() -> None:
    for path in modules():
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
