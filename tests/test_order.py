"""Which sample goes where, and that each goes somewhere exactly once."""
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collators import default_collator
from data import Loader
from tests.toy import Numbers


def loaders(n, batch_size, world_size, dataset=Numbers, **options):
    return [Loader(dataset(n), default_collator, batch_size, rank, world_size, **options) for rank in range(world_size)]


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


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        loaders(0, 2, 1)
