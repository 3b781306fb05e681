"""What the README and its picture name exists, and the README's example runs."""
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
PICTURE = (ROOT / "docs" / "batch.svg").read_text()
BLOCKS = re.findall(r"^    (.+)", README, flags=re.MULTILINE)                            # indented: commands
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)                                # without the example
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
CODE = [line.partition("#")[0] for line in BLOCKS] + SPANS

TORCHRUN = {"standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts", "signals-to-handle", "shutdown-timeout", "no-deps"}
SLURM = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "signal"}
WRITTEN_BY_A_RUN = {"metrics.jsonl", "model.safetensors", "optimizer-R.safetensors", "adapter_model.safetensors", "adapter_config.json", "config.json", "ema-R.safetensors", "rng-R.json", "state.json",
                    "args.json", "manifest.json", "status.json", "train_results.json", "eval_results.json", "test_results.json", "all_results.json", "sweep.md", "sweep.json"}
HF_WRITES = {"trainer_state.json"}


def is_path(word: str) -> bool:
    """Words of code with a slash or a known ending; bare .name is an attribute, and runs/, mine/ and hf/ are the reader's own."""
    path = "/" in word or re.search(r"\w\.(py|md|txt|toml|svg|json|jsonl|csv|parquet|safetensors)$", word)
    return bool(path) and not word.startswith(("runs/", "mine/", "hf/", "OWNER/", "checkpoint-", ".venv/")) and word not in WRITTEN_BY_A_RUN | HF_WRITES


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_path_and_module_it_names_exists():
    words = [word.strip("'\",;()") for code in CODE for word in code.split()]
    names = {word for word in words if is_path(word)} | set(re.findall(r"(?<![\w/])\w+\.py\b", PROSE))
    names |= set(re.findall(r"\]\(([^)]+)\)", README))                                  # links
    names |= {module.replace(".", "/") + ".py" for module in re.findall(r"python -m ([\w.]+)", README)}
    assert {"docs/batch.svg", "tools/generate.py", "tests/", "train.py", "LOG.md"} <= names
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_every_file_its_picture_names_exists():
    names = set(re.findall(r"\b\w+\.py\b", PICTURE))
    assert len(names) >= 10
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_every_flag_it_names_is_a_flag():
    tools = {flag for path in (ROOT / "tools").glob("*.py") for flag in re.findall(r'add_argument\("--(\w+)"', path.read_text())}
    known = {field.name for field in dataclasses.fields(TrainArgs)} | tools | TORCHRUN | SLURM | {"help", "logdir"}
    flags = set(re.findall(r"(?<![\w|-])--([a-z][\w-]*)", README))
    assert {"output_dir", "prompt", "nproc-per-node"} <= flags
    assert not flags - known


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_every_file_of_the_root_is_in_its_file_table(path):
    assert f"\n| `{path.name}` | " in section("The files")


def test_every_function_it_sends_a_reader_to_is_in_the_file_it_names():
    found = re.findall(r"((?:`\w+`(?:, )?)+) in `(\w+\.py)`", section("I want to change..."))
    assert len(found) >= 11
    for functions, name in found:
        for function in re.findall(r"\w+", functions):
            assert re.search(rf"^(?:def|class) {function}\b", (ROOT / name).read_text(), flags=re.MULTILINE), f"{function} in {name}"


def test_every_make_target_it_names_is_in_the_makefile():
    targets = {target for code in CODE for target in re.findall(r"\bmake (\w+)", code)}
    assert {"train", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)]


def test_its_example_trains_evaluates_and_predicts(tmp_path):
    example, = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'eval_accuracy': 1.0" in done.stdout and "tensor([[" in done.stdout     # learnt, stopped by the callback, predicted
    assert (tmp_path / "runs" / "sign" / "metrics.jsonl").exists()
