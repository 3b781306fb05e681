"""Collators: batches by hand, what is masked and how often, and padding that never moves the loss."""
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from collators import (
    CausalLMCollator,
    MaskedLMCollator,
    MultipleChoiceCollator,
    PackingCollator,
    PaddingCollator,
    Seq2SeqCollator,
    default_collator,
)
from loss import compute_loss, logits_loss
from state import SampleError, UsageError
from tests.toy import VOCAB, gpt

PAD, MASK = 0, 4
TWO = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]


def plain(batch: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_labels_by_any_of_their_names_are_counted_and_whole_numbers_or_floats():
    for name in ("labels", "label", "label_ids"):
        assert plain(default_collator([{"x": 1.0, name: 2}, {"x": 3.0, name: -100}])) == {"x": [1.0, 3.0], "labels": [2, -100], "num_items": 1}
    assert default_collator([{"x": 1, "label": True}])["labels"].dtype == torch.int64
    assert plain(default_collator([{"x": 1, "label": 0.5}] * 2)) == {"x": [1, 1], "labels": [0.5, 0.5], "num_items": 2}
    assert plain(default_collator({"x": torch.ones(2), "label": torch.tensor([3, -100])})) == {"x": [1, 1], "labels": [3, -100], "num_items": 1}


def test_padding_by_hand():
    mask = [[1, 1, 1], [1, 0, 0]]
    assert plain(PaddingCollator(9)(TWO)) == {"input_ids": [[5, 6, 7], [8, 9, 9]], "attention_mask": mask, "num_items": 2}
    full = [{**TWO[0], "attention_mask": [1, 0, 1], "token_type_ids": [0, 1, 1], "special_tokens_mask": [1, 0, 1], "labels": [1, -100, 2], "score": 0.5},
            {"input_ids": [8], "attention_mask": [1], "token_type_ids": [1], "special_tokens_mask": [0], "labels": [3], "score": 1.5}]
    assert plain(PaddingCollator(9)(full)) == {
        "input_ids": [[5, 6, 7], [8, 9, 9]], "attention_mask": [[1, 0, 1], [1, 0, 0]], "token_type_ids": [[0, 1, 1], [1, 0, 0]],
        "special_tokens_mask": [[1, 0, 1], [0, 1, 1]], "labels": [[1, -100, 2], [3, -100, -100]], "score": [0.5, 1.5], "num_items": 3}
    assert PaddingCollator(9, pad_to_multiple_of=4)(full)["labels"].tolist() == [[1, -100, 2, -100], [3, -100, -100, -100]]
    for label, count in ((1, 2), ([1.0, 0.0], 2)):      # classes, and several at once, are not of tokens
        batch = PaddingCollator(9)([{**sample, "label": label} for sample in TWO])
        assert batch["labels"].tolist() == [label, label] and batch["num_items"] == count


def test_causal_lm_by_hand():
    batch = plain(CausalLMCollator(5)(TWO))       # the pad_id may be a token that is learned, such as the end of a document
    assert batch == {"input_ids": [[5, 6, 7], [8, 5, 5]], "attention_mask": [[1, 1, 1], [1, 0, 0]], "labels": [[6, 7, -100], [-100] * 3], "num_items": 2}
    batch = CausalLMCollator(0)([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
    assert batch["labels"].tolist() == [[-100, 7, 8, -100]] and batch["num_items"] == 2
    batch = CausalLMCollator(0)([{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}])
    assert batch["labels"].tolist() == [[6, -100, -100, -100]]


def test_packing_by_hand():
    assert plain(PackingCollator()([*TWO, {"input_ids": [3, 4]}])) == {
        "input_ids": [[5, 6, 7, 8, 3, 4]], "position_ids": [[0, 1, 2, 0, 0, 1]], "labels": [[6, 7, -100, -100, 4, -100]], "num_items": 3}
    batch = PackingCollator()([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
    assert batch["labels"].tolist() == [[-100, 7, -100, 9, -100]]


def test_seq2seq_by_hand():
    batch = Seq2SeqCollator(0, 1)([{**TWO[0], "labels": [2, 3]}, {**TWO[1], "labels": [4, 5, 6, 7]}])
    assert plain(batch) == {"input_ids": [[5, 6, 7], [8, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]], "num_items": 6,
                            "labels": [[2, 3, -100, -100], [4, 5, 6, 7]], "decoder_input_ids": [[1, 2, 3, 0], [1, 4, 5, 6]]}


def test_multiple_choice_by_hand():
    samples = [{"input_ids": [[1, 2], [3]], "token_type_ids": [[0, 1], [1]], "label": 1}, {"input_ids": [[4], [5]], "token_type_ids": [[1], [1]], "label": 0}]
    assert plain(MultipleChoiceCollator(9)(samples)) == {
        "input_ids": [[[1, 2], [3, 9]], [[4, 9], [5, 9]]], "attention_mask": [[[1, 1], [1, 0]], [[1, 0], [1, 0]]],
        "token_type_ids": [[[0, 1], [1, 0]], [[1, 0], [1, 0]]], "labels": [1, 0], "num_items": 2}


# ---------------------------------------------------------------------------------------------------- masked LM
def texts(n: int, length: int = 400) -> list[dict]:
    """Ids 10..29 between the special 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": [1, *torch.randint(10, 30, (length + i,), generator=generator).tolist(), 2]} for i in range(n)]


def near(count: int, total: int, share: float) -> bool:
    return abs(count - share * total) < 4 * (total * share * (1 - share)) ** 0.5


def test_fifteen_percent_are_chosen_and_of_them_eighty_masked_ten_random_ten_kept():
    samples = texts(200)
    batch = MaskedLMCollator(PAD, MASK, 1000, special_ids=(1, 2))(samples, list(range(200)))
    original = PaddingCollator(PAD)(samples)["input_ids"]
    ids, chosen = batch["input_ids"], batch["labels"] != -100
    eligible = (original >= 10)
    assert not chosen[~eligible].any() and near(int(chosen.sum()), int(eligible.sum()), 0.15)
    assert (batch["labels"][chosen] == original[chosen]).all() and (ids[~chosen] == original[~chosen]).all()
    count, masked, kept = int(chosen.sum()), ids[chosen] == MASK, ids[chosen] == original[chosen]
    assert batch["num_items"] == count and near(int(masked.sum()), count, 0.8 + 0.1 / 1000) and near(int(kept.sum()), count, 0.1 + 0.1 / 1000)
    drawn = ids[chosen][~masked & ~kept]
    assert near(int((drawn < 500).sum()), len(drawn), 0.5) and drawn.max() > 980 and drawn.min() < 20
    positions = torch.arange(original.shape[1]).expand_as(original)[chosen]         # neither clustered nor at fixed places
    assert near(int((positions < 200).sum()), count, 199 / (float(eligible.sum()) / 200))


def test_what_is_masked_depends_on_the_samples_seed_alone():
    collate, samples = MaskedLMCollator(PAD, MASK, 30, special_ids=[1, 2]), texts(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, n = collate(samples[1:2], [7]), len(samples[1]["input_ids"])
    for seeds in ([5, 7, 5], [1, 7, 2]):
        batch = collate(samples, seeds)
        for key in ("input_ids", "labels"):
            assert torch.equal(batch[key][1, :n], alone[key][0])
    assert not torch.equal(collate(samples[1:2], [8])["labels"], alone["labels"])
    assert torch.equal(torch.get_rng_state(), before)


def test_special_tokens_and_padding_are_never_chosen_by_whatever_they_are_known():
    tokens, everything = {"input_ids": [1, 10, 11, 2, 0]}, {"probability": 1.0}
    for collate, more in ((MaskedLMCollator(PAD, MASK, 30, special_ids=[1, 2], **everything), {}),
                          (MaskedLMCollator(PAD, MASK, 30, **everything), {"special_tokens_mask": [1, 0, 0, 1, 0]}),
                          (MaskedLMCollator(29, MASK, 30, [1, 2], **everything), {"attention_mask": [1, 1, 1, 1, 0]})):
        batch = collate([{**tokens, **more}, {key: values[:2] for key, values in (tokens | more).items()}], [0, 1])
        assert batch["labels"].tolist() == [[-100, 10, 11, -100, -100], [-100, 10, -100, -100, -100]]
        assert batch.keys() == {"input_ids", "attention_mask", "labels", "num_items"}
    assert MaskedLMCollator(PAD, MASK, 30, [1, 2], 0.5)([{"input_ids": [1, 2]}], [0])["num_items"] == 0


def test_words_are_chosen_whole_or_not_at_all():
    """Of a pair of texts, both count their words from 0; a word with a special token in it is never chosen."""
    samples = [{"input_ids": [1, 10, 11, 12, 13, 2, 14, 15, 16, 17, 2], "word_ids": [None, 0, 0, 0, 1, None, 0, 0, 2, 3, None]},
               {"input_ids": [1, 10, 3, 11, 2], "word_ids": [-1, 0, 0, 1, -1]}]
    collate, seen = MaskedLMCollator(PAD, MASK, 30, [1, 2, 3], 0.5, whole_word=True), set()
    for seed in range(200):
        batch = collate(samples, [seed, seed])
        a, b = (batch["labels"] != -100).tolist()
        assert "word_ids" not in batch and len(set(a[1:4])) == 1 and a[6] == a[7] and not (a[0] or a[5] or a[10] or b[1] or b[2])
        seen |= {(a[1], a[4], a[6], a[8], a[9])}
    assert len(seen) == 32          # words are independent
    assert "word_ids" not in MaskedLMCollator(PAD, MASK, 30)(samples, [0, 0])


# ---------------------------------------------------------------------------------------------------- padding and the loss
def gradient(model, batches, loss_fn) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = sum(loss_fn(model, {key: value for key, value in batch.items() if key != "num_items"}) for batch in batches)
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def bert():
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                                 max_position_embeddings=16, num_labels=3)).double().eval()


@pytest.mark.parametrize("collator, model, loss_fn, labels", [
    (CausalLMCollator, gpt(dtype=torch.float64), compute_loss, False),
    (PaddingCollator, bert(), lambda *given: logits_loss(*given)[0], True)])
def test_padding_never_moves_the_loss_or_the_gradient(collator, model, loss_fn, labels):
    generator = torch.Generator().manual_seed(0)
    samples = [{"input_ids": torch.randint(VOCAB, (n,), generator=generator)} for n in (3, 8, 1, 5)]
    if labels:
        samples = [{**sample, "labels": sample["input_ids"] % 3} for sample in samples]
    alone = gradient(model, [collator(0)([sample]) for sample in samples], loss_fn)
    for pad_id, multiple in ((0, None), (3, 12)):
        loss, grad = gradient(model, [collator(pad_id, pad_to_multiple_of=multiple)(samples)], loss_fn)
        assert loss == pytest.approx(alone[0], rel=1e-12)
        torch.testing.assert_close(grad, alone[1], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- mistakes
ONE = {"input_ids": [1, 2]}


@pytest.mark.parametrize("collate, samples, row, said", [
    (default_collator, [{"x": 1}, {"x": 1, "y": 2}], 1, r"it has \['x', 'y'\], and the first sample of its batch \['x'\]"),
    (default_collator, [{"x": 1}, 5], 1, "it is 5, and a dict"),
    (default_collator, [{}], 0, "it is {}, and a dict"),
    (default_collator, [{"x": [1]}, {"x": [1]}, {"x": [1, 2]}], 2, r"'x': \(2,\), and \(1,\) in the first sample of its batch.*PaddingCollator"),
    (default_collator, [{"x": 1}, {"x": None}], 1, "'x' is None and not numbers"),
    (default_collator, [{"text": "one"}], 0, "'text' is 'one' and not numbers"),
    (default_collator, [{"x": 1, "label": 1, "label_ids": 1}], None, "label and label_ids"),
    (default_collator, [{"x": 1, "label": 1, "labels": 1}], None, "labels and label,"),
    (PaddingCollator(0), [ONE, {"input_ids": []}], 1, r"'input_ids' is torch.float32 of shape \(0,\)"),
    (PaddingCollator(0), [ONE, {"input_ids": [0.5]}], 1, "'input_ids' is torch.float32"),
    (PaddingCollator(0), [{"x": 1}], 0, r"it has x, and this collator needs input_ids"),
    (PaddingCollator(0), [{**ONE, "labels": [1, 2]}, {**ONE, "labels": [1]}], 1, r"'labels' is torch.int64 of shape \(1,\).*as many as input_ids \(2,\)"),
    (PaddingCollator(0), [{**ONE, "token_type_ids": [1, 2, 3]}], 0, "'token_type_ids' is"),
    (PaddingCollator(0), [{**ONE, "boxes": [1, 2]}, {**ONE, "boxes": [1]}], 1, "different shapes in 'boxes'"),
    (CausalLMCollator(0), [ONE, {"input_ids": []}], 1, "'input_ids' is"),
    (CausalLMCollator(0), [{**ONE, "labels": 1}], 0, "'labels' is"),
    (PackingCollator(), [ONE, {"input_ids": 3}], 1, "'input_ids' is"),
    (Seq2SeqCollator(0, 1), [ONE], 0, "needs labels"),
    (Seq2SeqCollator(0, 1), [{**ONE, "labels": [1]}, {**ONE, "labels": []}], 1, "'labels' is"),
    (MultipleChoiceCollator(0), [{"input_ids": [[1], [2]], "label": 0}, {"input_ids": [[1]], "label": 0}], 1, "it has choices {'input_ids': 1}.*'input_ids': 2"),
    (MultipleChoiceCollator(0), [{"input_ids": [[1], [2]]}, {"input_ids": [[1], []]}], 1, "in one of its choices, 'input_ids' is"),
    (MultipleChoiceCollator(0), [{"input_ids": [[1], [2]], "attention_mask": [[1]]}], 0, "'attention_mask': 1"),
    (MultipleChoiceCollator(0), [{"label": 0}], 0, "it has choices {}"),
    (lambda samples: MaskedLMCollator(0, 1, 9, whole_word=True)(samples, [0]), [ONE], 0, "needs word_ids"),
    (lambda samples: MaskedLMCollator(0, 1, 9, whole_word=True)(samples, [0]), [{**ONE, "word_ids": [0]}], 0, "'word_ids' is"),
])
def test_a_mistake_in_a_sample_is_one_message_with_its_row(collate, samples, row, said):
    with pytest.raises(UsageError, match=said) as caught:
        collate(samples)
    assert row is None or isinstance(caught.value, SampleError) and caught.value.row == row


@pytest.mark.parametrize("wrong", [{"probability": 15}, {"probability": 0}, {"mask_id": 30}])
def test_settings_out_of_range_are_an_error(wrong):
    with pytest.raises(UsageError, match=r"probability must be in \(0, 1\]"):
        MaskedLMCollator(**{"pad_id": 0, "mask_id": 4, "vocab_size": 30, **wrong})


def test_collators_go_to_worker_processes():
    for collate in (PaddingCollator(0), CausalLMCollator(0), PackingCollator(), MaskedLMCollator(0, 4, 30), Seq2SeqCollator(0, 1), MultipleChoiceCollator(0)):
        assert len(ForkingPickler.dumps(collate))
        assert getattr(collate, "random", False) == isinstance(collate, MaskedLMCollator)
