"""A mixture-of-experts layer in place of the MLP of the built-in GPT (--n_experts), and expert parallelism (--ep).

Each token goes through the k of E MLPs that a router chooses for it (Shazeer et al. 2017, section 2; Mixtral, Jiang et al. 2024, section 2.1), so
the model has E / k times the MLP weights that a token pays for. No expert has a capacity and no token is dropped: tokens are sorted by expert and
each expert computes as many as came (the aim of MegaBlocks, Gale et al. 2023). Shapes: n tokens of a micro-batch, C channels, E experts, k per token.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collators import IGNORE
from model import GPT
from world import World


class Experts(nn.Module):
    """E MLPs like the one of a dense block, stacked along the first dimension of their weights, and the router. x (..., C) -> (..., C)."""

    def __init__(self, n_embd: int, n_experts: int, experts_per_token: int):
        super().__init__()
        self.n_experts, self.k = n_experts, experts_per_token
        self.router = nn.Parameter(torch.empty(n_experts, n_embd))
        self.up = nn.Parameter(torch.empty(n_experts, 4 * n_embd, n_embd))
        self.down = nn.Parameter(torch.empty(n_experts, n_embd, 4 * n_embd))
        self.routed: list[tuple[Tensor, Tensor]] | None = None      # a list asks for what `balance` gives
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the layers of model.py begin."""
        for weight in (self.router, self.up):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.down)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)                                                       # (n, C)
        logits = F.linear(tokens, self.router)                                          # (n, E)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.k)                                    # (n, k)
        if self.k > 1:      # Mixtral's; of a single one the weight would always be 1, and teach the router nothing: Switch keeps its probability
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = chosen.flatten().bincount(minlength=self.n_experts)                    # (E,) rows of each expert
        if self.training:       # alike whether it is asked for or not: a checkpointed block has to be computed again as it was
            balanced = balance(probabilities, counts)
            if self.routed is not None:
                self.routed.append(balanced)
        order = chosen.flatten().argsort(stable=True)                                   # rows by expert; row i is of token i // k
        results = self.compute(tokens[order // self.k], counts)[order.argsort()]        # (n * k, C) by token again
        return (results.unflatten(0, (-1, self.k)) * weights[..., None]).sum(dim=1).to(x.dtype).view(x.shape)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The MLPs on rows (m, C) that are sorted by expert, counts of them for each."""
        parts = zip(rows.split(counts.tolist()), self.up.unbind(), self.down.unbind())
        return torch.cat([F.linear(F.relu(F.linear(part, up)).square(), down) for part, up, down in parts])


def balance(probabilities: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The balance loss () of a layer: E times the sum over experts of (share of the rows) x (mean probability). It is 1 if both are even, and
    its gradient lowers the probability of busy experts. Switch Transformers, Fedus et al. 2021, section 2.2. Also these shares, (E,)."""
    shares = counts.to(probabilities.dtype) / counts.sum()
    return len(shares) * (shares * probabilities.mean(dim=0)).sum(), shares


class ExpertGPT(GPT):
    """The built-in GPT with experts. In training its loss has the balance loss of each layer added, times balance_loss_weight: a term per
    micro-batch, so times the micro-batch's number of label items, as loss.py says. Evaluations have the cross-entropy alone."""

    def __init__(self, *sizes, n_experts: int, experts_per_token: int = 2, balance_loss_weight: float = 0.01, **more):
        super().__init__(*sizes, **more, experts=partial(Experts, n_experts=n_experts, experts_per_token=experts_per_token))
        self.balance_loss_weight = balance_loss_weight
        self.seen = None    # of the last micro-batch: balance losses of the layers (L,) and shares of the experts (L, E)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None, cache=None,
                attention_mask: Tensor | None = None) -> Tensor:
        if labels is None or not self.training:
            return super().forward(input_ids, labels, position_ids, cache, attention_mask)
        routed: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            block.experts.routed = routed
        loss = super().forward(input_ids, labels, position_ids, cache, attention_mask)
        for block in self.blocks:       # or what is computed again in backward would be kept too
            block.experts.routed = None
        balances, shares = map(torch.stack, zip(*routed))
        self.seen = balances.detach(), shares
        return loss + self.balance_loss_weight * balances.sum() * (labels != IGNORE).sum()

    def routing(self, world: World) -> dict[str, float]:
        """For the log, of the last micro-batch of the update on all ranks: the mean balance loss of a layer, without the weight, and the
        largest share that an expert had of a layer's rows (1 / E if all are alike)."""
        balances, shares = (world.gather(seen).mean(dim=0) for seen in self.seen)
        return {"balance_loss": balances.mean().item(), "busiest_expert": shares.max().item()}

    @property
    def idle_parameters(self) -> int:
        """Weights that a token does not meet: of the experts that are not chosen for it."""
        return sum(p.numel() // e.n_experts * (e.n_experts - e.k) for e in (block.experts for block in self.blocks) for p in (e.up, e.down))
