"""What happened in a run, or in several beside each other, as one HTML file that needs nothing else: curves, settings, checkpoints, results.

    python -m tools.report runs/a                             # writes runs/a/report.html
    python -m tools.report runs/a runs/b --out both.html      # curves of both in one picture each, and the settings in which they differ

Nothing in a run's folder is believed or run: what cannot be read is named at the top of the page, and every text is escaped.
"""
from __future__ import annotations

import argparse
import contextlib
import html
import json
import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from args import TrainArgs
from rundir import check_files, holds_run, list_checkpoints, read_manifest
from state import UsageError, run_main
from storage import MAX_JSON_BYTES, alike, read_json, reading, show

COLOURS = 9             # after Okabe and Ito 2008: they can be told apart by the colour-blind too
MAX_POINTS = 3000       # that are drawn of a curve
MAX_MEANS = 300         # of the time of an update
MAX_SAMPLES, MAX_SAMPLE_CHARS = 20, 2000
HEIGHT = 10_000         # of a plot in its own units; along x they are updates
FAR = 1e8               # where coordinates end
HUGE = 1e250            # what is larger counts as infinite, and what is smaller than its inverse as 0
EVENTS = {"nan_steps": "not finite", "empty_steps": "empty", "skipped_steps": "not applied"}       # updates since the last row, by callbacks.py
HEIGHTS = {"nan": 480, "skip": 840}       # of marks: values that are not finite, updates left out


@dataclass
class History:
    """What could be read of a run."""

    folder: str
    name: str
    number: int         # also that of its colour
    prefix: str         # of its curves' names
    series: dict[str, tuple] = field(default_factory=dict)              # of each key of its rows: steps (n,), values (n,), NaN if not finite
    samples: list[tuple[str, str]] = field(default_factory=list)        # where from, text
    args: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)                           # state and environment
    checkpoints: list[tuple] = field(default_factory=list)              # step, bytes or None, what is wrong
    results: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noting(self, folder: str, name: str) -> Iterator[None]:
        """What a file that cannot be read would raise becomes a line of the report."""
        try:
            with reading(folder, name):
                yield
        except UsageError as error:
            self.problems.append(str(error))


def read_history(run: History) -> History:
    """Fills in what its folder tells."""
    with run.noting(run.folder, "metrics.jsonl"):
        read_rows(run)
    run.series = {key: (np.array(steps, np.int64), np.array(values, np.float64)) for key, (steps, values) in run.series.items() if steps}
    with run.noting(run.folder, "status.json"):
        run.about = read_json(run.folder, "status.json")
        if run.about.get("started") is not None:
            run.about["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.about["started"]))
        run.about["state"] = {"running": "running, or killed since"}.get(str(run.about["state"]), run.about["state"])
    read_checkpoints(run)
    read_results(run)
    return run


def read_rows(run: History) -> None:
    """metrics.jsonl by columns."""
    path, odd = os.path.join(run.folder, "metrics.jsonl"), Counter()
    for row in parse_lines(run, path):
        step = row.pop("step", None)
        if not alike(step, 0):
            odd["step"] += 1
            continue
        for key, value in row.items():
            if type(value) in (int, float):
                steps, values = run.series.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value) * (abs(value) * HUGE > 1) if abs(value) < HUGE else math.nan)
            elif "sample" in key:
                run.samples.append((f"update {step:,}, {show(key)}", value if isinstance(value, str) else json.dumps(value)))
            elif value is not None:
                odd[key] += 1
    run.problems += [f"{path}: {show(key)!r} is no number in {count:,} rows, where it was left out" for key, count in odd.items()]


def parse_lines(run: History, path: str) -> Iterator[dict]:
    """The objects in a file of JSON lines. A last line without its end was being written; others that are no objects are told."""
    bad = []
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("it is no plain file")
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES), b""), 1):
            if len(line) == MAX_JSON_BYTES:
                raise ValueError(f"line {number:,} is longer than {MAX_JSON_BYTES:,} bytes; what follows was not read")
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                bad.append(number)
    if bad:
        run.problems.append(f"{path}: lines that are no JSON objects were left out: {len(bad):,}, the first is line {bad[0]:,}")


def read_checkpoints(run: History) -> None:
    """What each one is, without its contents; arguments and environment from the newest."""
    steps = list_checkpoints(run.folder)
    for step in steps:
        path, size, problem = os.path.join(run.folder, f"checkpoint-{step}"), None, ""
        try:
            manifest = read_manifest(path)
            check_files(path, manifest, ranks=0)        # names and sizes
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            run.about = {**{key: manifest[key] for key in ("torch", "python", "format")}, **run.about}
        except UsageError as error:
            problem = str(error).removeprefix(path + os.sep)
        run.checkpoints.append((step, size, problem))
    if steps:
        newest = os.path.join(run.folder, f"checkpoint-{steps[0]}")
        with run.noting(newest, "args.json"):
            run.args = read_json(newest, "args.json")
    else:
        run.problems.append(f"{run.folder} has no checkpoint, so its arguments and environment are not known")


def read_results(run: History) -> None:
    """Files of results, and what the end of the training logged beside them."""
    for file in sorted(file for file in os.listdir(run.folder) if file.endswith("_results.json")):
        with run.noting(run.folder, file):
            for key, value in read_json(run.folder, file).items():
                run.results[key if repr(run.results.get(key, value)) == repr(value) else f"{key} in {file}"] = value
    run.results = {key: float(values[-1]) for key, (_, values) in run.series.items() if is_result(key)} | run.results
    run.results |= {key: f"{value / 1e6:,.1f} MB" for key, value in run.results.items() if "_mem_" in key and alike(value, 0.0)}


def is_result(key: str) -> bool:
    return key.startswith("train_") or key == "total_flos" or "_mem_" in key


def find_best(run: History) -> tuple[str, int, float] | None:
    """(key, step, value) of the best evaluation by --metric_for_best_model, else by eval_loss; of equal ones the first."""
    name = str(run.args.get("metric_for_best_model") or "loss")
    key = name if name.startswith("eval_") else f"eval_{name}"
    steps, values = run.series.get(key, ((), ()))
    if not np.isfinite(values).any():
        return None
    at = int((np.nanargmax if run.args.get("greater_is_better") is True else np.nanargmin)(values))
    return key, int(steps[at]), float(values[at])


class Curve(NamedTuple):
    run: int
    label: str
    colour: int
    style: str              # class: thin, thick, best (a single point), area (down to the next one), pale (thinned),
    steps: np.ndarray       # or a kind of mark, which has no values
    values: np.ndarray | None = None


class Axis(NamedTuple):
    """From low to high; if it is logarithmic, these are powers of ten."""

    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Coordinates down from the top of a plot."""
        values = np.log10(values) if self.log else values
        return np.clip((self.high - values) / (self.high - self.low) * HEIGHT, -FAR, FAR)

    def ticks(self, number: int = 5) -> list[tuple[float, str]]:
        """(value, text) at round places."""
        low, high, span = self.low, self.high, self.high - self.low
        if self.log and span >= 1:
            powers = range(math.floor(low), math.floor(high) + 1, math.ceil(span / 6))
            found = [m * 10.0**k for k in powers for m in ((1, 2, 5) if span < 3 else (1,))]
            return [(value, tick_text(value)) for value in found if low <= math.log10(value) <= high]
        low, high = (10**low, 10**high) if self.log else (low, high)
        unit = 10.0 ** math.floor(math.log10((high - low) / number))
        step = next(unit * m for m in (1, 2, 5, 10, 20) if (high - low) / (unit * m) <= number)
        return [(k * step, tick_text(k * step)) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_text(value: float) -> str:
    size, unit = next((pair for pair in ((1e6, "M"), (1e3, "k")) if abs(value) >= 10 * pair[0]), (1, ""))
    return f"{value / size:.9g}{unit}"


def fit(curves: list[Curve]) -> list[Axis]:
    """The range of all values, from 0 on if that is near, and a logarithmic one, but for areas, which start at 0, and if a value has no logarithm."""
    finite, area = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves]), curves[0].style == "area"
    least, most = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    low, high = 0.0 if 0 <= least and (least < 0.25 * most or area) else least, most
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.1 * abs(low) or 1), high + (0.1 * abs(high) or 1)
    axes = [Axis(low - 0.04 * (high - low) * (low != 0), high + 0.06 * (high - low))]
    if not area and least > 0 and most > 1.001 * least:
        low, high = math.log10(least), math.log10(most)
        axes.append(Axis(low - 0.04 * (high - low), high + 0.06 * (high - low), True))
    return axes


def thin(curve: Curve) -> Curve:
    """A long curve with MAX_POINTS values, and up to half more where some are not finite: the smallest and largest of each bucket, and a gap if it has one."""
    if len(curve.values) <= MAX_POINTS:
        return curve
    kept = {0, len(curve.values) - 1}
    for bucket in np.array_split(np.arange(len(curve.values)), MAX_POINTS // 2):
        values = curve.values[bucket]
        finite = np.isfinite(values)
        kept |= {int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])} if finite.any() else set()
        kept |= set() if finite.all() else {int(bucket[np.argmin(finite)])}
    places = np.array(sorted(kept))
    return curve._replace(style="pale", steps=curve.steps[places], values=curve.values[places])


def draw(curve: Curve, axis: Axis) -> str:
    """The path of a curve, with gaps where a value is NaN; a point between two gaps is a line without length, which has round ends."""
    parts, pen, steps = [], "M", curve.steps.tolist()
    for step, place in zip(steps, axis.place(curve.values).tolist()):
        parts += [] if math.isnan(place) else [f"{pen}{step} {place:.1f}"]
        pen = "M" if math.isnan(place) else "L"
    d = re.sub(r"M([^ML]+)(?=M|$)", r"M\1L\1", "".join(parts))
    style, label = f'style="--c:var(--c{curve.colour})"', html.escape(curve.label)
    close = f"L{steps[-1]} {HEIGHT}L{steps[0]} {HEIGHT}Z" if curve.style == "area" else ""
    points = re.sub(r"[ML]([^ML]+)", r"M\1L\1", d) if curve.style == "thick" and len(steps) <= 40 else ""
    return (f'<path class="line {curve.style} run{curve.run}" {style} d="{d}{close}" data-name="{label}"/>'
            + f'<path class="dots run{curve.run}" {style} d="{points}"/>' * bool(points))


def draw_marks(marks: Curve, x: Axis) -> str:
    columns = {int((step - x.low) * 1000 // (x.high - x.low)): int(step) for step in marks.steps[::-1]}.values()      # not many into the same pixels
    top, end = (HEIGHT - 350 * (marks.run + 1), "v350") if marks.style == "save" else (HEIGHTS[marks.style], "v0")
    d = "".join(f"M{step} {top}{end}" for step in columns)
    return f'<path class="mark {marks.style} run{marks.run}" style="--c:var(--c{marks.colour})" d="{d}"/>'


def plot(axis: Axis, x: Axis, lines: str, title: str) -> str:
    """One picture: lines and a grid in an SVG that is stretched, and beside it texts that are not."""
    rows = [(float(axis.place(np.float64(value))), text) for value, text in axis.ticks()]
    columns = [(value, text) for value, text in x.ticks(6) if value == int(value)]
    grid = "".join(f"M{x.low} {place:.1f}H{x.high}" for place, _ in rows)
    texts = [f'<span class="y" style="top:{place / HEIGHT:.3%}">{text}</span>' for place, text in rows]
    texts += [f'<span class="x" style="left:{(value - x.low) / (x.high - x.low):.3%}">{text}</span>' for value, text in columns]
    return (f'<div class="plot {"log" if axis.log else "linear"}" data-low="{axis.low!r}" data-high="{axis.high!r}"><svg viewBox="{x.low} 0 {x.high - x.low} {HEIGHT}" '
            f'preserveAspectRatio="none" role="img" aria-label="{html.escape(title)}"><path class="grid" d="{grid}"/>{lines}</svg>{"".join(texts)}</div>')


def panel(title: str, curves: list[Curve], x: Axis, marks: list[Curve] = (), notes: list[str] = ()) -> str:
    """A figure of curves, with marks of what happened, and with a logarithmic picture to switch to."""
    shown, axes, marks = [thin(curve) for curve in curves], fit(curves), [*marks]
    notes = [*notes, *(f"{curve.label}: {len(curve.values):,} values thinned to {len(each.values):,}, with the smallest and largest of each stretch"
                       for curve, each in zip(curves, shown) if each is not curve)]
    for curve in curves:
        if len(bad := curve.steps[np.isnan(curve.values)]):
            marks.append(Curve(curve.run, f"{curve.label} not finite: {len(bad):,}", curve.colour, "nan", bad))
    pictures = "".join(plot(axis, x, "".join([*(draw_marks(each, x) for each in marks), *(draw(each, axis) for each in shown)]), title) for axis in axes)
    legend = "".join(f'<span class="run{each.run}" style="--c:var(--c{each.colour})"><i class="{each.style}"></i>{html.escape(each.label)}</span>'
                     for each in (*curves, *marks))
    switch = '<label><input type="checkbox" class="logbox">log scale</label>' * (len(axes) > 1)
    return (f'<figure><figcaption><b>{html.escape(title)}</b>{switch}</figcaption>{pictures}<p class="legend">{legend}</p>'
            f'<small>{html.escape("; ".join(notes))}</small></figure>')


def stack(run: History, x: Axis) -> str:
    """A figure of the parts of an update's time on top of each other, means over stretches of rows. Rows that lack one are left out."""
    parts = [key for key in run.series if key.startswith("time_")]
    columns = [dict(zip(*(part.tolist() for part in run.series[key]))) for key in parts]
    every = sorted(set().union(*columns))
    whole = [step for step in every if all(math.isfinite(column.get(step, math.nan)) for column in columns)]
    notes = [f"{len(every) - len(whole):,} of {len(every):,} rows lack a part, or it is not finite, and are not drawn"] * (len(every) > len(whole))
    if not whole:
        return f"<p>{html.escape(run.prefix + notes[0])}</p>"
    times, ends = np.array([[column[step] for step in whole] for column in columns]).cumsum(0), np.array(whole, np.int64)       # (parts, rows), (rows,)
    if len(whole) > MAX_MEANS:
        notes.append(f"means over {len(whole) // MAX_MEANS:,} rows or one more each")
        times = np.stack([part.mean(1) for part in np.array_split(times, MAX_MEANS, 1)], 1)
        ends = np.array([part[-1] for part in np.array_split(ends, MAX_MEANS)])
    curves = [Curve(run.number, show(key.removeprefix("time_")), k % COLOURS, "area", ends, times[k]) for k, key in enumerate(parts)]
    return panel(f"{run.prefix}Time of an update, seconds", curves[::-1], x, notes=notes)       # the lower ones are drawn over the higher ones


def group(key: str) -> tuple[int, str] | None:
    """Where the values of a key are drawn: rank and title of a panel; None if they are shown otherwise."""
    words = show(key).replace("_", " ")
    if key == "loss" or key.endswith("_loss"):
        return 0, "Loss"
    if key in EVENTS or key == "epoch" or key.startswith("time_") or "_mem_" in key:
        return None
    if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second")):
        return 1, "Evaluation: " + words.removeprefix("eval ")
    if "memory" in key:
        return 6, f"Memory, {words.rpartition(' ')[2].upper()}"
    rank = {"learning_rate": 2, "grad_norm": 3, "tokens_per_second": 4, "samples_per_second": 4.5, "mfu": 5, "hfu": 5}.get(key, 8)
    title = {"grad_norm": "Gradient norm before clipping", "mfu": "Share of the peak", "hfu": "Share of the peak"}.get(key, words + ", seconds" * key.endswith("_runtime"))
    return rank, title[:1].upper() + title[1:]


def draw_panels(runs: list[History]) -> str:
    groups: dict[tuple[int, str], list] = {}
    for run in runs:
        for key, (steps, _) in run.series.items():
            if (place := group(key)) and not (is_result(key) and len(steps) == 1):
                groups.setdefault(place, []).append((run, key))
    every = np.concatenate([[1] * (not groups), *(steps for run in runs for steps, _ in run.series.values())])
    first, last = int(every.min()), int(every.max())
    x, figures = Axis(0 if first < 0.2 * last or first == last else first - 1, last + math.ceil(0.01 * last) or 1), {}
    for place, drawn in groups.items():
        curves: list[Curve] = []
        for run, key in drawn:
            colour, label = run.number if len(runs) > 1 else len(curves) % COLOURS, run.prefix + show(key)
            curves.append(Curve(run.number, label, colour, "thick" if key.startswith("eval_") else "thin", *run.series[key]))
            if (best := find_best(run)) and best[0] == key:
                curves.append(Curve(run.number, f"{label}, best", colour, "best", np.array([best[1]]), np.array([best[2]])))
        figures[place] = panel(place[1], curves, x, [mark for run in runs for mark in mark_events(run)] if place == min(groups) else [])
    figures |= {(7, str(run.number)): stack(run, x) for run in runs if any(key.startswith("time_") for key in run.series)}
    return "".join(figures[place] for place in sorted(figures)) or "<p>Nothing was logged yet.</p>"


def mark_events(run: History) -> list[Curve]:
    """Marks of checkpoints, and of rows that count updates which were not applied."""
    left_out = {key: run.series[key] for key in EVENTS if key in run.series}
    counts = ", ".join(f"{np.nansum(values):,.0f} {EVENTS[key]}" for key, (_, values) in left_out.items())
    found = {"save": (f"checkpoints: {len(run.checkpoints):,}", [step for step, *_ in run.checkpoints]),
             "skip": (f"updates: {counts}", [step for steps, _ in left_out.values() for step in steps.tolist()])}
    return [Curve(run.number, run.prefix + text, run.number, kind, np.unique(np.array(steps, np.int64))) for kind, (text, steps) in found.items() if steps]


def table(head: list[str], rows: list[list]) -> str:
    """Texts and numbers that may come from anywhere, as a table whose first column names the rows."""
    def cell(value) -> str:
        return html.escape(f"{value:.10g}" if isinstance(value, float) else show(value)) + "…" * (len(str(value)) > 200)
    lines = [f"<tr><th>{cell(name)}</th>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for name, *row in rows]
    return f'<div class="wide"><table><tr>{"".join(f"<th>{cell(name)}</th>" for name in head)}</tr>{"".join(lines)}</table></div>' if rows else "<p>None.</p>"


def compare(names: list[str], columns: list[dict], keys: list[str] | None = None) -> str:
    """A table with a row for each key and a column for each dict."""
    keys = list(dict.fromkeys(key for column in columns for key in column)) if keys is None else keys
    return table(["", *names], [[key, *(column.get(key, "") for column in columns)] for key in keys])


def tell_settings(runs: list[History]) -> str:
    """Arguments in which runs differ, a single one from the defaults, then all others."""
    known = {run.name: run.args for run in runs if run.args}
    columns = {**known, "default": TrainArgs().to_dict()} if len(runs) == len(known) == 1 else known
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    same = [key for key in keys if len({repr(column.get(key, ...)) for column in columns.values()}) == 1]
    return (f'<h2>Arguments {"in which the runs differ" if len(runs) > 1 else "that are not the defaults"}</h2><div id="differing">'
            f'{compare([*columns], [*columns.values()], [key for key in keys if key not in same])}</div>'
            f'<details><summary>{len(same)} others, the same in {"all" if len(runs) > 1 else "both"}</summary>{compare(["all"], [*columns.values()][:1], same)}</details>')


def tell_run(run: History) -> str:
    """What to know of a run at first sight."""
    best, speed, loss = find_best(run), next((key for key in ("tokens_per_second", "samples_per_second") if key in run.series), None), run.series.get("loss")
    tiles = {"state": run.about.get("state", "unknown"), "updates": f"{max((int(steps.max()) for steps, _ in run.series.values()), default=0):,}"}
    tiles |= {"last loss": f"{loss[1][-1]:.4g}"} if loss else {}
    tiles |= {f"best {show(best[0])}, update {best[1]:,}": f"{best[2]:.4g}"} if best else {}
    if speed and np.isfinite(run.series[speed][1]).any():
        tiles[f"{speed.replace('_', ' ')}, median"] = f"{np.nanmedian(run.series[speed][1]):,.0f}"
    shown = "".join(f"<div><b>{html.escape(show(value))}</b><span>{html.escape(name)}</span></div>" for name, value in tiles.items())
    switch = f'<h2><label><input type="checkbox" id="run{run.number}" checked>{html.escape(run.name)}</label></h2>' * bool(run.prefix)
    return f'<section class="card" style="--c:var(--c{run.number})">{switch}<div class="tiles">{shown}</div></section>'


def tell_samples(run: History) -> str:
    shown = "".join(f"<h4>{html.escape(where)}</h4><pre>{html.escape(text[:MAX_SAMPLE_CHARS])}{'… (cut)' * (len(text) > MAX_SAMPLE_CHARS)}</pre>"
                    for where, text in run.samples[-MAX_SAMPLES:])
    return f"<h2>Samples of {html.escape(run.name)}, the last {min(len(run.samples), MAX_SAMPLES)} of {len(run.samples):,}</h2>{shown}" if shown else ""


def make_page(runs: list[History], trials: list[list[str]]) -> str:
    names = [run.name for run in runs]
    problems = "".join(f"<li>{html.escape(problem)}</li>" for run in runs for problem in run.problems)
    hide = "".join(f"body:has(#run{k}:not(:checked)) .run{k}{{display:none}}" for k in range(len(runs)))
    saved = [[run.name, f"{step:,}", "" if size is None else f"{size / 1e6:,.2f}", "best" * bool((best := find_best(run)) and best[1] == step),
              problem] for run in runs for step, size, problem in run.checkpoints]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(", ".join(names))}</title><style>{STYLE}{hide}</style><body><h1>{html.escape(" and ".join(names))}</h1>
<div class="cards">{"".join(map(tell_run, runs))}</div>
{f'<div class="warning"><b>To know about these files</b><ul>{problems}</ul></div>' * bool(problems)}
{f"<h2>Trials of the sweep</h2>{table(trials[0], trials[1:])}" if trials else ""}
<main>{draw_panels(runs)}</main>
<div class="columns"><div>{tell_settings(runs)}</div><div><h2>Results</h2>{compare(names, [run.results for run in runs])}</div>
<div><h2>State and environment</h2>{compare(names, [{key: value for key, value in run.about.items() if value not in (None, "")} for run in runs])}</div>
<div><h2>Checkpoints</h2>{table(["run", "update", "MB", "", "what is wrong"], saved)}
<small>By names and sizes of files. Contents are not checked here: <code>python -m tools.inspect</code> does that.</small></div></div>
{"".join(map(tell_samples, runs))}
<footer>Written by tools/report.py on {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}. Along x are updates.</footer>
<script>{SCRIPT}</script></body></html>
"""


def main(argv: list[str] | None = None, trials: list[list[str]] = ()) -> str:
    """Writes the page; returns its path. trials: a table to show with it, its head first. Raises UsageError: exit code 2 if a folder holds no run, 5 if the page cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="+", help="folder of a run")
    parser.add_argument("--out", help="the file to write [report.html in the first run's folder]")
    flags = parser.parse_args(argv)
    if len(flags.run) > COLOURS:
        raise UsageError(f"{len(flags.run)} runs were given: more than {COLOURS} cannot be told apart in one picture")
    for folder in flags.run:
        if not os.path.isdir(folder) or not holds_run(folder) and not os.path.exists(os.path.join(folder, "status.json")):
            raise UsageError(f"{folder} holds no run: give the --output_dir of one, with its metrics.jsonl or checkpoints")
    names = [os.path.basename(os.path.abspath(folder)) for folder in flags.run]
    names = [show(name if names.count(name) == 1 else folder) for folder, name in zip(flags.run, names)]
    runs = [read_history(History(folder, names[k], k, f"{names[k]}: " if len(names) > 1 else "")) for k, folder in enumerate(flags.run)]
    out = flags.out or os.path.join(flags.run[0], "report.html")
    try:
        with open(out + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as file:      # JSON may hold half of a pair of surrogates
            file.write(make_page(runs, trials))
        os.replace(out + ".tmp", out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}", 5) from None
    print(out)
    return out


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f8fa;--fg:#1b2430;--soft:#5a6673;--rule:#dde3e9;--bad:#b3001b;--warn:#fff4d6;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#6b7280;--c7:#1b2430;--c8:#7a5230}
@media(prefers-color-scheme:dark){:root{--bg:#12171d;--card:#1b222a;--fg:#e4e9ee;--soft:#9aa6b2;--rule:#2e3843;--bad:#ff7b72;--warn:#3a3115;
--c0:#4fa8e0;--c1:#f0813c;--c2:#2dbd92;--c3:#e3a0c6;--c4:#f2b632;--c5:#9ad3f5;--c6:#98a2ad;--c7:#e4e9ee;--c8:#c49a6c}}
*{box-sizing:border-box}body{margin:0 auto;padding:20px clamp(12px,3vw,40px);max-width:1720px;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:24px;margin:0 0 14px;overflow-wrap:anywhere}h2{font-size:18px;margin:30px 0 8px}h3,h4{margin:14px 0 4px;font-size:14px}h4{color:var(--soft);font-weight:500}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px}.card{background:var(--card);border-left:5px solid var(--c);border-radius:6px;padding:10px 16px}
.card h2{margin:0 0 6px;font-size:15px;overflow-wrap:anywhere}.tiles{display:flex;flex-wrap:wrap;gap:8px 26px}.tiles b{display:block;font-size:20px;font-weight:600}.tiles span,small,footer{color:var(--soft);font-size:12.5px}
input{accent-color:var(--c);margin:0 7px 0 0;vertical-align:-1px}.warning{background:var(--warn);border-radius:6px;padding:10px 16px;margin:14px 0;overflow-wrap:anywhere}.warning ul{margin:4px 0;padding-left:20px}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;margin:18px 0}main>:first-child{grid-column:1/-1}main>:first-child .plot{height:340px}
figure{margin:0;background:var(--card);border-radius:6px;padding:12px 16px 10px;min-width:0}figcaption{display:flex;justify-content:space-between;gap:12px;margin-bottom:8px}figcaption label{color:var(--soft);font-size:13px;white-space:nowrap}
.plot{position:relative;height:210px;margin:4px 6px 26px 50px;touch-action:pan-y}.plot svg{width:100%;height:100%;overflow:hidden;display:block}
figure:has(.logbox:checked) .linear,figure:not(:has(.logbox:checked)) .log{display:none}
.plot span{position:absolute;color:var(--soft);font-size:12px;line-height:1;white-space:nowrap;font-variant-numeric:tabular-nums;pointer-events:none}.plot .y{right:calc(100% + 7px);transform:translateY(-50%)}.plot .x{top:calc(100% + 7px);transform:translateX(-50%)}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linecap:round;stroke-linejoin:round}.grid{stroke:var(--rule)}
.line,.dots{stroke:var(--c)}.thin{stroke-width:1.5}.pale{stroke-width:1;stroke-opacity:.5}.thick{stroke-width:2.5}.area{fill:var(--c);stroke:var(--card);stroke-width:1}.dots{stroke-width:6}.best{stroke-width:17;stroke-opacity:.4}
.mark{stroke:var(--c);stroke-width:7}.nan{stroke:var(--bad);stroke-width:9}.skip{stroke:var(--fg);stroke-width:5;stroke-linecap:square}.save{stroke-width:2;stroke-linecap:butt}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:0;font-size:13px}.legend span{overflow-wrap:anywhere}.legend i{display:inline-block;margin-right:7px;vertical-align:middle;width:18px;border-top:2px solid var(--c)}
.legend .thick{border-top-width:4px}.legend .area,.legend .nan,.legend .skip,.legend .best{border:0;width:10px;height:10px;background:var(--c)}.legend .nan{background:var(--bad);border-radius:9px}.legend .best{opacity:.45;border-radius:9px;width:13px;height:13px}.legend .skip{background:var(--fg);width:7px;height:7px}.legend .save{border:0;width:2px;height:12px;background:var(--c)}
figure small{display:block;margin-top:4px}.columns{columns:440px;column-gap:30px}.columns>div{break-inside:avoid}.columns h2{margin-top:0;padding-top:24px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:3px 22px 3px 0;border-bottom:1px solid var(--rule);vertical-align:top;max-width:420px;overflow-wrap:break-word}
th{font-weight:500;color:var(--soft)}details{margin-top:8px}summary{cursor:pointer;color:var(--soft)}pre{background:var(--card);border-radius:6px;padding:10px 14px;margin:0;white-space:pre-wrap;overflow-wrap:anywhere}footer{margin-top:34px}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}.tip{position:absolute;top:4px;z-index:2;background:var(--bg);border:1px solid var(--rule);border-radius:5px;padding:5px 9px;font-size:12.5px;pointer-events:none;white-space:pre;max-width:90%;overflow:hidden}
"""

SCRIPT = """
const parse = d => [...d.replace(/L[^L]+L[^L]+Z$/, '').matchAll(/[ML](\\S+) ([^MLZ]+)/g)].map(m => [+m[1], +m[2]]);
const nearest = (points, at) => points.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best);
for (const plot of document.querySelectorAll('.plot')) {
  const svg = plot.querySelector('svg'), {x, width, height} = svg.viewBox.baseVal, low = +plot.dataset.low, high = +plot.dataset.high;
  const [cross, tip] = ['cross', 'tip'].map(name => plot.appendChild(Object.assign(document.createElement('div'), {className: name, hidden: true})));
  const value = y => Math.abs(y) >= 1e8 ? 'off the scale' : +(plot.matches('.log') ? 10 ** (high - y / height * (high - low)) : high - y / height * (high - low)).toPrecision(4);
  let lines;
  plot.onpointermove = event => {
    lines ??= [...svg.querySelectorAll('.line')].map(path => ({path, points: parse(path.getAttribute('d'))})).filter(line => line.points.length);
    const seen = lines.filter(line => getComputedStyle(line.path).display != 'none'), box = svg.getBoundingClientRect();
    if (!seen.length) return;
    const mouse = x + (event.clientX - box.left) / box.width * width, at = nearest(seen.map(line => nearest(line.points, mouse)), mouse)[0];
    tip.textContent = 'update ' + at.toLocaleString('en') + seen.map(({path, points}, k) => {
      const [step, y] = nearest(points, at), below = path.matches('.area') && seen[k + 1];      // a part of a stack is what it adds
      return `\\n${path.dataset.name}  ${value(below ? y + height - nearest(below.points, at)[1] : y)}` + (step == at ? '' : `  (update ${step.toLocaleString('en')})`);
    }).join('');
    const left = (at - x) / width * 100;
    cross.style.left = left + '%';
    [tip.style.left, tip.style.right] = left < 50 ? [`calc(${left}% + 10px)`, ''] : ['', `calc(${100 - left}% + 10px)`];
    cross.hidden = tip.hidden = false;
  };
  plot.onpointerleave = () => { cross.hidden = tip.hidden = true; };
}
"""

if __name__ == "__main__":
    run_main(main)
