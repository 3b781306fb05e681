"""What is drawn at random for a sample is the same in any batch, rank, worker and after a resume, and another one in another epoch."""
import json
import random

import datasets
import numpy as np
import pytest
import torch

from args import TrainArgs
from collators import MaskedLMCollator, PaddingCollator, default_collator
from data import build_data, keep_columns
from loader import Loader
from loss import logits_loss
from state import UsageError
from tests.toy import arguments, flat, gpt, run_training, sequences

TEXTS = [{"input_ids": torch.randint(5, 40, (6 + i % 7,), generator=torch.Generator().manual_seed(i))} for i in range(13)]
MASKING = MaskedLMCollator(pad_id=0, mask_id=1, vocab_size=40, probability=0.3)


def masked(epoch=0, start=0, batch_size=3, world_size=1, **options) -> dict:
    """Sample -> what was drawn for it: samples are known by their length and what was not masked."""
    found = {}
    for rank in range(world_size):
        loader = Loader(TEXTS, MASKING, batch_size, rank, world_size, **{"seed": 7, "shuffle": True, **options})
        for number, batch in enumerate(loader.epoch(epoch, start)):
            mine = loader.order(epoch)[start:].split(batch_size)[number * world_size + rank] if batch["num_samples"] else []
            for row, sample in enumerate(mine):
                n = len(TEXTS[sample]["input_ids"])
                found[int(sample)] = batch["input_ids"][row, :n].tolist(), batch["labels"][row, :n].tolist()
    return found


def test_masks_do_not_depend_on_batch_size_ranks_workers_or_where_a_pass_begins():
    plain = masked()
    assert len(plain) == 13 and any(-100 != label for _, labels in plain.values() for label in labels)
    assert masked(batch_size=5) == masked(world_size=2) == masked(batch_size=2, world_size=3) == plain
    assert masked(num_workers=2) == masked(num_workers=1, persistent_workers=True) == plain
    later = masked(start=6, num_workers=2)
    assert later == {sample: plain[sample] for sample in later} and len(later) == 7


def test_masks_are_others_in_another_epoch_and_for_another_seed_and_the_same_in_each_evaluation():
    plain = masked()
    for other in (masked(epoch=1), masked(seed=8)):
        assert sum(other[sample] != plain[sample] for sample in plain) > 6
    loader = Loader(TEXTS, MASKING, 4, seed=7)
    first, second = ([batch["labels"].tolist() for batch in loader.epoch()] for _ in range(2))
    assert first == second


class Drawing:
    """Samples are drawn from the three global generators, as augmentations are."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"x": torch.tensor([i, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)}


def drawn(rank=0, world_size=1, epoch=0, start=0, num_workers=2, seed=0) -> list[tuple]:
    loader = Loader(Drawing(), default_collator, 2, rank, world_size, seed=seed, num_workers=num_workers)
    return [tuple(row) for batch in loader.epoch(epoch, start) for row in batch["x"].tolist()]


def test_data_sets_that_draw_do_so_differently_in_each_worker_rank_and_epoch_and_again_the_same():
    before = torch.get_rng_state()
    streams = [drawn(0, 2), drawn(1, 2), drawn(0, 2, epoch=1), drawn(0, 2, seed=1)]
    assert torch.equal(torch.get_rng_state(), before)       # starting workers does not move training's generator
    for at in (1, 2, 3):
        values = [row[at] for stream in streams for row in stream]
        assert len(set(values)) == len(values) == 24
    assert drawn(0, 2) == streams[0] and drawn(0, 2, num_workers=1) == streams[0]
    assert drawn(start=4) == drawn()[4:] and sorted(drawn()) == sorted(streams[0] + streams[1])


@pytest.mark.parametrize("sampling", ["random", "sequential", "group_by_length"])
def test_training_with_workers_is_training_without(tmp_path, sampling):
    from transformers import BertConfig, BertForMaskedLM

    def trained(name, **changes):
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
        args = arguments(tmp_path / name, max_steps=8, train_sampling_strategy=sampling, **changes)
        return flat(run_training(args, logits_loss, model=model, train_set=TEXTS, collate=MASKING)).tolist()
    plain = trained("plain", save_strategy="steps", save_steps=3)
    assert trained("workers", dataloader_num_workers=2, dataloader_prefetch_factor=3) == plain
    resumed = trained("resumed", dataloader_num_workers=1, resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    assert resumed == plain


def test_a_mistake_in_a_worker_is_told_as_one_in_training():
    loader = Loader([*TEXTS, {"input_ids": torch.tensor([99])}], PaddingCollator(0), 2, vocab_size=40, num_workers=1)
    with pytest.raises(UsageError, match=r"^sample 13: input_ids\[0\] is 99, outside 0..39$"):
        list(loader.epoch())


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next_one():
    loader = Loader(Drawing(), default_collator, 2, num_workers=2, persistent_workers=True)
    next(iter(loader.epoch()))
    assert [int(row[0]) for batch in loader.epoch() for row in batch["x"].tolist()] == list(range(12))


# ---------------------------------------------------------------------------------------------------- streams
class Counting:
    """Counts what is really read of a stream that can seek, as those of the package datasets, and of one that cannot."""

    def __init__(self, n):
        self.n, self.at, self.read = n, 0, []

    def __iter__(self):
        first, self.at = self.at, 0
        for i in range(first, self.n):
            self.read.append(i)
            self.next = i + 1
            yield {"x": torch.tensor([float(i)])}


class Seeking(Counting):
    next = 0

    def state_dict(self):
        return {"at": self.next}

    def load_state_dict(self, state):
        self.at = state["at"]


def ones(model, batch):
    return (model(batch["x"]) - batch["x"]).square().sum()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Counting, Seeking])
def test_a_stream_goes_on_with_the_next_sample_in_any_pass_and_one_that_can_seek_reads_nothing_twice(tmp_path, kind, workers):
    def run(name, **changes):
        stream = kind(10)
        args = arguments(tmp_path / name, max_steps=12, save_strategy="steps", dataloader_num_workers=workers, optim="sgd", learning_rate=1e-3, **changes)
        torch.manual_seed(0)
        return flat(run_training(args, ones, model=torch.nn.Linear(1, 1), train_set=stream)).tolist(), stream.read
    whole, _ = run("whole", save_steps=1)
    for step in (3, 5, 8):      # in the first pass, at its end, in the second
        weights, read = run(f"from{step}", save_steps=9, resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert weights == whole
        skipped = 0 if kind is Seeking else step * 2 % 10
        assert read[0] == (step * 2 % 10 if kind is Seeking else 0) and len(read) >= 24 - 2 * step + skipped
        twice, read = run(f"again{step}", save_steps=12, resume_from_checkpoint=str(tmp_path / f"from{step}" / "checkpoint-9"))
        assert twice == whole and read[0] == (8 if kind is Seeking else 0)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_streamed_file_goes_on_exactly_where_it_was(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [f"word {i * i} " * (1 + i % 5) for i in range(25)]
    path = tmp_path / f"data.{kind}"
    path.write_text("".join(json.dumps({"text": w}) + "\n" for w in words) if kind == "jsonl" else "\n".join(words))

    def run(name, **changes):
        args = TrainArgs(output_dir=str(tmp_path / name), dataset=str(path), streaming=True, max_steps=10, block_size=16, n_layer=1, n_embd=16, n_head=2,
                         save_steps=1, per_device_train_batch_size=9, logging_steps=1, **changes)
        from model import build_model
        torch.manual_seed(0)
        return flat(run_training(args, model=build_model(args), train_set=build_data(args).train)).tolist()
    whole = run("whole")
    states = {step: json.loads((tmp_path / "whole" / f"checkpoint-{step}" / "state.json").read_text()) for step in range(1, 11)}
    assert states[10]["state"]["epochs_done"] >= 1 and states[8]["state"]["samples_seen"] > 0
    for step in (1, 4, 8):      # the last one in another pass
        assert run(f"from{step}", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}")) == whole
    assert states[4]["stream"]["rows"]


# ---------------------------------------------------------------------------------------------------- columns
def test_columns_that_the_model_does_not_take_are_left_out_and_named(capsys, tmp_path):
    table = datasets.Dataset.from_list([{**{k: v.tolist() for k, v in s.items()}, "id": i, "text": "t"} for i, s in enumerate(sequences(8))])
    run_training(arguments(tmp_path / "a", max_steps=2), train_set=table)
    assert "columns left out, as the model does not take them: id, text" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no column of the data .id, text. is an argument of GPT.forward .input_ids, labels"):
        run_training(arguments(tmp_path / "b", max_steps=2), train_set=table.select_columns(["id", "text"]))
    assert keep_columns(sequences(2), torch.nn.Linear(1, 1), default_collator, [])[1] == ""      # not a table


def test_columns_are_left_out_for_models_of_transformers_too():
    from transformers import BertConfig, BertForSequenceClassification
    model = BertForSequenceClassification(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    table = datasets.Dataset.from_dict({"id": ["a"], "text": ["t"], "input_ids": [[1, 2]], "label": [0]})
    kept, note = keep_columns(table, model, PaddingCollator(0), [])       # forward(..., **kwargs)
    assert kept.column_names == ["input_ids", "label"] and note.endswith("id, text")


def test_columns_that_the_collator_uses_are_kept_for_it():
    table = datasets.Dataset.from_dict({"input_ids": [[1, 10, 2]], "special_tokens_mask": [[1, 0, 1]], "text": ["t"]})
    kept, note = keep_columns(table, gpt(), MASKING, [])
    assert kept.column_names == ["input_ids", "special_tokens_mask"] and note.endswith("take them: text")


def test_a_shuffled_stream_is_read_again_and_goes_on_exactly(tmp_path, capsys):
    def run(name, **changes):
        stream = datasets.Dataset.from_dict({"x": [[float(i)] for i in range(20)]}).to_iterable_dataset().shuffle(seed=1, buffer_size=8).with_format("torch")
        torch.manual_seed(0)
        args = arguments(tmp_path / name, max_steps=16, save_strategy="steps", save_steps=1, optim="sgd", learning_rate=1e-4, remove_unused_columns=False, **changes)
        return flat(run_training(args, ones, model=torch.nn.Linear(1, 1), train_set=stream)).tolist()
    whole = run("whole")
    for step, again in ((3, 6), (13, 6)):       # the second pass is shuffled anew
        assert run(f"from{step}", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}")) == whole
        assert f"the stream is read again up to sample {again} of its pass" in capsys.readouterr().out


def test_flags_of_workers_need_workers():
    from args import check_args
    for flag in ({"dataloader_prefetch_factor": 2}, {"dataloader_persistent_workers": True}):
        with pytest.raises(UsageError, match="needs --dataloader_num_workers"):
            check_args(TrainArgs(**flag))
