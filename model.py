"""A small decoder-only transformer over tokens. To train another model, return it from `build_model`.

Pre-norm blocks with RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021, section 3.2), causal attention
and a squared-ReLU MLP (So et al. 2021, section 4.2). Shapes: B batch, T time, C channels, H heads, D = C / H, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from args import TrainArgs
from checkpoint import load_model
from loss import head_cross_entropy
from rundir import verify


class Linear(nn.Linear):
    """Without bias. Unit-variance outputs from unit-variance inputs at the start, or zeros. PyTorch calls reset_parameters when
    a layer is built; for one from the meta device it is called again to give it weights."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        self.zero = zero
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.in_features ** -0.5)


class Embedding(nn.Embedding):
    """Starts with half of unit variance."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.5)


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.head_dim, self.dropout = n_embd // n_head, dropout
        self.qkv = Linear(n_embd, 3 * n_embd)
        self.out = Linear(n_embd, n_embd, zero=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4)      # each (B, H, T, D)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self, torch.stack([k, v]))                                  # of all columns of the mask
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Cache:
    """What attention needs of the last `size` tokens before: positions (B, T, 1), and of each layer keys and values (2, B, H, T, D)."""

    def __init__(self, size: int):
        self.size, self.kept, self.next_position = size, {}, 0

    def extend(self, name, new: Tensor) -> Tensor:
        """What was kept under `name`, and after it, along T, `new`."""
        both = torch.cat([self.kept[name], new], dim=-2) if name in self.kept else new
        self.kept[name] = both[..., max(0, both.shape[-2] - self.size):, :]
        return both


def document_mask(positions: Tensor, T: int) -> Tensor:
    """Whether each of the last T columns may attend to each column (B, 1, T, columns): to those of its document that are not after
    it. positions (B, columns, 1) are 0 where a document starts."""
    documents = (positions == 0).cumsum(1)
    columns = torch.arange(documents.shape[1], device=documents.device)
    return ((documents[:, -T:] == documents.mT) & (columns[-T:, None] >= columns))[:, None]


def rotary_angles(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, D/2) of positions (B, T) x frequency; computed per forward, so any length works and nothing is stored."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=positions.device) / D)
    angles = positions[:, None, :, None] * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + D/2) of x (B, H, T, D) by the angle of their position."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Block(nn.Module):
    """Attention and MLP, each added to its input; the identity at the start. experts: makes what is in the MLP's place (parallel/experts.py)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, experts: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head, dropout)
        self.experts = experts and experts(n_embd)
        if experts is None:
            self.up = Linear(n_embd, 4 * n_embd)
            self.down = Linear(4 * n_embd, n_embd, zero=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rotary, mask, cache))
        y = self.mlp_norm(x)
        return x + self.dropout(self.down(F.relu(self.up(y)).square()) if self.experts is None else self.experts(y))


class GPT(nn.Module):
    """model(input_ids (B, T)) -> logits (B, T, V); model(input_ids, labels (B, T)) -> summed cross-entropy (). labels are already
    shifted: labels[b, t] is the token after input_ids[b, t], or -100 to ignore it. position_ids (B, T), if given, start again at 0 in
    each document of a row, and none attends to another. cache: input_ids are those after the ones it was called with before.
    attention_mask is what padding collators give; padding at the right needs none here, since no token looks ahead."""

    uncalled = ("head",)    # its weight is used without calling it, so it can have no adapter
    head_loss = staticmethod(head_cross_entropy)    # parallel/tensor.py puts another in its place

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float = 0.0, label_smoothing: float = 0.0,
                 experts: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.vocab_size, self.block_size, self.label_smoothing = vocab_size, block_size, label_smoothing
        self.embed = Embedding(vocab_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, experts) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        self.head = Linear(n_embd, vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None,
                cache: Cache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        T, positions, mask = input_ids.shape[1], position_ids, None
        if positions is None:
            positions = torch.arange(T, device=input_ids.device)[None] + (0 if cache is None else cache.next_position)
        if cache is not None:
            cache.next_position = positions[:, -1:] + 1
            mask = document_mask(cache.extend("positions", positions[..., None]), T)
        elif position_ids is not None:
            mask = document_mask(positions[..., None], T)
        x = self.dropout(self.embed(input_ids))                                             # (B, T, C)
        rotary = rotary_angles(positions, self.blocks[0].attn.head_dim)
        for block in self.blocks:
            x = block(x, rotary, mask, cache)
        x = self.norm(x)
        if labels is None:
            return self.head(x)                                                             # (B, T, V)
        return self.head_loss(x, self.head.weight, labels, self.label_smoothing)        # ()


def build_model(args: TrainArgs) -> GPT:
    """With --model_name_or_path it has the weights of that checkpoint."""
    sizes = args.vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd, args.dropout, args.label_smoothing_factor
    if args.n_experts:
        from parallel.experts import ExpertGPT
        model = ExpertGPT(*sizes, n_experts=args.n_experts, experts_per_token=args.experts_per_token, balance_loss_weight=args.balance_loss_weight)
    else:
        model = GPT(*sizes)
    if args.model_name_or_path is not None:
        verify(args.model_name_or_path)
        load_model(model, args.model_name_or_path, partly="weights" in args.allowed)
    return model


build_model.meta_init = True        # initial weights are those of reset_parameters, module by module, and nothing else
