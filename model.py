"""A small decoder-only transformer over tokens. To train another model, return it from `build_model`.

Pre-norm blocks with RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021, section 3.2), causal attention
and a squared-ReLU MLP (So et al. 2021, section 4.2). Shapes: B batch, T time, C channels, H heads, D = C / H, V vocabulary.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from args import TrainArgs
from loss import head_cross_entropy
from state import UsageError


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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)      # each (B, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotary_angles(T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, D/2) of position x frequency; computed per forward, so any length works and nothing is stored."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    angles = torch.outer(torch.arange(T, device=device), frequency)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + D/2) of x (B, H, T, D) by the angle of their position."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Block(nn.Module):
    """Attention and MLP, each added to its input; the identity at the start."""

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head, dropout)
        self.up = Linear(n_embd, 4 * n_embd)
        self.down = Linear(4 * n_embd, n_embd, zero=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rotary))
        return x + self.dropout(self.down(F.relu(self.up(self.mlp_norm(x))).square()))


class GPT(nn.Module):
    """model(input_ids (B, T)) -> logits (B, T, V); model(input_ids, labels (B, T)) -> summed cross-entropy (). labels are already
    shifted: labels[b, t] is the token after input_ids[b, t], or -100 to ignore it."""

    meta_init = True        # initial weights are those of reset_parameters, module by module, and nothing else

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float = 0.0, label_smoothing: float = 0.0):
        super().__init__()
        self.vocab_size, self.block_size, self.label_smoothing = vocab_size, block_size, label_smoothing
        self.embed = Embedding(vocab_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        self.head = Linear(n_embd, vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embed(input_ids))                                             # (B, T, C)
        rotary = rotary_angles(input_ids.shape[1], self.blocks[0].attn.head_dim, x.device)
        for block in self.blocks:
            x = block(x, rotary)
        x = self.norm(x)
        if labels is None:
            return self.head(x)                                                             # (B, T, V)
        return head_cross_entropy(x, self.head.weight, labels, self.label_smoothing)        # ()


def build_model(args: TrainArgs) -> GPT:
    return GPT(args.vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd, args.dropout, args.label_smoothing_factor)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, length: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
    """`prompt` (T,), at least one token, continued by `length` sampled tokens: (T + length,). temperature 0 takes the likeliest
    token. Sampling has its own generator, so a sample never moves a training run."""
    was_training, tokens, generator = model.training, prompt, torch.Generator(prompt.device).manual_seed(seed)
    model.eval()
    for _ in range(length):
        logits = model(tokens[None, -model.block_size:])[0, -1].float()                     # (V,)
        if not torch.isfinite(logits).all():
            raise UsageError("the model cannot write: its outputs are not finite, so its training has diverged")
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, token])
    model.train(was_training)
    return tokens
