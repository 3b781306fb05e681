"""The shape of the source: no cycles, no optional package at the top, nothing that unpickles."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("*.py"))
REQUIRED = {"torch", "numpy", "safetensors", "tqdm"}     # datasets costs 0.6 s, so it is imported where it is used


def imports(path: Path, top_only: bool) -> set[str]:
    """First parts of the modules a file imports when it runs (not those under `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text())
    found = set()
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_import_graph_of_the_root_is_acyclic():
    names = {path.stem for path in SOURCES}
    graph = {path.stem: imports(path, top_only=True) & names for path in SOURCES}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_no_root_file_imports_an_optional_package_at_the_top():
    ours = {path.stem for path in SOURCES}
    for path in SOURCES:
        extra = imports(path, top_only=True) - ours - REQUIRED - set(sys.stdlib_module_names)
        assert not extra, f"{path.name} imports {extra}"


def test_no_root_file_imports_train():
    for path in SOURCES:
        assert "train" not in imports(path, top_only=False), path


@pytest.mark.parametrize("folder", ["", "tools", "tests", "recipes", "bench"])
def test_no_source_can_run_code_from_a_file(folder):
    for path in (ROOT / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        assert not imports(path, top_only=False) & {"pickle", "dill", "shelve", "marshal"}, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "yaml.load"), f"{path}:{call.lineno}"
            if name == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), f"{path}:{call.lineno}"


def test_training_on_the_default_data_imports_no_package_it_does_not_need():
    code = "import sys, train; print([m for m in ('datasets', 'pandas', 'transformers', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_is_small():
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) <= 3500
