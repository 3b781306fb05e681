"""The page of tools/report.py shows what was logged, where it belongs, whatever a run's folder holds, and a real browser draws it."""
import html
import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from callbacks import Callback
from state import UsageError
from storage import show
from tests.toy import arguments, rows, run_training, sequences
from tools.report import HEIGHT, MAX_POINTS, MAX_SAMPLES, Curve, main, thin, tick_text

NAMED = re.compile(r'<path class="line (\w+) run(\d)" style="--c:var\(--c(\d)\)" d="([^"]*)" data-name="([^"]*)"/>')
SPEEDS = ("runtime", "per_second", "per second", "memory", "time of an update")
CHROMIUM = shutil.which("chromium")


def write_run(folder, logged, args=None, status=None, **files) -> str:
    """A folder of a run without weights: rows of metrics.jsonl (text as it is), args.json of a checkpoint, other files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in logged))
    (folder / "status.json").write_text(json.dumps(status or {"state": "finished", "step": 1, "reason": "", "exit": 0, "started": None, "job": None}))
    if args is not None:
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "args.json").write_text(json.dumps(args))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return str(folder)


def report(*folders, out=None) -> str:
    with open(main([*map(str, folders), *(["--out", str(out)] if out else [])]), encoding="utf-8") as file:
        return file.read()


def figures(page: str) -> dict[str, dict[str, dict]]:
    """title -> "linear" or "log" -> name of a curve -> (run, style, points), points of (update, value, whether a line leads to it)."""
    found: dict = {}
    for part in page.split("<figure>")[1:]:
        pictures = found.setdefault(html.unescape(re.search(r"<b>(.*?)</b>", part)[1]), {})
        for kind, low, high, svg in re.findall(r'<div class="plot (\w+)" data-low="(\S+)" data-high="(\S+)">(.*?)</svg>', part):
            low, high = float(low), float(high)
            for style, run, _, d, name in NAMED.findall(svg):
                d = re.sub(r"L[^L]+L[^L]+Z$", "", d)
                points = [(int(x), high - float(y) / HEIGHT * (high - low), pen == "L") for pen, x, y in re.findall(r"([ML])(\S+?) ([^MLZ]+)", d)]
                points = [point for at, point in enumerate(points) if at == 0 or point[0] != points[at - 1][0] or point[1] != points[at - 1][1]]
                points = [(x, 10**value if kind == "log" else value, joined) for x, value, joined in points]
                pictures.setdefault(kind, {}).setdefault(html.unescape(name), (int(run), style, points, (high - low) / HEIGHT))
    return found


def marks(page: str, kind: str) -> list[int]:
    """The updates at which the first picture has marks of a kind."""
    return sorted(map(int, re.findall(r"M(\d+) ", re.search(rf'class="mark {kind} run0"[^>]* d="([^"]*)"', page)[1])))


def assert_drawn(curve: tuple, expected: list[tuple]) -> None:
    _, _, points, unit = curve
    assert [step for step, *_ in points] == [step for step, _ in expected]
    assert [value for _, value, _ in points] == pytest.approx([value for _, value in expected], abs=unit)


LOGGED = [{"loss": 5 / step, "grad_norm": step**0.5, "learning_rate": 1e-3 * step, "tokens_per_second": 1000.0 + step, "memory_rss_mb": 10 * step,
           "memory_device_mb": 7, "epoch": step / 20, "step": step} for step in range(1, 21)]
EVALUATED = [{"eval_loss": 4 / step, "eval_accuracy": step / 20, "eval_samples_per_second": 9, "step": step, "epoch": 0} for step in (5, 10, 20)]


def test_every_logged_value_is_drawn_at_its_place(tmp_path):
    logged = sorted(LOGGED + EVALUATED, key=lambda row: row["step"])
    drawn = figures(report(write_run(tmp_path / "a", logged)))
    places = {"loss": "Loss", "eval_loss": "Loss", "grad_norm": "Gradient norm before clipping", "learning_rate": "Learning rate",
              "tokens_per_second": "Tokens per second", "memory_rss_mb": "Memory, MB", "memory_device_mb": "Memory, MB",
              "eval_accuracy": "Evaluation: accuracy", "eval_samples_per_second": "Eval samples per second"}
    assert {key for row in logged for key in row} == {*places, "step", "epoch"} and {*drawn} == {*places.values()}
    for key, title in places.items():
        expected = [(row["step"], row[key]) for row in logged if key in row]
        assert_drawn(drawn[title]["linear"][key], expected)
    for key, title in places.items():
        _, _, points, unit = drawn[title].get("log", drawn[title]["linear"])[key]
        expected = [math.log(row[key]) for row in logged if key in row]
        assert [math.log(value) for _, value, _ in points] == pytest.approx(expected, abs=unit * math.log(10))
    assert {title for title, pictures in drawn.items() if "log" not in pictures} == {"Eval samples per second"}      # always the same
    assert drawn["Loss"]["linear"]["eval_loss, best"][2] == [drawn["Loss"]["linear"]["eval_loss"][2][-1][:2] + (False,)]


@pytest.mark.parametrize("logged", [LOGGED, [{"loss": 10.0**step, "step": 10_000 * step} for step in range(1, 7)],
                                    [{"loss": 2 + step / 9, "step": step} for step in (1, 2)]])
def test_every_number_beside_a_picture_is_at_its_place(tmp_path, logged):
    part = report(write_run(tmp_path / "run", logged)).partition("<b>Loss</b>")[2].partition("</figure>")[0]
    for kind, low, high, left, span, texts in re.findall(r'<div class="plot (\w+)" data-low="(\S+)" data-high="(\S+)"><svg viewBox="(\S+) 0 (\S+) .*?</svg>(.*?)</div>', part):
        for axis, begin, length in (("y", float(high), float(low) - float(high)), ("x", float(left), float(span))):
            ticks = [(float(percent), number(text)) for percent, text in re.findall(rf'<span class="{axis}" style="\w+:(\S+)%">(.*?)</span>', texts)]
            assert len(ticks) > 1 and all(0 <= percent <= 100 for percent, _ in ticks)
            for percent, value in ticks:
                assert (math.log10(value) if (axis, kind) == ("y", "log") else value) == pytest.approx(begin + percent / 100 * length, abs=abs(length) * 1e-4)


def number(text: str) -> float:
    return float(text.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(text[-1], 1)


@pytest.mark.parametrize("args, step, value", [({}, 20, 0.2), ({"metric_for_best_model": "accuracy", "greater_is_better": True}, 10, 0.75),
                                               ({"metric_for_best_model": "eval_accuracy", "greater_is_better": False}, 5, 0.25)])
def test_the_best_evaluation_is_that_of_the_settings_and_of_equal_ones_the_first(tmp_path, args, step, value):
    logged = [{**row, "eval_accuracy": accuracy} for row, accuracy in zip(EVALUATED, (0.25, 0.75, 0.75))]
    page = report(write_run(tmp_path / "run", logged, args))
    key = "eval_accuracy" if args else "eval_loss"
    assert f"<div><b>{value}</b><span>best {key}, update {step}</span></div>" in page
    drawn = figures(page)["Evaluation: accuracy" if args else "Loss"]["linear"][f"{key}, best"]
    assert_drawn(drawn, [(step, value)])


def test_a_real_run_is_shown_with_its_checkpoints_results_and_environment(tmp_path):
    run_training(arguments(tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                           metric_for_best_model="loss"), eval_set=sequences(4))
    page, logged = report(tmp_path / "run"), rows(tmp_path / "run")
    drawn = figures(page)
    assert_drawn(drawn["Loss"]["linear"]["loss"], [(row["step"], row["loss"]) for row in logged if "loss" in row])
    assert_drawn(drawn["Loss"]["linear"]["eval_loss"], [(row["step"], row["eval_loss"]) for row in logged if "eval_loss" in row])
    best = min((row for row in logged if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert f"best eval_loss, update {best['step']}" in page
    for step in (2, 4, 6):
        size = sum(path.stat().st_size for path in (tmp_path / "run" / f"checkpoint-{step}").iterdir() if path.name != "manifest.json")
        mark = "best" if step == best["step"] else ""
        assert f"<td>{step}</td><td>{size / 1e6:,.2f}</td><td>{mark}</td><td></td>" in page
    assert marks(page, "save") == [2, 4, 6]
    manifest = json.loads((tmp_path / "run" / "checkpoint-6" / "manifest.json").read_text())
    for key in ("torch", "python", "format"):
        assert f"<th>{key}</th><td>{manifest[key]}</td>" in page
    assert f"<th>train_loss</th><td>{logged[-1]['train_loss']:.10g}</td>" in page
    assert "<th>max_steps</th><td>6</td><td>-1</td>" in page and "To know about these files" not in page
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    assert "it has 4 bytes" in report(tmp_path / "run")


class Cut(Callback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise InterruptedError


def without_times(page: str, folder) -> str:
    parts = [part for part in page.replace(str(folder), "").split("<figure>") if not any(word in part.partition("</b>")[0].lower() for word in SPEEDS)]
    page = re.sub(r"<tr><th>(?:resume_from_checkpoint|\w*(?:runtime|per_second))</th>.*?</tr>", "", "".join(parts))
    return re.sub(r"<div><b>[\d,]+</b><span>tokens per second, median</span></div>|<footer>.*", "", page, flags=re.DOTALL)


def test_a_run_that_was_cut_and_resumed_looks_like_one_that_was_not(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    run_training(arguments(tmp_path / "whole" / "run", **settings), eval_set=sequences(4))
    with pytest.raises(InterruptedError):
        run_training(arguments(tmp_path / "cut" / "run", **settings), eval_set=sequences(4), callbacks=[Cut()])
    assert figures(report(tmp_path / "cut" / "run"))["Loss"]["linear"]["loss"][2][-1][0] == 5
    run_training(arguments(tmp_path / "cut" / "run", **settings, resume_from_checkpoint="True"), eval_set=sequences(4))
    whole, cut = (without_times(report(tmp_path / name / "run"), tmp_path / name) for name in ("whole", "cut"))
    whole, cut = (re.sub(r"<summary>\d+ others", "", page) for page in (whole, cut))
    assert "eval_loss" in whole and whole == cut


def test_two_runs_are_drawn_in_one_picture_and_can_be_told_apart(tmp_path):
    one = write_run(tmp_path / "one", LOGGED + [{**EVALUATED[2], "step": 20}])
    two = write_run(tmp_path / "two", [{**row, "loss": row["loss"] * 2} for row in LOGGED])
    page = report(one, two, out=tmp_path / "both.html")
    curves = figures(page)["Loss"]["linear"]
    assert_drawn(curves["one: loss"], [(row["step"], row["loss"]) for row in LOGGED])
    assert_drawn(curves["two: loss"], [(row["step"], row["loss"] * 2) for row in LOGGED])
    colours = {html.unescape(name): colour for _, _, colour, _, name in NAMED.findall(page)}
    assert colours["one: loss"] == colours["one: eval_loss"] != colours["two: loss"]
    for number, name in enumerate(("one", "two")):
        assert f'<input type="checkbox" id="run{number}" checked>{name}</label>' in page
        assert f"body:has(#run{number}:not(:checked)) .run{number}{{display:none}}" in page
    same = report(one, write_run(tmp_path / "elsewhere" / "one", LOGGED), out=tmp_path / "same.html")
    assert {f"{tmp_path}/one: grad_norm", f"{tmp_path}/elsewhere/one: grad_norm"} == {*figures(same)["Gradient norm before clipping"]["linear"]}


def test_arguments_that_differ_are_listed_and_equal_ones_are_not(tmp_path):
    one, two = ({"learning_rate": rate, "seed": 1, "bf16": False, "optim": "sgd", **more} for rate, more in ((0.1, {}), (0.2, {"own": None})))
    page = report(write_run(tmp_path / "one", LOGGED, one), write_run(tmp_path / "two", LOGGED, two))
    differing, _, rest = page.partition('<div id="differing">')[2].partition("</details>")[0].partition("<details>")
    assert re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", differing) == [("learning_rate", "<td>0.1</td><td>0.2</td>"), ("own", "<td></td><td>None</td>")]
    assert re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", rest) == [("seed", "<td>1</td>"), ("bf16", "<td>False</td>"), ("optim", "<td>sgd</td>")]


HOSTILE = '</pre></script><script>document.title="taken"</script><img src=x onerror=alert(1)>"\'&\ud800'


class Markup(HTMLParser):
    """What a browser would see: names of elements and attributes, and texts."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.scripts = set(), 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(f"{tag} {name}" for name, _ in attrs)}
        self.scripts += tag == "script"


def test_no_text_of_a_run_becomes_markup_and_the_page_asks_for_nothing(tmp_path):
    plain = [*LOGGED, {"eval_loss": 1.0, "time_data": 1.0, "sample": "text", "step": 30}, "odd\n"]
    known = Markup(report(write_run(tmp_path / "plain", plain, {"seed": 1}, train_results__json="{}")))
    hostile = [{"loss": 1.0, HOSTILE: 1.0, f"eval_{HOSTILE}_loss": 2.0, f"time_{HOSTILE}": 1.0, f"memory {HOSTILE}": 3, f"x{HOSTILE}": [], "step": 1},
               {f"sample{HOSTILE}": HOSTILE, "step": 2}, {"step": HOSTILE}]
    page = report(write_run(
        tmp_path / "a<b>&", hostile, {HOSTILE: HOSTILE, "metric_for_best_model": HOSTILE}, {"state": HOSTILE, "reason": HOSTILE, HOSTILE: [HOSTILE]},
        **{"train_results__json": json.dumps({HOSTILE: HOSTILE}), f"{HOSTILE.replace('/', '')[:-1]}_results__json": "{}"}))
    markup = Markup(page)
    assert html.escape(HOSTILE[:-1]) + "\\ud800" in page and markup.names <= known.names and markup.scripts == 1
    assert not {name.partition(" ")[2] for name in markup.names} & {"src", "href", "srcset", "onerror", "onload", "action"}
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", page)


def test_a_torn_last_line_does_not_matter_and_other_odd_lines_are_named(tmp_path):
    whole = report(write_run(tmp_path / "a" / "run", LOGGED))
    torn = report(write_run(tmp_path / "b" / "run", [*LOGGED, '{"loss": 0.1, "st']))
    assert without_times(torn, tmp_path / "b") == without_times(whole, tmp_path / "a")
    odd = ['{"loss": 0.1, "st\n', "[1]\n", "[" * 99_999 + "\n", {"loss": 3.0}, {"loss": 3.0, "step": -1}, {"loss": "low", "grad_norm": None, "step": 7}]
    page = report(write_run(tmp_path / "c" / "run", [*LOGGED[:6], *odd, *LOGGED[6:]]))
    for text in ("lines that are no JSON objects were left out: 3, the first is line 7", "&#x27;step&#x27; is no number in 2 rows", "&#x27;loss&#x27; is no number in 1 rows"):
        assert text in page
    assert figures(page) == figures(whole)


def test_every_unreadable_file_is_named(tmp_path):
    folder = write_run(tmp_path / "run", LOGGED, {}, train_results__json="[]", eval_results__json="{")
    (tmp_path / "run" / "status.json").write_text('{"state": "running", "started": 1e300}')
    (tmp_path / "run" / "checkpoint-1" / "args.json").write_bytes(b"\xff")
    os.remove(os.path.join(folder, "metrics.jsonl"))
    os.mkfifo(os.path.join(folder, "metrics.jsonl"))       # opening it would wait for ever
    page = report(folder)
    for name in ("status.json", "checkpoint-1/args.json", "train_results.json", "eval_results.json", "metrics.jsonl"):
        assert re.search(rf"<li>{folder}/{name} cannot be used: ", page), name
    assert "manifest.json is missing" in page and "Nothing was logged yet" in page


def test_what_is_not_finite_is_a_gap_with_a_mark_and_updates_left_out_are_counted(tmp_path):
    logged = [{"loss": float(step), "grad_norm": 1.0, "step": step} for step in range(1, 10)]
    logged[2] |= {"loss": math.nan, "nan_steps": 1, "skipped_steps": 1}
    logged[4] |= {"loss": -math.inf, "nan_steps": 2, "skipped_steps": 3}
    logged[6] |= {"loss": 10**400}
    page = report(write_run(tmp_path / "run", logged))
    points = figures(page)["Loss"]["linear"]["loss"][2]
    assert [step for step, *_ in points] == [1, 2, 4, 6, 8, 9]
    assert [step for step, _, joined in points if not joined] == [1, 4, 6, 8]
    assert marks(page, "nan") == [3, 5, 7] and marks(page, "skip") == [3, 5]
    assert "loss not finite: 3" in page and "updates: 3 not finite, 4 not applied" in page
    assert "log" in figures(page)["Loss"]


def test_rows_in_another_order_are_drawn_where_they_belong(tmp_path):
    backwards = [*LOGGED[::-1], *LOGGED[1:3]]
    page = report(write_run(tmp_path / "run", backwards))
    assert_drawn(figures(page)["Loss"]["linear"]["loss"], [(row["step"], row["loss"]) for row in backwards])
    assert "<div><b>20</b><span>updates</span></div>" in page


def test_a_long_curve_is_thinned_to_a_small_page_that_keeps_every_extreme(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.normal(3, 0.1, 30_000)
    values[[7, 12_345, 29_990]] = 50, -40, math.nan
    page = report(write_run(tmp_path / "run", [{"loss": value, "step": step} for step, value in enumerate(values.tolist())]))
    assert len(page) < 200_000 and f"30,000 values thinned to {len(thin(curve_of(values)).values):,}" in page
    curves = figures(page)["Loss"]["linear"]
    _, style, points, unit = curves["loss"]
    drawn = {step: value for step, value, _ in points}
    assert style == "pale" and all(abs(drawn[step] - values[step]) <= unit for step in drawn) and {0, 7, 12_345, 29_999} <= drawn.keys()
    for bucket in np.array_split(np.arange(30_000), MAX_POINTS // 2):
        assert {int(bucket[np.nanargmin(values[bucket])]), int(bucket[np.nanargmax(values[bucket])])} <= drawn.keys()
    assert next(step for step, _, joined in points if step > 29_990 and not joined) <= 29_990 + 2 * 30_000 // MAX_POINTS


def curve_of(values: np.ndarray) -> Curve:
    return Curve(0, "x", 0, "thin", np.arange(len(values)), values)


@pytest.mark.parametrize("size", [1, MAX_POINTS, MAX_POINTS + 1, 10 * MAX_POINTS])
def test_thinning_keeps_all_of_a_short_curve_and_the_ends_of_a_long_one(size):
    kept = thin(curve_of(np.sin(np.arange(size)))).steps
    assert kept[0] == 0 and kept[-1] == size - 1 and (np.diff(kept) > 0).all()
    assert len(kept) == size if size <= MAX_POINTS else MAX_POINTS * 0.6 < len(kept) <= MAX_POINTS + 2
    assert len(thin(curve_of(np.full(size, np.nan))).values) <= MAX_POINTS


def test_parts_of_the_time_are_stacked(tmp_path):
    logged = [{"time_data": 0.1 * step, "time_forward": 0.5, "time_backward": 1.0, "step": step} for step in range(1, 6)]
    page = report(write_run(tmp_path / "run", [*logged, {"time_data": 3.0, "step": 6}]))
    curves = figures(page)["Time of an update, seconds"]["linear"]
    assert_drawn(curves["data"], [(step, 0.1 * step) for step in range(1, 6)])
    assert_drawn(curves["forward"], [(step, 0.1 * step + 0.5) for step in range(1, 6)])
    assert_drawn(curves["backward"], [(step, 0.1 * step + 1.5) for step in range(1, 6)])
    assert [*curves] == ["backward", "forward", "data"] and "1 of 6 rows lack a part" in page
    assert re.search(rf'd="[^"]*L5 {HEIGHT}L1 {HEIGHT}Z" data-name="backward"', page)


def test_the_newest_samples_are_shown_and_their_number_is_told(tmp_path):
    page = report(write_run(tmp_path / "run", [{"sample": f"text {n} of rows", "step": n} for n in range(30)]))
    assert f"the last {MAX_SAMPLES} of 30" in page and re.findall(r"text (\d+) of rows", page) == [str(n) for n in range(30 - MAX_SAMPLES, 30)]
    assert "… (cut)" in report(write_run(tmp_path / "long", [{"sample": "x" * 5000, "step": 1}]))


def test_shares_of_a_peak_have_a_picture_and_memory_in_bytes_is_a_result(tmp_path):
    logged = [{"loss": 1.0, "mfu": None, "step": 1}, {"loss": 1.0, "mfu": 0.25, "step": 2}, {"eval_loss": 1.0, "eval_mem_cpu_alloc_delta": 2_500_000, "step": 2}, {"train_mem_cpu_peaked_delta": 9e6, "step": 2}]
    one = write_run(tmp_path / "one", logged, train_results__json='{"train_mem_cpu_peaked_delta": 9000000, "init_mem_cpu_alloc_delta": "x"}')
    page = report(one, write_run(tmp_path / "two", [{"hfu": 0.5, "step": 1}]), out=tmp_path / "both.html")
    drawn = figures(page)["Share of the peak"]["linear"]
    assert_drawn(drawn["one: mfu"], [(2, 0.25)])
    assert_drawn(drawn["two: hfu"], [(1, 0.5)])
    assert not any("mem" in title for title in figures(page)) and "is no number" not in page
    for key, value in (("eval_mem_cpu_alloc_delta", "2.5 MB"), ("train_mem_cpu_peaked_delta", "9.0 MB"), ("init_mem_cpu_alloc_delta", "x")):
        assert page.count(f"<tr><th>{key}</th><td>{value}</td><td></td></tr>") == page.count(f"<th>{key}") == 1


def test_a_table_of_a_sweep_is_shown_as_text(tmp_path):
    with open(main([write_run(tmp_path / "run", LOGGED)], [["trial", "suggested"], ["0", HOSTILE]])) as file:
        page = file.read()
    assert f"<tr><th>trial</th><th>suggested</th></tr><tr><th>0</th><td>{html.escape(show(HOSTILE))}</td></tr>" in page


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-249, 1e249], [5e-324, 1.0], [5.0, 5.0], [-1e249, 1e249], [-1e308, 0.0, 1e308], [1e15, 1e15 + 2], [math.nan], [1e-5, 3.0], [-3.0, -2.0]])
def test_every_range_of_values_has_a_readable_axis(tmp_path, values):
    page = report(write_run(tmp_path / "run", [{"loss": value, "step": step} for step, value in enumerate(values)]))
    part = page.partition("<b>Loss</b>")[2].partition("</figure>")[0]
    assert 1 < len(re.findall(r'<span class="y"', part)) < 20 and "nan" not in "".join(re.findall(r'd="([^"]*)"', part))
    for _, _, points, unit in figures(page)["Loss"]["linear"].values():
        assert [value for _, value, _ in points] == pytest.approx([value for value in values if abs(value) < 1e250][:len(points)], abs=unit)


def test_numbers_on_axes_are_short():
    values = {0: "0", 2.5: "2.5", 3 * 0.1: "0.3", 0.0005: "0.0005", 3000: "3000", 25_000: "25k", 1.5e6: "1500k", 2.5e7: "25M", -2e-7: "-2e-07"}
    assert {value: tick_text(value) for value in values} == values


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run") as error:
        main([str(tmp_path)])
    assert error.value.exit_code == 2
    folder = write_run(tmp_path / "run", LOGGED)
    with pytest.raises(UsageError, match="cannot be written") as error:
        main([folder, "--out", str(tmp_path / "none" / "x.html")])
    assert error.value.exit_code == 5
    with pytest.raises(UsageError, match="10 runs were given"):
        main([folder] * 10)


def browse(path, *flags) -> str:
    """What chromium prints."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,700", f"--user-data-dir={path.parent}/browser",
               *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "HOME": str(path.parent)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_png(data: bytes) -> np.ndarray:
    """The pixels (height, width, channels) of a PNG of 8 bits per channel (its specification, sections 9 and 11)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        content, at = data[at + 8:at + 8 + length], at + 12 + length
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", content[:10])
        packed += content if kind == b"IDAT" else b""
    channels, above = {2: 3, 6: 4}[colour], bytes(width * {2: 3, 6: 4}[colour])
    assert depth == 8
    rows, lines = [], np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    for method, line in zip(lines[:, 0].tolist(), lines[:, 1:].tolist()):
        for i in range(len(line)):
            a, b, c = (line[i - channels], above[i], above[i - channels]) if i >= channels else (0, above[i], 0)
            if method == 4:
                nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = line[i] + (nearest if method == 4 else (0, a, b, (a + b) // 2)[method]) & 255
        rows.append(line)
        above = line
    return np.array(rows).reshape(height, width, channels)[..., :3]


LOOK = """<script>
const box = document.querySelector('svg').getBoundingClientRect(), plot = document.querySelector('.plot');
plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * %f, bubbles: true}));
document.body.dataset.seen = JSON.stringify({left: box.left, top: box.top, width: box.width, height: box.height,
  inner: plot.clientWidth, tip: plot.querySelector('.tip').textContent, wide: document.documentElement.scrollWidth});
document.querySelectorAll('.cross, .tip').forEach(each => each.remove());
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
def test_a_browser_draws_the_curve_where_its_values_are(tmp_path):
    logged = [{"loss": 1 + (step % 10) / 5, "step": step} for step in range(0, 101, 5)]
    page = report(write_run(tmp_path / "run", logged))
    axis_high, axis_low = (float(re.search(rf'data-{end}="(\S+)"', page)[1]) for end in ("high", "low"))
    span, (_, _, points, _) = float(re.search(r'viewBox="0 0 (\S+) ', page)[1]), figures(page)["Loss"]["linear"]["loss"]
    path = tmp_path / "look.html"
    path.write_text(page.replace("</body>", LOOK % (50 / span) + "</body>"))
    dom = browse(path, "--dump-dom")
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))
    assert seen["tip"] == "update 50\nloss  1" and seen["wide"] <= 500 and seen["inner"] == pytest.approx(seen["width"], abs=1)
    assert set(re.findall(r">([^<>]+)</b>", page)) == set(re.findall(r">([^<>]+)</b>", dom))
    browse(path, f"--screenshot={tmp_path}/page.png")
    pixels = read_png((tmp_path / "page.png").read_bytes())
    blue = np.abs(pixels - np.array([0x00, 0x72, 0xB2])).sum(-1) < 150
    top, left = round(seen["top"]), round(seen["left"])
    inside = blue[top:top + round(seen["height"]), left:left + round(seen["width"])]
    assert 300 < inside.sum() < inside.size / 10
    for (x0, y0, _), (x1, y1, _) in itertools.pairwise(points):        # in the middle of each piece, and nowhere else in that column
        x = seen["left"] + (x0 + x1) / 2 / span * seen["width"]
        y = seen["top"] + (axis_high - (y0 + y1) / 2) / (axis_high - axis_low) * seen["height"]
        column = np.flatnonzero(blue[top:top + round(seen["height"]), int(x)]) + top
        slope = abs(y1 - y0) / (axis_high - axis_low) * seen["height"] / ((x1 - x0) / span * seen["width"])
        assert len(column) and np.abs(column - y).max() < 4 + 3 * slope


SWITCH = """<script>
const shown = query => [...document.querySelectorAll(query)].map(each => getComputedStyle(each).display != 'none');
const before = [shown('.line.run0'), shown('.line.run1'), shown('.log'), shown('.linear')].map(all => [...new Set(all)]);
document.querySelector('#run0').click(), document.querySelectorAll('.logbox').forEach(box => box.click());
const after = [shown('.line.run0'), shown('.line.run1'), shown('figure:has(.logbox) .log'), shown('figure:has(.logbox) .linear')].map(all => [...new Set(all)]);
const tips = ['.area.run1', '.log .run1'].map(query => {
  const plot = document.querySelector(query).closest('.plot'), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 1, bubbles: true}));
  return plot.querySelector('.tip').textContent;
});
document.body.dataset.seen = JSON.stringify([before, after, tips]);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
def test_a_browser_can_switch_runs_and_scales_and_tells_the_values_under_the_mouse(tmp_path):
    logged = [{"loss": 9 / step, "time_data": 0.25, "time_forward": 0.5, "step": step} for step in (1, 2, 3)]
    page = report(write_run(tmp_path / "one", logged), write_run(tmp_path / "two", logged))
    path = tmp_path / "look.html"
    path.write_text(page.replace("</body>", SWITCH + "</body>"))
    before, after, tips = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', browse(path, "--dump-dom"))[1]))
    assert before == [[True], [True], [False], [True]] and after == [[False], [True], [True], [False]]
    assert tips == ["update 1\nforward  0.5\ndata  0.25", "update 1\ntwo: loss  9"]
