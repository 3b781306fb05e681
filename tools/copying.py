"""A BART that can copy words of its source, for recipes whose output shares names and rare words with their input."""
from __future__ import annotations

import torch
from transformers import BartForConditionalGeneration


class CopyingBart(BartForConditionalGeneration):
    """The next word is one of the vocabulary or a copy of one of the source: one softmax over both, whose logarithms are the logits
    (Gu et al. 2016, section 3.2). source_ids: generate needs them beside input_ids, which it encodes only once."""

    def forward(self, input_ids=None, source_ids=None, **inputs):
        output = super().forward(input_ids, output_hidden_states=True, **inputs)
        source_ids = input_ids if source_ids is None else source_ids
        decoded, encoded = output.decoder_hidden_states[-1], output.encoder_last_hidden_state
        scores = decoded @ encoded.mT / decoded.shape[-1] ** 0.5                                                        # (B, T, S)
        scores = scores.masked_fill(inputs["attention_mask"][:, None] == 0, -torch.inf)
        both = torch.cat([output.logits, scores], -1).softmax(-1)
        V, copies = output.logits.shape[-1], source_ids[:, None].expand(scores.shape)
        output.logits = both[..., :V].scatter_add(-1, copies, both[..., V:]).clamp(min=1e-30).log()
        return output
