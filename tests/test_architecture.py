"""The packages of dlref: which may import which, and what works without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# For each package of dlref: the packages of dlref and the third-party packages (None: any) that it may import.
ROOMS = {
    "runtime": ({"runtime"}, {"numpy", "onnxruntime", "PIL", "tokenizers", "matplotlib"}),
    "models": ({"models"}, {"torch", "torchvision.ops", "jaxtyping"}),
    "data": ({"data", "runtime"}, None),
    "tasks": ({"tasks", "models", "training", "runtime"}, None),
    "training": ({"training", "runtime"}, None),
    "export": ({"export", "runtime"}, None),
}


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = [(room, path) for room in ROOMS for path in sorted((ROOT / "dlref" / room).rglob("*.py"))]


@pytest.mark.parametrize(("room", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_each_package_imports_only_what_it_may(room, path):
    rooms, packages = ROOMS[room]
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "dlref" and rest[0] != "__version__":
            assert rest[0] in rooms, f"{path} imports {name}"
        elif packages is not None and top not in sys.stdlib_module_names and top != "dlref":
            assert any(f"{name}.".startswith(f"{package}.") for package in packages), f"{path} imports {name}"


def test_the_commands_cli_and_config_do_not_import_models_or_runners():
    for name in ("train.py", "export.py", "dlref/cli.py", "dlref/config.py"):
        reached = {i.split(".")[1] for i in imports_of(ROOT / name) if i.startswith("dlref.")}
        assert reached <= {"cli", "config", "training", "tasks", "data", "export", "runtime"}
        assert not {i for i in imports_of(ROOT / name) if i.startswith("dlref.runtime.runners")}


def test_the_import_rules_cover_every_package():
    assert {path.name for path in (ROOT / "dlref").iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)


@pytest.mark.parametrize("module", ["dlref", "dlref.runtime", "dlref.runtime.runners.image_classification"])
def test_importing_the_runtime_does_not_import_torch_or_onnx(module):
    code = f"import sys, {module}; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'onnx')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
