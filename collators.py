"""How samples (dicts) become a micro-batch: a dict of tensors for the model plus `num_items`, which the collator counts because only it
knows what the loss sums over: labels that are not -100 if `labels` are whole numbers, else samples. `label` and `label_ids` are called
`labels`, as in the HF Trainer. A collator with `random = True` is given `seeds` too, one int per sample, on which alone its draws depend;
`columns` are those that it uses itself and the model need not take.
Shapes: B samples, T tokens of the longest (rounded up to a multiple of pad_to_multiple_of), C choices."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from state import Batch, SampleError, UsageError

IGNORE = -100   # a label that weighs nothing, torch.nn.functional.cross_entropy's default
PADS = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}      # one value per token; None: pad_id


def default_collator(samples: list[dict] | Batch) -> Batch:
    """Stacks equally shaped samples; a data set with a batched `__getitems__` may hand over a finished batch instead."""
    if isinstance(samples, Mapping):
        return counted(with_labels(samples))
    return counted({key: stack(key, values) for key, values in read(samples).items()})


@dataclass(frozen=True)
class PaddingCollator:
    """Pads `input_ids` (T,) at the right with pad_id, and gives attention_mask (B, T), 1 for tokens and 0 for padding. `labels` of
    whole numbers, one per token, are padded with -100: token classification. Any others are stacked: classes or values of samples."""

    pad_id: int
    pad_to_multiple_of: int | None = field(default=None, kw_only=True)

    def __call__(self, samples: list[dict]) -> Batch:
        return counted(self.pad(read(samples)))

    def pad(self, columns: dict[str, list[Tensor]]) -> Batch:
        """Pads what has a value per token, and stacks the rest."""
        columns = {"attention_mask": [torch.ones_like(ids) for ids in tokens(columns, "input_ids")], **columns}
        pads = {**PADS, "input_ids": self.pad_id, "labels": IGNORE}
        return {key: self.pad_rows(tokens(columns, key), pads[key]) if key in pads and rows[0].dim() and not rows[0].is_floating_point()
                else stack(key, rows) for key, rows in columns.items()}

    def pad_rows(self, rows: list[Tensor], value: int) -> Tensor:
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return F.pad(batch, (0, -batch.shape[1] % (self.pad_to_multiple_of or 1)), value=value)


class CausalLMCollator(PaddingCollator):
    """Pads, and labels (B, T) each token with the next one; with the next of the sample's own `labels` (T,), -100 on a prompt, if it has any."""

    def __call__(self, samples: list[dict]) -> Batch:
        return counted(self.pad(with_next_labels(read(samples))))


class PackingCollator:
    """All samples in one row, without padding: input_ids, position_ids and labels (1, sum of T). Positions start again at 0 in each
    sample, by which a model tells that it must not attend to others (as HF's DataCollatorWithFlattening). labels as in CausalLMCollator."""

    def __call__(self, samples: list[dict]) -> Batch:
        columns = with_next_labels(read(samples))
        columns["position_ids"] = [torch.arange(len(ids)) for ids in columns["input_ids"]]
        return counted({key: torch.cat(columns[key]).long()[None] for key in ("input_ids", "position_ids", "labels")})


@dataclass(frozen=True)
class MaskedLMCollator(PaddingCollator):
    """Chooses tokens with `probability` as labels (B, T), -100 elsewhere. In the input 80% of them become mask_id, 10% any id below
    vocab_size, 10% stay (Devlin et al. 2019, section 3.1 and appendix A.1). Never chosen: pad_id, special_ids, and where the columns
    special_tokens_mask is 1 or attention_mask 0. whole_word: words are chosen whole, or not at all if such a token is in them; samples
    then have `word_ids` (T,) as HF's fast tokenizers give, None or -1 for special tokens, and a word is a run of equal ones."""

    mask_id: int
    vocab_size: int
    special_ids: Collection[int] = ()
    probability: float = 0.15
    whole_word: bool = False
    random, columns = True, ("special_tokens_mask", "word_ids")

    def __post_init__(self):
        if not 0 < self.probability <= 1 or not 0 <= self.mask_id < self.vocab_size:
            raise UsageError(f"{self}: probability must be in (0, 1], and mask_id in 0..vocab_size-1, in HF 0..len(tokenizer)-1")

    def __call__(self, samples: list[dict], seeds: list[int]) -> Batch:
        columns = read(samples)
        ids, barred = tokens(columns, "input_ids"), torch.tensor([self.pad_id, *self.special_ids])
        words = tokens(columns, "word_ids") if self.whole_word else [torch.arange(len(row)) for row in ids]
        never = [torch.isin(row, barred) | (word < 0) for row, word in zip(ids, words)]
        for key, value in (("special_tokens_mask", 1), ("attention_mask", 0)):
            if key in columns:
                never = [no | (row == value) for no, row in zip(never, tokens(columns, key))]
        columns = {key: rows for key, rows in columns.items() if key not in ("word_ids", "special_tokens_mask")}
        columns["input_ids"], columns["labels"] = map(list, zip(*(self.draw(*row) for row in zip(ids, words, never, seeds, strict=True))))
        return counted(self.pad(columns))

    def draw(self, ids: Tensor, words: Tensor, never: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        choice, kind = torch.rand(2, len(ids), generator=generator)
        anything = torch.randint(self.vocab_size, ids.shape, generator=generator)
        word = torch.unique_consecutive(words, return_inverse=True)[1]          # both texts of a pair count their words from 0
        chosen = (choice[word] < self.probability) & ~torch.isin(word, word[never])
        masked = ids.masked_fill(chosen & (kind < 0.8), self.mask_id)
        return torch.where(chosen & (kind >= 0.9), anything, masked), ids.masked_fill(~chosen, IGNORE)


@dataclass(frozen=True)
class Seq2SeqCollator(PaddingCollator):
    """Pads `input_ids` and `labels`, of lengths of their own, and gives decoder_input_ids: decoder_start_id, then labels but the last."""

    decoder_start_id: int

    def __call__(self, samples: list[dict]) -> Batch:
        columns = read(samples)
        labels = self.pad_rows(tokens(columns, "labels", aligned=False), IGNORE)
        decoder_ids = F.pad(labels[:, :-1], (1, 0), value=self.decoder_start_id)
        batch = self.pad({key: rows for key, rows in columns.items() if key != "labels"})
        return counted({**batch, "labels": labels, "decoder_input_ids": decoder_ids.masked_fill(decoder_ids == IGNORE, self.pad_id)})


class MultipleChoiceCollator(PaddingCollator):
    """Of samples whose `input_ids` are C lists of tokens and whose label is the right one: input_ids (B, C, T), labels (B,)."""

    def __call__(self, samples: list[dict]) -> Batch:
        rest, choices = read(samples, but=PADS), []
        for row, sample in enumerate(samples):
            counts, first = ({key: len(one[key]) for key in PADS if key in one} for one in (sample, samples[0]))
            if len({*counts.values(), *first.values()}) != 1 or 0 in counts.values():
                raise SampleError(row, f"it has choices {counts}, and the first sample of its batch {first}; give equally many to all")
            choices += [{key: sample[key][choice] for key in counts} for choice in range(max(counts.values()))]
        try:
            batch = self.pad(read(choices))
        except SampleError as error:
            raise SampleError(error.row * len(samples) // len(choices), f"in one of its choices, {error}") from None
        return counted({**{key: value.unflatten(0, (len(samples), -1)) for key, value in batch.items()},
                        **{key: stack(key, values) for key, values in rest.items()}})


def read(samples: list[dict], but: Collection[str] = ()) -> dict[str, list[Tensor]]:
    """The values of all samples by key, as tensors; not of the keys `but`."""
    columns = {}
    for row, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or not sample:
            raise SampleError(row, f"it is {sample!r:.80}, and a dict such as {{'input_ids': ..., 'labels': ...}} was expected")
        if sample.keys() != samples[0].keys():
            raise SampleError(row, f"it has {list(sample)}, and the first sample of its batch {list(samples[0])}; give all the same keys")
        for key in (key for key in sample if key not in but):
            try:        # HF's word_ids have None at special tokens
                value = [-1 if word is None else word for word in sample[key]] if key == "word_ids" else sample[key]
                columns.setdefault(key, []).append(torch.as_tensor(value))
            except (TypeError, ValueError, RuntimeError):
                raise SampleError(row, f"{key!r} is {sample[key]!r:.80} and not numbers; leave out the sample, or {key!r} of all") from None
    return with_labels(columns)


def with_labels(columns: Mapping) -> dict:
    """The same, with `labels` by that name."""
    names = [key for key in ("labels", "label", "label_ids") if key in columns]
    if len(names) > 1:
        raise UsageError(f"the samples have {' and '.join(names)}, and only one of them can be the labels; leave out the others")
    return {"labels" if key in names else key: values for key, values in columns.items()}


def counted(batch: Batch) -> Batch:
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return {**batch, "num_items": len(next(iter(batch.values())))}
    return {**batch, "labels": labels.long(), "num_items": int((labels != IGNORE).sum())}


def stack(key: str, values: list[Tensor]) -> Tensor:
    for row, value in enumerate(values):
        if value.shape != values[0].shape:
            shapes = f"{tuple(value.shape)}, and {tuple(values[0].shape)} in the first sample of its batch"
            raise SampleError(row, f"different shapes in {key!r}: {shapes}; use a collator that pads, such as PaddingCollator")
    return torch.stack(values)


def tokens(columns: dict[str, list[Tensor]], key: str, aligned: bool = True) -> list[Tensor]:
    """Of each sample the whole numbers (T,) of a key; aligned: as many as it has input_ids."""
    if missing := [needed for needed in (key, "input_ids") if needed not in columns]:
        raise SampleError(0, f"it has {', '.join(columns)}, and this collator needs {missing[0]} too")
    for row, (value, ids) in enumerate(zip(columns[key], columns["input_ids"])):
        if value.dim() != 1 or not len(value) or value.is_floating_point() or aligned and value.shape != ids.shape:
            expected = "a flat list of whole numbers, at least one" + f" and as many as input_ids {tuple(ids.shape)}" * aligned
            raise SampleError(row, f"{key!r} is {value.dtype} of shape {tuple(value.shape)}, and expected was {expected}")
    return [value.long() for value in columns[key]]


def with_next_labels(columns: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The label of each position is the next one of `labels`, or of input_ids: -100 at the last, and where padding was given."""
    labels = tokens(columns, "labels" if "labels" in columns else "input_ids")
    if "attention_mask" in columns:
        labels = [row.masked_fill(mask == 0, IGNORE) for row, mask in zip(labels, tokens(columns, "attention_mask"))]
    return {**columns, "labels": [F.pad(row[1:], (0, 1), value=IGNORE) for row in labels]}
