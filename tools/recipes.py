"""Runs the recipes, each in a process and a new folder, and shows what they reach on held-out data beside the baseline they have to beat.

    python -m tools.recipes [NAME ...] [--seeds 1,2,3]      all, with one seed: make recipes

Ends with exit code 1 if one does not beat its baseline for every seed. Lines: of the script, without its docstring and empty lines, that
is, all in which the task differs from train.py.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

RECIPES = Path(__file__).parent.parent / "recipes"


def names() -> list[str]:
    """The recipes that evaluate something; optimizers.py is a choice of optimizers for the default task."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if "\nMETRIC" in path.read_text())


def own_lines(name: str) -> int:
    text = (RECIPES / f"{name}.py").read_text()
    code = text.split('"""', 2)[2]
    return sum(1 for line in code.splitlines() if line.strip())


def run(name: str, seed: int) -> tuple[float, float, float]:
    """(metric, baseline, seconds) of one run."""
    module = importlib.import_module(f"recipes.{name}")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", f"recipes.{name}", "--output_dir", folder, "--seed", str(seed), "--disable_tqdm"],
                              capture_output=True, text=True, check=False, cwd=RECIPES.parent)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"recipes.{name} --seed {seed} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
        with open(os.path.join(folder, "eval_results.json")) as file:
            results = json.load(file)
    return results[module.METRIC], results["eval_baseline"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--seeds", default="1", help="with commas [%(default)s]")
    flags = parser.parse_args()
    worse = []
    print("| recipe | metric | seeds | mean | baseline | seconds | lines |\n|---|---|---|---|---|---|---|")
    for name in flags.names or names() or sys.exit("no recipe was found"):
        module = importlib.import_module(f"recipes.{name}")
        less = getattr(module, "LESS_IS_BETTER", False)
        found = [run(name, int(seed)) for seed in flags.seeds.split(",")]
        values, baseline = [value for value, _, _ in found], found[0][1]
        worse += [name] if not all(value < base if less else value > base for value, base, _ in found) else []
        print(f"| {name} | {module.METRIC.removeprefix('eval_')}{' (less is better)' * less} | {', '.join(f'{v:.4g}' for v in values)} | {mean(values):.4g} "
              f"| {baseline:.4g} | {mean(seconds for *_, seconds in found):.0f} | {own_lines(name)} |", flush=True)
    if worse:
        sys.exit(f"not better than their baseline: {', '.join(worse)}")


if __name__ == "__main__":
    main()
