"""What the README names exists, and its example runs."""
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from args import TrainArgs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TORCHRUN = {"standalone", "nproc-per-node"}
GENERATE = {"prompt"}
WRITTEN_BY_A_RUN = {"metrics.jsonl", "model.safetensors", "optimizer.safetensors", "ema.safetensors", "rng-R.json", "state.json", "args.json",
                    "manifest.json"}
ELSEWHERE = {"trainer_state.json", "data.jsonl", "held_out.jsonl", "big.parquet", "books/*.txt"}      # HF's, and the reader's own


def test_every_file_it_names_exists():
    names = set(re.findall(r"[\w./*-]+\.(?:py|md|txt|svg|jsonl|json|parquet|safetensors)\b", README)) - WRITTEN_BY_A_RUN - ELSEWHERE
    assert len(names) > 15
    assert not [name for name in names if not (ROOT / name).exists()]
    assert (ROOT / "tests" / "parity").is_dir()


def test_every_flag_it_names_is_a_flag():
    known = {field.name for field in dataclasses.fields(TrainArgs)} | TORCHRUN | GENERATE | {"help"}
    flags = set(re.findall(r"(?<!-)--([a-z][a-z0-9_-]*)", README))
    assert len(flags) > 15 and not flags - known


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_every_file_of_the_root_is_in_its_table(path):
    assert f"| `{path.name}` |" in README


def test_every_command_it_names_is_in_the_makefile_and_every_function_in_its_file():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README.split("Python 3.11 and make")[0]):
        assert f"\n{target}:" in makefile
    for functions, name in re.findall(r"^\| [^|]+ \| ((?:`\w+`(?:, )?)+) in `(\w+\.py)`", README, flags=re.MULTILINE):
        for function in re.findall(r"\w+", functions):
            assert re.search(rf"^(?:def|class) {function}\b", (ROOT / name).read_text(), flags=re.MULTILINE), function


def test_its_example_runs(tmp_path):
    example, = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert "eval_worst" in done.stdout and (tmp_path / "line" / "metrics.jsonl").exists()
