"""From files to blocks: every byte is trained on, held-out data is held out, and lazy reading gives the same blocks."""
import csv
import json
import os

import pytest
import torch

from args import TrainArgs
from collators import default_collator
from data import Blocks, block_starts, build_data, source_files, to_tokens
from loader import Loader
from state import UsageError


def text_of(dataset) -> list[bytes]:
    return [bytes(dataset[i]["input_ids"].tolist()) for i in range(len(dataset))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def data_of(dataset, **changes):
    return build_data(TrainArgs(dataset=str(dataset), block_size=16, **changes))


def test_every_token_but_the_first_is_a_label_once():
    for n in (17, 32, 33, 40, 100):
        tokens = torch.arange(n)
        blocks = Blocks(tokens, block_starts(tokens, 16, n, "test"), 16)
        labels = torch.cat([blocks[i]["labels"] for i in range(len(blocks))])
        assert labels[labels != -100].tolist() == list(range(1, n))


def test_a_batch_is_its_samples_stacked():
    tokens = torch.randint(256, (100,), dtype=torch.uint8)
    blocks = Blocks(tokens, block_starts(tokens, 16, 256, "test"), 16)
    batch = default_collator(blocks.__getitems__([5, 0, 6]))
    for row, i in enumerate([5, 0, 6]):
        assert torch.equal(batch["input_ids"][row], blocks[i]["input_ids"]) and torch.equal(batch["labels"][row], blocks[i]["labels"])
    assert batch["num_items"] == int((batch["labels"] != -100).sum())


def test_the_default_data_is_the_standard_library_split_by_file():
    data = build_data(TrainArgs())
    assert 3_000_000 < len(data.train) * 128 < 60_000_000 and len(data.eval) > 1000
    assert "sha256" in data.about and data.about == build_data(TrainArgs()).about
    assert not any("/test/" in name or "site-packages" in name for name in source_files(os.path.dirname(os.__file__)))


def test_a_python_without_its_source_falls_back_to_torch_and_numpy(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    data = build_data(TrainArgs())
    assert "torch" in data.about and "numpy" in data.about and len(data.train) * 128 > 20_000_000 and len(data.eval) > 1000


WORDS = [f"line {i} of a small text, {'x' * (i % 7)}\n" for i in range(400)]


def write(path, kind) -> str:
    rows = [{"text": "".join(WORDS[i:i + 10]), "id": i} for i in range(0, 400, 10)]
    if kind == "txt":
        path.write_text("".join(WORDS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "id"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_files_of_each_kind_become_blocks_and_no_byte_is_lost(cache, kind):
    path = write(cache / f"data.{kind}", kind)
    data = data_of(path)
    whole = "".join(WORDS).encode()
    everything = bytes(data.train.tokens[:data.train.num_tokens].tolist())
    assert everything.replace(b"\0", b"") == whole
    assert everything.count(b"\0") == (0 if kind == "txt" else 40)          # rows are documents, and end
    assert sorted([*data.train.starts.tolist(), *data.eval.starts.tolist()]) == list(range(0, len(everything) - 1, 16))


def test_the_held_out_blocks_are_five_percent_by_content_and_never_trained_on(cache):
    data = data_of(write(cache / "data.txt", "txt"))
    train, evals = set(text_of(data.train)), set(text_of(data.eval))
    assert not train & evals
    assert 0.02 < len(data.eval) / (len(data.train) + len(data.eval)) < 0.09


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_streaming_gives_the_same_blocks_in_the_order_of_the_file(cache, kind):
    path = write(cache / f"data.{kind}", kind)
    whole, lazy = data_of(path), data_of(path, streaming=True, max_steps=1)
    for part in ("train", "eval"):
        expected = text_of(getattr(whole, part))
        got = list(getattr(lazy, part))
        assert [bytes(s["input_ids"].tolist())[:len(e)] for s, e in zip(got, expected)] == expected and len(got) == len(expected)
        assert all(torch.equal(s["labels"], getattr(whole, part)[i]["labels"]) for i, s in enumerate(got))


def test_a_stream_is_read_lazily_and_goes_on_at_any_sample(cache):
    stream = data_of(write(cache / "data.txt", "txt"), streaming=True, max_steps=1).train
    batches = [batch["input_ids"] for batch in Loader(stream, default_collator, 4).epoch()]
    later = [batch["input_ids"] for batch in Loader(stream, default_collator, 4).epoch(0, start=8)]
    assert torch.equal(torch.cat(batches[2:]), torch.cat(later))


def test_globs_lists_folders_and_eval_files(cache):
    for i in range(3):
        (cache / f"part{i}.txt").write_text("".join(WORDS[100 * i:100 * i + 100]))
    data = data_of(cache / "part[01].txt", eval_dataset=str(cache / "part2.txt"))
    assert bytes(data.train.tokens[:data.train.num_tokens].tolist()).decode() == "".join(WORDS[:200])
    assert bytes(data.eval.tokens[:data.eval.num_tokens].tolist()).decode() == "".join(WORDS[200:300])
    both = data_of(f"{cache}/part0.txt,{cache}/part1.txt", eval_dataset=str(cache / "part2.txt"))
    assert both.about.partition("sha256 ")[2] == data.about.partition("sha256 ")[2] != ""
    texts = cache / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("".join(WORDS))
    assert data_of(texts).train.num_tokens == len("".join(WORDS))
    (texts / "train.txt").write_text("".join(WORDS))       # a name that means a split elsewhere
    assert data_of(texts).train.num_tokens == 2 * len("".join(WORDS))


@pytest.mark.parametrize("content, changes, said", [
    ("short", {}, "not one block of --block_size 16"), ("", {}, "empty file"), (None, {}, "no such file"),
    ("".join(WORDS), {"vocab_size": 100}, "sample 0 has token"), ("".join(WORDS), {"vocab_size": 100, "streaming": True, "max_steps": 1}, "has token")])
def test_bad_text_is_one_clear_error(cache, content, changes, said):
    path = cache / "data.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=said):
        for sample in data_of(path, **changes).train:
            assert sample is not None


def test_bad_tables_are_clear_errors(cache):
    path = write(cache / "data.jsonl", "jsonl")
    with pytest.raises(UsageError, match="no column 'body'; give --text_column, one of text, id"):
        data_of(path, text_column="body")
    with pytest.raises(UsageError, match="row 0: column 'id' holds 0, expected text"):
        data_of(path, text_column="id")
    (cache / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UsageError, match="cannot be read as json"):
        data_of(cache / "broken.jsonl")
    (cache / "other.txt").write_text("x")
    with pytest.raises(UsageError, match="files of different kinds"):
        data_of(f"{path},{cache / 'other.txt'}")
    (cache / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match="cannot be read as text"):
        data_of(cache / "latin.txt")
    with pytest.raises(UsageError, match="no file matches"):
        data_of(cache / "*.nothing")


def test_bad_files_of_a_stream_are_clear_errors_too(cache):
    (cache / "latin.txt").write_bytes(b"some text\n" * 100 + b"caf\xe9\n" * 100)
    (cache / "broken.jsonl").write_text('{"text": "some text that is long enough"}\n' * 300 + '{"text": \n')
    for name in ("latin.txt", "broken.jsonl"):
        with pytest.raises(UsageError, match="cannot be read"):
            list(data_of(cache / name, streaming=True, max_steps=1).train)


def test_an_unknown_name_offline_is_one_clear_error():
    with pytest.raises(UsageError, match="no such file, and no data set of that name could be reached"):
        build_data(TrainArgs(dataset="nobody/nothing"))


@pytest.mark.parametrize("key, value, said", [("input_ids", 17, r"sample 3: input_ids\[2\] is 17"), ("input_ids", -1, r"is -1"),
                                              ("labels", 99, r"sample 3: labels\[2\] is 99"), ("labels", -1, "-100 marks what is ignored")])
def test_an_id_outside_the_vocabulary_names_its_sample(key, value, said):
    from tests.toy import sequences
    samples = sequences(6)
    samples[3][key][2] = value
    loader = Loader(samples, default_collator, 4, vocab_size=17)
    with pytest.raises(UsageError, match=said):
        list(loader.epoch())


def test_collating_unequal_samples_and_missing_counts_are_clear_errors():
    with pytest.raises(UsageError, match="different shapes in 'x'"):
        list(Loader([{"x": torch.zeros(1)}, {"x": torch.zeros(2)}], default_collator, 2).epoch())
    with pytest.raises(UsageError, match="must return num_items"):
        list(Loader([{"x": torch.zeros(1)}], lambda samples: {"x": samples[0]["x"]}, 1).epoch())


def test_bytes_round_trip():
    assert bytes(to_tokens(b"\0\xffabc").tolist()) == b"\0\xffabc"
