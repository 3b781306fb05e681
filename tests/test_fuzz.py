"""Whatever is done to the files of a checkpoint, a start skips it or refuses it and says which file it is; it raises nothing else, runs
nothing, touches nothing outside the run, and stays within bounds of time and memory. Even if the manifest was made to fit the damage."""
from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loop import train
from loss import compute_loss
from rundir import checksum, find_checkpoint, verify
from state import UsageError
from storage import MAX_JSON_BYTES, describe_file
from tests.test_resume import Patience
from tests.toy import arguments, gpt, run_training, sequences, toy_run
from world import open_world

FILES = ("args.json", "ema-0.safetensors", "manifest.json", "model.safetensors", "optimizer-0.safetensors", "rng-0.json", "state.json")
SETTINGS = {"ema_decay": 0.5, "fp16": True, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
MAX_SECONDS, MAX_BYTES = 30, 2**30      # of one start, beyond what the process had
OWN = re.compile(r"(run|new)(/(.lock|metrics.jsonl|status.json(.tmp)?|(damaged-)?checkpoint-\d(/.*)?))?", re.DOTALL)     # files of runs
RUNS = ("pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen")   # events of running something


class Watch:
    """What the interpreter opens and runs, by its own account (PEP 578), while `events` is a list."""

    def __init__(self):
        self.events: list | None = None
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        if self.events is not None and (event in RUNS or event == "open" and isinstance(args[0], (str, bytes))):
            self.events.append((event, os.path.realpath(os.fsdecode(args[0])) if event == "open" else str(args)))


@pytest.fixture(scope="module")
def watch():
    return Watch()


def settings(output_dir, **changes):
    return arguments(output_dir, **{**SETTINGS, "max_steps": 3, **changes})


def parts() -> dict:
    return {"model": model(), "train_set": sequences(8), "eval_set": sequences(2, seed=1), "callbacks": [Patience()]}


model = functools.cache(gpt)        # which takes longer to build than a checkpoint to refuse


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of two updates, each of which it saved."""
    path = tmp_path_factory.mktemp("saved") / "run"
    run_training(settings(path, max_steps=2, save_strategy="steps", save_steps=1), **parts())
    assert sorted(os.listdir(path / "checkpoint-2")) == sorted(FILES)
    return path


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@contextlib.contextmanager
def bounded(run: Path, watch: Watch):
    """What happens inside takes no more than MAX_SECONDS and MAX_BYTES, runs nothing, and opens and changes nothing beside the files
    of runs."""
    class Late(BaseException):
        """No OSError, as TimeoutError is one."""

    def late(*_) -> None:
        raise Late
    before = strange_files(run.parent)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_BYTES, limits[1]))
    watch.events = events = []
    try:
        yield
    finally:
        watch.events = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not [event for event in events if event[0] != "open" or is_strange(event[1], run.parent)]
    assert strange_files(run.parent) == before


def is_strange(path: str, folder: Path) -> bool:
    """Whether a file in the folder that holds the runs does not belong to one."""
    return path.startswith(f"{folder}/") and not OWN.fullmatch(path.removeprefix(f"{folder}/"))


def strange_files(folder: Path) -> dict:
    found = {}
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if "checkpoint-" not in name]
        for path in (os.path.join(base, name) for name in names):
            if is_strange(path, folder) and os.path.isfile(path):
                found[path] = (os.lstat(path).st_mode, os.lstat(path).st_mtime_ns, Path(path).read_bytes())
    return found


def start(run: Path, watch: Watch) -> UsageError | None:
    """Starts from its checkpoint-2 in a new folder and trains one update; the error that ends it, if there is one."""
    with bounded(run, watch):
        try:
            shutil.rmtree(run.parent / "new", ignore_errors=True)
            args = settings(run.parent / "new", resume_from_checkpoint=str(run / "checkpoint-2"))
            with toy_run(args, **parts()) as (one, loader, eval_loader):
                random.gauss(0, 1), np.random.rand(700), torch.rand(700)
                train(one, loader, eval_loader, compute_loss)
        except UsageError as error:
            return error
    return None


def find(run: Path, resume: str) -> Path:
    args = settings(run if resume == "auto" else run.parent / "new", resume_from_checkpoint=resume)
    with open_world(args) as world:
        return Path(find_checkpoint(args, world))


def resign(folder: Path) -> None:
    """Makes the manifest fit what is in the folder, as somebody who wants to do harm can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {path.name: describe_file(path) if path.is_file() else {"bytes": path.lstat().st_size, "sha256": "0" * 64}
                         for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": checksum(manifest)}, indent=1))


def refused(error: UsageError | None, name: str) -> bool:
    """With exit code 3, by the name of the file, and not because memory ran out."""
    return error is not None and error.exit_code == 3 and name in str(error) and "emory" not in str(error) and len(str(error)) < 2000


def safetensors(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parse(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("act", [lambda run: (run / "x").read_bytes(), lambda run: (run.parent / "y").write_bytes(b""),
                                 lambda run: (run / "checkpoint-2" / "link").open().close(), lambda run: subprocess.run(["true"], check=True)])
def test_these_tests_see_what_is_opened_and_run(run, watch, act):
    (run / "x").touch()
    (run / "checkpoint-2" / "link").symlink_to(run / "x")
    with pytest.raises(AssertionError, match="open|Popen"), bounded(run, watch):
        act(run)
    with pytest.raises(MemoryError), bounded(run, watch):
        bytearray(2 * MAX_BYTES)


# ---------------------------------------------------------------------------------------------------- damaged files

def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def link(path: Path) -> None:
    outside = path.parent.parent.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGES = {
    "deleted": Path.unlink, "emptied": lambda path: replace(path, b""), "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown by a byte": lambda path: replace(path, path.read_bytes() + b"\0"),
    "random": lambda path: replace(path, random.Random(0).randbytes(path.stat().st_size)),
    "a header of a terabyte": lambda path: replace(path, (2**40).to_bytes(8, "little") + path.read_bytes()[8:]),
    "a header up to the end": lambda path: replace(path, (path.stat().st_size - 8).to_bytes(8, "little") + path.read_bytes()[8:]),
    "deep JSON": lambda path: replace(path, DEEP), "a deep header": lambda path: replace(path, safetensors(DEEP, b"")),
    "beyond the limit": lambda path: os.truncate(path, MAX_JSON_BYTES + 1), "a link": link, "a pipe": fifo, "a folder": folder,
}
ODD_NAMES = ["x", ".hidden", "..x", "...", " ", "a b", "\n", "\x1b[2J", "ü", os.fsdecode(b"\xff"), "-rf", "*", "x" * 255, "a\\..\\b",
             "checkpoint-9", "model-2.safetensors", "rng-1.json", "optimizer-1.safetensors.tmp"]
ODD_ENTRIES = ["../x", "../../outside/x", "/etc/passwd", "", ".", "..", "a/b", "x\0y", "\0", "x" * 300, "\ud800", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(run, watch, name, damage, capfd):
    newest = run / "checkpoint-2"
    DAMAGES[damage](newest / name)
    with bounded(run, watch):
        with pytest.raises(UsageError) as error:
            find(run, str(newest))
        assert refused(error.value, name)
        assert find(run, "auto") == run / "checkpoint-1"
    warning = capfd.readouterr().err
    assert f"warning: {newest} is skipped: " in warning and name in warning
    assert sorted(os.listdir(run)) == [".lock", "checkpoint-1", "damaged-checkpoint-2", "metrics.jsonl", "status.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_that_the_manifest_fits_is_refused_by_name(run, watch, name, damage):
    newest = run / "checkpoint-2"
    DAMAGES[damage](newest / name)
    if name != "manifest.json":
        resign(newest)
    error = start(run, watch)
    if (name, damage) == ("ema-0.safetensors", "deleted"):      # averages start at the weights, as in a run that was without
        assert error is None
    else:
        assert refused(error, name.replace("0", "R") if damage == "deleted" and name.startswith("optimizer") else name), error


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_file_that_was_not_saved_is_named_and_the_checkpoint_before_it_is_used(run, watch, name, capfd):
    newest = run / "checkpoint-2"
    (newest / name).write_bytes(b"x")
    shown = name if name.isascii() and name.isprintable() and len(name) < 100 and "\\" not in name else ascii(name)[1:-1][:50]
    with bounded(run, watch):
        with pytest.raises(UsageError) as error:
            find(run, str(newest))
        assert refused(error.value, shown)
        assert find(run, "auto") == run / "checkpoint-1"
    assert shown in capfd.readouterr().err


@pytest.mark.parametrize("name", ODD_ENTRIES, ids=ascii)
def test_a_name_in_the_manifest_leads_nowhere(run, watch, name, capfd):
    newest = run / "checkpoint-2"
    outside = run.parent / "outside"
    outside.mkdir()
    for path in (outside / "x", run / "x"):
        path.write_bytes(b"x")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = describe_file(outside / "x")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with bounded(run, watch):
        for shown in ("manifest.json", ascii(name)[1:-1][:50]):
            with pytest.raises(UsageError) as error:
                find(run, str(newest))
            assert refused(error.value, shown)
            write_manifest(newest, manifest)        # and once more, when it fits
        assert find(run, "auto") == run / "checkpoint-1"
    assert ascii(name)[1:-1][:50] in capfd.readouterr().err


def test_no_flipped_byte_goes_unnoticed(run):
    generator, newest = random.Random(0), run / "checkpoint-2"
    contents = {name: (newest / name).read_bytes() for name in FILES}
    for _ in range(300):
        name = generator.choice(FILES)
        flipped = bytearray(contents[name])
        place = generator.randrange(len(flipped))
        flipped[place] ^= 1 << generator.randrange(8)
        (newest / name).write_bytes(flipped)
        with pytest.raises(UsageError) as error:
            verify(str(newest))
        assert refused(error.value, name)
        (newest / name).write_bytes(contents[name])
    assert verify(str(newest))["step"] == 2


def test_whatever_byte_is_flipped_before_signing_a_start_goes_well_or_is_refused(run, watch):
    """In texts and headers: a flipped weight is a weight."""
    generator, newest = random.Random(0), run / "checkpoint-2"
    contents = {name: (newest / name).read_bytes() for name in FILES}
    wrong, good = [], 0
    for _ in range(100):
        name = generator.choice([name for name in FILES if name != "manifest.json"])
        flipped = bytearray(contents[name])
        end = len(flipped) if name.endswith(".json") else len(flipped) - len(parse(contents[name])[1])
        place = generator.randrange(end)
        flipped[place] ^= 1 << generator.randrange(8)
        (newest / name).write_bytes(flipped)
        resign(newest)
        try:
            error = start(run, watch)
        except Exception as failure:    # noqa: BLE001  what this test is for
            wrong.append((name, place, bytes(flipped[max(0, place - 20):place + 20]), repr(failure)))
        else:
            good += error is None
            if error is not None and not refused(error, name) and error.exit_code != 2:     # 2: a setting is another than this run's
                wrong.append((name, place, bytes(flipped[max(0, place - 20):place + 20]), str(error)))
        (newest / name).write_bytes(contents[name])
    assert not wrong
    assert 0 < good < 100


# ---------------------------------------------------------------------------------------------------- contents, with a manifest that fits

NAN = float("nan")
BAD = [None, "x", [], {"a": 1}, True, -7, 1e30, NAN, 10**400]
TEXTS = {"empty": b"", "a list": b"[1]", "null": b"null", "a number": b"7", "cut": b'{"state": {', "twice": b"{}{}",
         "no UTF-8": b'{"\xff": 1}', "UTF-16": '{"state": {}}'.encode("utf-16"), "a long number": b'{"state": ' + b"9" * 10_000 + b"}",
         "nested": b'{"state": ' + DEEP + b"}", "an empty object": b"{}", "NaN": b'{"state": NaN, "python": NaN}'}


def try_content(run: Path, watch: Watch, name: str, content: bytes | dict) -> UsageError | None:
    """Starts with another content of a file, and puts back what it was."""
    path = run / "checkpoint-2" / name
    kept = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    resign(path.parent)
    error = start(run, watch)
    path.write_bytes(kept)
    return error


def places(value, path=()):
    """The path and value of everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key), value[key]
        yield from places(value[key], (*path, key))


def put(value, path: tuple, *new):
    """A copy of a JSON value with something else in one place, or nothing."""
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    if new and isinstance(inside, list):
        inside.insert(path[-1], *new)
    elif new:
        inside[path[-1]], = new
    return value


@pytest.mark.parametrize("name", ["args.json", "rng-0.json", "state.json"])
def test_a_text_that_is_not_what_it_should_be_is_refused_by_name(run, watch, name):
    for about, text in TEXTS.items():
        error = try_content(run, watch, name, text)
        if name == "args.json" and about in ("an empty object", "NaN"):     # settings of another run
            assert error.exit_code == 2 and "--seed None, not 42" in str(error)
        else:
            assert refused(error, name), about


def is_harmless(path: tuple, old, new) -> bool:
    """Whether a value of the state may be another one: any float, but no negative number where whole ones are counted."""
    if new is None or path in (("scaler",), ("schedule",)):
        return old is None or not new and path[-1] in ("grad_norm", "best", "scaler", "schedule")
    if type(old) is float or path[-1] == "best_metric":
        return type(new) is float or new == -7
    return repr(new) == repr(old)


def test_a_wrong_value_in_the_state_is_refused_or_does_no_harm(run, watch):
    stored = json.loads((run / "checkpoint-2" / "state.json").read_text())
    assert stored["scaler"] and stored["schedule"]["best"] and stored["callbacks"]
    generator = random.Random(0)
    for path, old in places({key: value for key, value in stored.items() if key != "callbacks"}):
        unread = {"groups", "settings", "planned", "tied"} & {*path}       # what only tools.convert looks at
        for new in generator.sample(BAD, 1 if unread else 4):
            error = try_content(run, watch, "state.json", put(stored, path, new))
            if unread:
                assert error is None, (path, new)
            elif (path, new) == (("state", "data"), "x"):
                assert error.exit_code == 2
            elif path == ("scaler", "scale") and new is NAN:
                assert error.exit_code == 4
            elif is_harmless(path, old, new) or path == ("stream",) and isinstance(new, dict):      # of no use for data that is no stream
                assert error is None, (path, new)
            else:
                name = "state.json holds the state of" if path == ("optimizer", "class") else "state.json"
                assert refused(error, name), (path, new)
        if not unread:
            error = try_content(run, watch, "state.json", put(stored, path))
            assert refused(error, "state.json"), path


def test_wrong_states_of_callbacks_are_refused_or_left_to_the_callback(run, watch, capfd):
    stored = json.loads((run / "checkpoint-2" / "state.json").read_text())
    loaded = 0
    for path, _ in places(stored["callbacks"]):
        for new in BAD[::2]:
            if path[-1] != "counter" or new is not None:        # a callback may have set it to None, for all that a checkpoint knows
                error = try_content(run, watch, "state.json", {**stored, "callbacks": put(stored["callbacks"], path, new)})
                assert error is None or refused(error, "state.json"), (path, new)
                loaded += error is None
    assert loaded
    error = try_content(run, watch, "state.json", {**stored, "callbacks": [["\x1b[2J" * 10**6, {"attributes": {}}]]})
    warning = capfd.readouterr().err
    assert error is None and "callback '\\x1b[2J" in warning and "\x1b" not in warning and len(warning) < 10_000


def with_position(torch_state: str, left: int, after: int) -> str:
    data = bytearray.fromhex(torch_state)
    data[8:12], data[16:24] = left.to_bytes(4, "little"), after.to_bytes(8, "little")
    return data.hex()


def test_random_generators_take_no_state_that_would_have_them_read_elsewhere(run, watch):
    stored = json.loads((run / "checkpoint-2" / "rng-0.json").read_text())
    words, state = stored["numpy"][1], stored["torch"]
    for path, *values in (
            (("python", 0), 4, "x"), (("python", 1), words, []), (("python", 1, 3), -1, "x", 10**30), (("python", 1, 624), 625, -1),
            (("python", 2), "x"), (("numpy",), stored["numpy"][:2], None), (("numpy", 0), "PCG64", [], None),
            (("numpy", 1), words[:-1], 7, ["x"] * 624), (("numpy", 1, 5), -1, 2**32, None),
            (("numpy", 2), 625, -1, 10**9, NAN, "x", None), (("numpy", 3), "x", 10**30), (("numpy", 4), "x"),
            (("torch",), "", state[:-2], state[:-1], state + "00", "zz", 7, None, with_position(state, 624, 624),
             with_position(state, 625, 0), with_position(state, 0, 0), with_position(state, 2**31 + 5, 0), with_position(state, 1, 2**63))):
        for value in values:
            assert refused(try_content(run, watch, "rng-0.json", put(stored, path, value)), "rng-0.json"), (path, value)
        assert refused(try_content(run, watch, "rng-0.json", put(stored, path)), "rng-0.json"), path
    assert try_content(run, watch, "rng-0.json", stored) is None


def test_settings_of_a_checkpoint_are_shown_in_short_and_printable(run, watch, capfd):
    stored = json.loads((run / "checkpoint-2" / "args.json").read_text())
    for value in ("\ud800", "\x1b[2J", "x" * 10**6, [1] * 10**5, 10**4000, NAN, {"a": None}, json.loads("[" * 500 + "]" * 500)):
        free = {"weight_decay": value, "optim": value, str(value)[:4000]: 1}
        assert try_content(run, watch, "args.json", {**stored, **free}) is None
        error = try_content(run, watch, "args.json", {**stored, "seed": value})
        assert error.exit_code == 2 and "--seed" in str(error) and len(str(error)) < 2000 and str(error).isprintable()
        shown = capfd.readouterr().out
        assert "--weight_decay: " in shown and len(shown) < 10_000 and "\x1b" not in shown


# ---------------------------------------------------------------------------------------------------- headers

WIDTHS = {"F64": 8, "F32": 4, "I32": 4}
NUMBERS = ["x", "[]", "[[1, 2]]", '{"a": "x"}', '{"a": []}', '{"a": ' + "9" * 400 + "}", DEEP.decode(), 5, None]


def changed(header: dict, data: bytes, key: str, **entry) -> bytes:
    return safetensors({**header, key: {**header[key], **entry}}, data)


def rebuilt(header: dict, data: bytes, key: str, shape: list | None, dtype: str = "F32") -> bytes:
    """The file with one tensor in another shape or type, or without it, and everything in its place."""
    entries, content = {"__metadata__": header["__metadata__"]}, b""
    for name, entry in header.items():
        if name != "__metadata__" and (name != key or shape is not None):
            part = data[slice(*entry["data_offsets"])]
            if name == key:
                part, entry = (part * 50)[:math.prod(shape) * WIDTHS[dtype]], {"dtype": dtype, "shape": shape}
            entries[name] = {**entry, "data_offsets": [len(content), len(content) + len(part)]}
            content += part
    return safetensors(entries, content)


def in_range(header: dict, data: bytes, key: str, start: int, stop: int) -> bytes:
    rest = {name: entry for name, entry in header.items() if name != key}
    return safetensors({**rest, f"{key}[{start}:{stop}]": {**header[key], "shape": [math.prod(header[key]["shape"])]}}, data)


def with_numbers(header: dict, data: bytes, numbers) -> bytes:
    return safetensors({**header, "__metadata__": {"numbers": numbers}}, data)


HEADERS = {     # of a tensor k of 16 x 16 numbers, whose bytes are the first of the data
    "as it was": lambda h, d, k: safetensors(h, d),
    "overlapping": lambda h, d, k: safetensors({**h, k + "2": h[k]}, d),
    "with a hole": lambda h, d, k: safetensors({name: h[name] for name in h if name != k}, d),
    "beyond the end": lambda h, d, k: changed(h, d, k, data_offsets=[0, 4 * 10**12], shape=[10**12]),
    "negative": lambda h, d, k: changed(h, d, k, data_offsets=[-4, 1020]),
    "backwards": lambda h, d, k: changed(h, d, k, data_offsets=[1024, 0]),
    "floats": lambda h, d, k: changed(h, d, k, data_offsets=[0.0, 1024.0]),
    "a bool": lambda h, d, k: changed(h, d, k, data_offsets=[False, 1024]),
    "one offset": lambda h, d, k: changed(h, d, k, data_offsets=[0]),
    "no offsets": lambda h, d, k: changed(h, d, k, data_offsets=None),
    "unknown type": lambda h, d, k: changed(h, d, k, dtype="F31"),
    "no type": lambda h, d, k: changed(h, d, k, dtype=[]),
    "another shape": lambda h, d, k: changed(h, d, k, shape=[3]),
    "negative shape": lambda h, d, k: changed(h, d, k, shape=[-16, -16]),
    "words for a shape": lambda h, d, k: changed(h, d, k, shape="16"),
    "a flat shape": lambda h, d, k: changed(h, d, k, shape=[256]),
    "a huge shape": lambda h, d, k: changed(h, d, k, shape=[2**70, 2**70]),
    "a huge shape of nothing": lambda h, d, k: rebuilt(h, d, k, [0, 2**62, 2**62]),
    "many dimensions": lambda h, d, k: rebuilt(h, d, k, [1] * 10_000),
    "no entry": lambda h, d, k: safetensors({**h, k: None}, d),
    "a list": lambda h, d, k: safetensors([h], d),
    "null": lambda h, d, k: safetensors(b"null", d),
    "metadata of another kind": lambda h, d, k: safetensors({**h, "__metadata__": []}, d),
    "cut": lambda h, d, k: safetensors(h, d[:-4]),
    "without it": lambda h, d, k: rebuilt(h, d, k, None),
    "smaller": lambda h, d, k: rebuilt(h, d, k, [1]),
    "a number": lambda h, d, k: rebuilt(h, d, k, []),
    "nothing": lambda h, d, k: rebuilt(h, d, k, [0]),
    "larger": lambda h, d, k: rebuilt(h, d, k, [64, 64]),
    "reshaped": lambda h, d, k: rebuilt(h, d, k, [8, 32]),
    "in float64": lambda h, d, k: rebuilt(h, d, k, [16, 16], "F64"),
    "in int32": lambda h, d, k: rebuilt(h, d, k, [16, 16], "I32"),
    "all of a range": lambda h, d, k: in_range(h, d, k, 0, 256),
    "a shorter range": lambda h, d, k: in_range(h, d, k, 0, 5),
    "a shifted range": lambda h, d, k: in_range(h, d, k, 7, 263),
    "a backward range": lambda h, d, k: in_range(h, d, k, 256, 0),
    "a far range": lambda h, d, k: in_range(h, d, k, 10**14, 10**14 + 256),
    "a number besides": lambda h, d, k: with_numbers(h, d, json.dumps({k: 1})),
    **{f"numbers {i}": lambda h, d, k, numbers=numbers: with_numbers(h, d, numbers) for i, numbers in enumerate(NUMBERS)},
}
WELL_FORMED = {"model.safetensors": {"as it was", "in float64", "a number besides"},
               "optimizer-0.safetensors": {"as it was", "all of a range"},
               "ema-0.safetensors": {"as it was", "in float64", "in int32", "all of a range", "a number besides"}}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_a_header_that_does_not_fit_is_refused_by_name(run, watch, name):
    header, data = parse((run / "checkpoint-2" / name).read_bytes())
    key = "blocks.0.attn.out.weight" + ".exp_avg" * (name == "optimizer-0.safetensors")
    assert header[key] == {"dtype": "F32", "shape": [16, 16], "data_offsets": [0, 1024]}
    for about, edit in HEADERS.items():
        error = try_content(run, watch, name, edit(header, data, key))
        if (name, about) == ("model.safetensors", "in int32"):      # as good as any other weights
            assert error.exit_code == 4
        else:
            assert error is None if about in WELL_FORMED[name] else refused(error, name), about


@pytest.mark.parametrize("shape, dtype", [([2], "F32"), ([0], "F32"), ([], "I32")])
def test_a_step_count_is_one_number(run, watch, shape, dtype):
    header, data = parse((run / "checkpoint-2" / "optimizer-0.safetensors").read_bytes())
    error = try_content(run, watch, "optimizer-0.safetensors", rebuilt(header, data, "norm.weight.step", shape, dtype))
    assert refused(error, "optimizer-0.safetensors") and "norm.weight.step does not fit" in str(error)


def test_a_history_that_is_shorter_than_the_checkpoint_says_is_not_filled_up(run, watch):
    stored = json.loads((run / "checkpoint-2" / "state.json").read_text())
    stored["state"]["log_bytes"] = 2**52
    assert try_content(run, watch, "state.json", stored) is None
    log = run.parent / "new" / "metrics.jsonl"
    assert all(json.loads(line) for line in log.read_text().splitlines()) and log.stat().st_size < 10_000


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file_is_not_run(run, watch, name):
    made = run.parent / "outside"
    payload = f"cposix\nmkdir\n(V{made}\ntR.".encode()
    (run / "checkpoint-2" / name).write_bytes(payload)
    if name != "manifest.json":
        resign(run / "checkpoint-2")
    assert refused(start(run, watch), name) and not made.exists()
    (run.parent / "payload").write_bytes(payload)
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", run.parent / "payload"], check=True)
    assert made.exists()        # it would have run
