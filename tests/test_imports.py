"""The shape of the source: no cycles, no optional package at the top, nothing that unpickles."""
import ast
import re
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


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = {"torch.load", "torch.serialization.load"}      # they unpickle unless weights_only=True
UNSAFE = {"eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
          "runpy.run_path", "torch.package.PackageImporter"}
UNSAFE_ENDS = ("read_pickle", "_object", "_object_list")       # pandas; collectives of torch.distributed that pickle what they send


def find_danger(source: str) -> list[str]:
    """What in a source can run code that a file or another process gave it, as "line: name"."""
    tree, names, found, safe = ast.parse(source), {}, [], set()     # names: what they stand for; safe: names in calls that are harmless
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if {*f"{module}{alias.name}".split(".")} & {*UNPICKLERS, "*"}:
                    found.append((node, module + alias.name))
                names[alias.asname or alias.name] = module + alias.name

    def resolve(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, keywords = resolve(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in LOADS and keywords.get("weights_only") == "True":
                safe.add(node.func)
            imported = node.args and ast.unparse(node.args[0]).strip("'\"").partition(".")[0] in UNPICKLERS
            if keywords.get("allow_pickle", "False") != "False" or imported and name in ("__import__", "importlib.import_module"):
                found.append((node, name))
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load) and node not in safe:
            name = resolve(node)
            if name in LOADS | UNSAFE or name.endswith(UNSAFE_ENDS):
                found.append((node, name))
    return [f"{node.lineno}: {name}" for node, name in found]


def test_no_source_can_run_code_from_a_file():
    """Tests and benches too: they read what others wrote as well."""
    sources = [path for path in ROOT.rglob("*.py") if not re.search(r"/(\.|runs/)", f"/{path.relative_to(ROOT)}")]
    assert {path.parent.name for path in sources} >= {"tools", "tests", "parity", "recipes", "bench"} and {*SOURCES} < {*sources}
    assert not [f"{path}:{danger}" for path in sources for danger in find_danger(path.read_text())]


@pytest.mark.parametrize("source", [
    "import pickle", "import pickle as p", "from pickle import loads", "from six.moves import cPickle", "import os, dill",
    "import joblib.numpy_pickle", "def f():\n    import shelve", "from marshal import *", "from torch import *",
    "import importlib\nimportlib.import_module('pickle')", "from importlib import import_module as load\nload('_pickle')",
    "__import__('pickle')", "eval('1')", "exec('1')", "f = eval", "map(eval, [])", "import builtins\nbuiltins.exec('1')",
    "from builtins import eval as e\ne('1')", "import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)",
    "import torch\ntorch.load(p, weights_only=flag)", "import torch as t\nt.load(p)", "from torch import load\nload(p)",
    "from torch import load as l\nl(p, map_location='cpu')", "import torch\nread = torch.load", "import torch\ntorch.load(p, **options)",
    "from torch.serialization import load\nload(p)", "import torch.serialization as s\ns.load(p)",
    "import torch.serialization\ntorch.serialization.load(p)", "import numpy as np\nnp.load(p, allow_pickle=True)",
    "from numpy import load\nload(p, allow_pickle=flag)", "import yaml\nyaml.load(p, Loader=yaml.SafeLoader)",
    "from yaml import load\nload(p)", "from yaml import unsafe_load as u\nu(p)", "import pandas\npandas.read_pickle(p)",
    "import torch.distributed as dist\ndist.broadcast_object_list(x)", "from torch.distributed import all_gather_object as g\ng(x, y)",
    "import runpy\nrunpy.run_path(p)", "import torch\ntorch.package.PackageImporter(p)"])
def test_what_could_run_code_from_a_file_is_found(source):
    assert find_danger(source)


@pytest.mark.parametrize("source", [
    "model.eval()", "import torch\ntorch.load(p, weights_only=True)", "from torch import load as l\nl(p, weights_only=True)",
    "import numpy as np\nnp.load(p)", "import numpy as np\nnp.load(p, allow_pickle=False)", "import json\njson.load(p)",
    "import yaml\nyaml.safe_load(p)", "import re\nre.compile('x')", "'import pickle'  # exec", "an_object = 1",
    "import importlib\nimportlib.import_module('json')", "from safetensors.torch import load\nload(p)"])
def test_what_runs_nothing_is_let_through(source):
    assert not find_danger(source)


def test_training_on_the_default_data_imports_no_package_it_does_not_need():
    code = "import sys, train; print([m for m in ('datasets', 'pandas', 'transformers', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_is_small():
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert sum(lengths.values()) <= 5821 and max(lengths.values()) <= 547, lengths
