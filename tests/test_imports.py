"""The architecture as a test: who may import whom, and which processes stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "flume_protos": set(),
    "flume_kernels": set(),
    "flume_common": {"flume_protos"},
    "flume_router": {"flume_protos", "flume_common"},
    "flume_controller": {"flume_protos", "flume_common"},
    "flume_attention": {"flume_protos", "flume_common", "flume_kernels"},
    "flume_weight": {"flume_protos", "flume_common", "flume_kernels"},
}
HOME = {
    path.name: path
    for folder in ("protos", "kernels", "services/*")
    for path in ROOT.glob(f"{folder}/flume_*")
    if path.is_dir()
}


def imported(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_every_package_has_its_place_in_the_picture():
    assert HOME.keys() == ALLOWED.keys()


@pytest.mark.parametrize("package, allowed", ALLOWED.items(), ids=ALLOWED)
def test_packages_import_only_what_the_picture_shows(package, allowed):
    for source in HOME[package].rglob("*.py"):
        ours = {name for name in imported(source) if name.startswith("flume_")} - {package}
        assert ours <= allowed, source


@pytest.mark.parametrize(
    "folder", ["services", "kernels", "protos", *(f"services/{n.name}" for n in ROOT.glob("services/*"))]
)
def test_folders_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


LEAN = {
    "router": ["flume_router"],
    "controller": ["flume_controller"],
    "weight supervisor": ["flume_weight.__main__"],
    "attention supervisor": ["flume_attention.__main__"],
}


@pytest.mark.parametrize("modules", LEAN.values(), ids=LEAN)
def test_the_control_plane_never_loads_torch(modules):
    code = (
        "import importlib, pkgutil, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for found in pkgutil.walk_packages(getattr(module, '__path__', []), name + '.'):\n"
        "        if not found.name.endswith('__main__'):\n"
        "            importlib.import_module(found.name)\n"
        "heavy = sorted({'torch', 'transformers', 'ucxx'} & set(sys.modules))\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
