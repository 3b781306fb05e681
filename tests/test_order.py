"""Which sample goes where, and that each goes somewhere exactly once."""
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collators import default_collator
from data import Blocks
from loader import Loader
from state import UsageError
from tests.toy import Numbers


def loaders(n, batch_size, world_size, dataset=Numbers, seed=None, **options):
    return [Loader(dataset(n), default_collator, batch_size, rank, world_size, seed or 0, seed is not None, **options) for rank in range(world_size)]


def read_all(*args, **kwargs) -> list[int]:
    return [i for batch in samples(*args, **kwargs) for i in batch]


def samples(loader, epoch=0, start=0) -> list[list[int]]:
    """Sample numbers of each micro-batch, without filler."""
    return [mb["x"].flatten().int().tolist()[:mb["num_samples"]] for mb in loader.epoch(epoch, start)]


class Stream:
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter({"x": torch.tensor([float(i)])} for i in range(self.n))


def test_the_order_of_epoch_e_is_randperm_seeded_with_seed_plus_e():
    loader, = loaders(10, 2, 1, seed=42)
    assert read_all(loader, 0) == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]     # the HF Trainer's orders for seed 42
    assert read_all(loader, 1) == [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]
    assert read_all(loaders(10, 2, 1, seed=7)[0]) == [5, 0, 3, 4, 1, 7, 9, 6, 8, 2]


def test_micro_batch_i_goes_to_rank_i_mod_world_and_the_tail_is_filled_without_weight():
    first, second = loaders(10, 2, 2, seed=42)
    assert samples(first) == [[2, 6], [4, 5], [3, 7]]
    assert samples(second) == [[1, 8], [0, 9], []]
    filler = list(second.epoch())[-1]
    assert (filler["num_samples"], filler["num_items"], len(filler["x"])) == (0, 0, 1)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 5), epoch=st.integers(0, 3),
       seed=st.one_of(st.none(), st.integers(0, 5)), stream=st.booleans())
def test_every_sample_is_seen_once_and_all_ranks_get_equally_many_micro_batches(n, batch_size, world_size, epoch, seed, stream):
    each = [samples(loader, epoch) for loader in loaders(n, batch_size, world_size, Stream if stream else Numbers, seed=seed)]
    assert sorted(i for rank in each for batch in rank for i in batch) == list(range(n))
    assert len({len(rank) for rank in each}) == 1
    assert len(each[0]) == -(-n // (batch_size * world_size))


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 40), start=st.integers(0, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 5), stream=st.booleans())
def test_an_epoch_goes_on_with_the_next_sample_at_any_batch_and_world_size(n, start, batch_size, world_size, stream):
    kind = Stream if stream else Numbers
    whole = read_all(loaders(n, 3, 1, kind, seed=5)[0])
    rounds = zip(*(samples(loader, 0, min(start, n)) for loader in loaders(n, batch_size, world_size, kind, seed=5)))
    assert [i for round_ in rounds for batch in round_ for i in batch] == whole[start:]


def test_resuming_slices_the_order_and_reads_nothing_twice():
    loader, = loaders(10, 2, 1, seed=1)
    list(loader.epoch(0, start=6))
    assert len(loader.dataset.read) == 4


def test_drop_last_leaves_out_the_same_incomplete_round_on_all_ranks():
    each = [samples(loader) for loader in loaders(11, 2, 2, seed=3, drop_last=True)]
    assert [len(rank) for rank in each] == [2, 2] == [len(loader) for loader in loaders(11, 2, 2, seed=3, drop_last=True)]
    assert len({i for rank in each for batch in rank for i in batch}) == 8


def test_reading_data_moves_no_global_random_generator():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for loader in loaders(10, 2, 2, seed=42):
        list(loader.epoch(1))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


class Texts:
    """Sample i has lengths[i] tokens; `x` is its number, as in Numbers."""

    def __init__(self, lengths):
        self.lengths, self.read = lengths, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.read.append(i)
        return {"x": torch.tensor([float(i)]), "input_ids": [1] * self.lengths[i]}


def numbers(samples) -> dict:
    return default_collator([{"x": sample["x"]} for sample in samples])


def grouped(lengths, batch_size, world_size=1, seed=0):
    return [Loader(Texts(lengths), numbers, batch_size, rank, world_size, seed, True, True) for rank in range(world_size)]


def test_the_order_of_group_by_length_is_the_hf_trainers():
    loader, = grouped([1, 5, 2, 9, 3, 8, 4, 7], 2)
    assert read_all(loader) == [3, 0, 4, 7, 5, 2, 1, 6]


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=90), batch_size=st.integers(1, 4), world_size=st.integers(1, 3),
       epoch=st.integers(0, 3), start=st.integers(0, 90))
def test_group_by_length_sees_every_sample_once_in_an_order_of_the_round_size_alone(lengths, batch_size, world_size, epoch, start):
    from transformers.trainer_pt_utils import get_length_grouped_indices
    round_size = batch_size * world_size
    expected = get_length_grouped_indices(lengths, round_size, generator=torch.Generator().manual_seed(3 + epoch))
    many, (one,) = grouped(lengths, batch_size, world_size, seed=3), grouped(lengths, round_size, seed=3)
    rounds = zip(*(samples(loader, epoch) for loader in many))
    assert [i for round_ in rounds for batch in round_ for i in batch] == read_all(one, epoch) == expected
    assert sorted(expected) == list(range(len(lengths)))
    assert read_all(one, epoch, min(start, len(lengths))) == expected[start:]


def test_group_by_length_reads_each_sample_once_for_its_length_and_equal_blocks_not_at_all(monkeypatch):
    loader, = grouped([3, 1, 2], 1)
    assert loader.dataset.read == [0, 1, 2]
    loader.order(0), loader.order(1)
    assert loader.dataset.read == [0, 1, 2]
    blocks = Blocks(torch.arange(40), torch.arange(0, 39, 4), 4)
    plain, shuffled = Loader(blocks, default_collator, 2, seed=1, shuffle=True), Loader(blocks, default_collator, 2, seed=1, shuffle=True, group_by_length=True)
    assert torch.equal(plain.order(2), shuffled.order(2)) and shuffled.lengths is None


@pytest.mark.parametrize("dataset, said", [(Stream(4), "the training data is a stream: give data with __len__"),
                                           (Numbers(4), "sample 0 has x: give dicts with input_ids"), ([(1, 2)], "sample 0 is a tuple")])
def test_samples_whose_length_is_not_known_cannot_be_grouped(dataset, said):
    with pytest.raises(UsageError, match=f"--train_sampling_strategy group_by_length needs .*{said}"):
        Loader(dataset, default_collator, 2, seed=1, shuffle=True, group_by_length=True)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        loaders(0, 2, 1)
