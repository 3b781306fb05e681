"""A mixture-of-experts layer in place of the MLP of the built-in GPT (--n_experts), and expert parallelism (--ep).

Each token goes through the k of E MLPs that a router chooses for it (Shazeer et al. 2017, section 2; Mixtral, Jiang et al. 2024, section 2.1), so
the model has E / k times the MLP weights that a token pays for. No expert has a capacity and no token is dropped: tokens are sorted by expert and
each expert computes as many as came (the aim of MegaBlocks, Gale et al. 2023). Shapes: n tokens of a micro-batch, C channels, E experts, k per token.

With --ep N the experts of each layer are shared out among N neighbouring ranks (as in GShard, Lepikhin et al. 2020). Each rank routes the tokens of
its own micro-batch, sends them to the ranks that hold their experts, and gets the results back. All else is data-parallel training of all ranks.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from collators import IGNORE
from distributed import local_part, materialize
from model import GPT
from parallel.context import refuse_flags
from state import UsageError
from world import World
from zero import DataParallel, Part, share, whole_parameters


class Experts(nn.Module):
    """E MLPs like the one of a dense block, stacked along the first dimension of their weights, and the router. x (..., C) -> (..., C)."""

    def __init__(self, n_embd: int, n_experts: int, experts_per_token: int):
        super().__init__()
        self.n_experts, self.k = n_experts, experts_per_token
        self.router = nn.Parameter(torch.empty(n_experts, n_embd))
        self.up = nn.Parameter(torch.empty(n_experts, 4 * n_embd, n_embd))
        self.down = nn.Parameter(torch.empty(n_experts, n_embd, 4 * n_embd))
        self.group: dist.ProcessGroup | None = None                 # the ranks that share this layer's experts, with --ep
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
        compute = self.compute if self.group is None else self.compute_elsewhere
        results = compute(tokens[order // self.k], counts)[order.argsort()]             # (n * k, C) by token again
        return (results.unflatten(0, (-1, self.k)) * weights[..., None]).sum(dim=1).to(x.dtype).view(x.shape)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The MLPs that are here on rows (m, C) that are sorted by expert, counts of them for each."""
        up, down = (self.up, self.down) if self.group is None else (self.up.to_local(), self.down.to_local())
        parts = zip(rows.split(counts.tolist()), up.unbind(), down.unbind())
        return torch.cat([F.linear(F.relu(F.linear(part, one)).square(), other) for part, one, other in parts])

    def compute_elsewhere(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The same with all experts of the group's ranks. What comes from the first rank stands first, each by expert, so it is sorted once more."""
        came = torch.empty_like(counts)
        dist.all_to_all_single(came, counts, group=self.group)
        sends, receives = counts.view(self.group.size(), -1), came.view(self.group.size(), -1)      # (ranks, experts of a rank)
        sizes = sends.sum(dim=1).tolist(), receives.sum(dim=1).tolist()
        rows = AllToAll.apply(rows, *sizes, self.group)
        expert = torch.arange(receives.shape[1], device=rows.device).expand_as(receives).flatten().repeat_interleave(came)
        order = expert.argsort(stable=True)
        results = self.compute(rows[order], receives.sum(dim=0))[order.argsort()]
        return AllToAll.apply(results, *sizes[::-1], self.group)

    def split(self, mesh: DeviceMesh) -> None:
        """Keeps this rank's experts of the mesh's "shard" dimension. The weights become DTensors, which know their place in the whole."""
        self.group, rank = mesh.get_group("shard"), mesh.get_local_rank("shard")
        for name in ("up", "down"):
            p = self.get_parameter(name)
            mine = p.detach().chunk(self.group.size())[rank].clone()
            setattr(self, name, nn.Parameter(DTensor.from_local(mine, mesh, [Replicate(), Shard(0)], run_check=False), p.requires_grad))


class AllToAll(torch.autograd.Function):
    """Rows (sum(sends), C), of which sends[j] go to rank j of the group -> (sum(receives), C), of which receives[j] came from rank j."""

    @staticmethod
    def forward(ctx, rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = receives, sends, group
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receives, sends, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, *ctx.route), None, None, None


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
        if not self.training:
            return super().forward(input_ids, labels, position_ids, cache, attention_mask)
        if labels is None and self.balance_loss_weight:
            raise UsageError("the balance loss is added to the loss that the model computes itself: give it labels, or --balance_loss_weight 0")
        routed: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            block.experts.routed = routed
        result = super().forward(input_ids, labels, position_ids, cache, attention_mask)
        for block in self.blocks:       # or what is computed again in backward would be kept too
            block.experts.routed = None
        balances, shares = map(torch.stack, zip(*routed))
        self.seen = balances.detach(), shares
        return result if labels is None else result + self.balance_loss_weight * balances.sum() * (labels != IGNORE).sum()

    def routing(self, world: World) -> dict[str, float]:
        """For the log, of the last micro-batch of the update on all ranks: the mean balance loss of a layer, without the weight, and the
        largest share that an expert had of a layer's rows (1 / E if all are alike)."""
        if self.seen is None:       # no window had a label item yet
            return {}
        balances, shares = (world.gather(seen).mean(dim=0) for seen in self.seen)
        return {"balance_loss": balances.mean().item(), "busiest_expert": shares.max().item()}

    @property
    def idle_parameters(self) -> int:
        """Weights that a token does not meet: of the experts that are not chosen for it."""
        return sum(p.numel() // e.n_experts * (e.n_experts - e.k) for e in (block.experts for block in self.blocks) for p in (e.up, e.down))


REFUSED = {
    "strategy": "would split experts once more, unless it is ddp",
    "sample_prompt": "lets ranks write texts of different lengths, as python -m tools.generate does with a checkpoint",
    "bf16_full_eval": "casts whole weights, where --bf16 does not",
    "fp16_full_eval": "casts whole weights, where --fp16 does not",
    "save_on_each_node": "needs all of the model on each host, so give an output_dir that all hosts share"}


class ExpertParallel(DataParallel):
    """ddp, but for the experts: a group of `ep` ranks holds them once, and world_size / ep ranks hold the same ones.

    Backward brings each expert the gradient of the tokens of its whole group: a sum over ep ranks. The mean over all ranks, which
    `train_step` wants, is therefore the mean over the ranks that hold the same expert, divided by ep."""

    def __init__(self, model: nn.Module, args, world: World):
        refuse_flags(args, "ep", REFUSED)
        layers, mesh = [module for module in model.modules() if isinstance(module, Experts)], world.device_mesh
        if problem := "this is one process: start more with torchrun" if mesh is None else "the model has none: give --n_experts" if not layers else \
                f"the model has {layers[0].n_experts}: give a multiple of it" if layers[0].n_experts % args.ep else "":
            raise UsageError(f"--ep {args.ep} shares the experts of each layer out among {args.ep} ranks, and {problem}")
        on_meta = any(p.is_meta for p in model.parameters())
        if not on_meta:
            model.to(world.device)
            share([weight for layer in layers for weight in (layer.up, layer.down)])
        for layer in layers:
            layer.split(mesh)
        if on_meta:
            materialize(model, world.device)
        super().__init__(model, args, world)
        self.split, self.group, self.replicas = True, mesh.get_group("shard"), mesh.get_group("replicate")
        self.saves = self.replicas.rank() == 0
        self.experts = {name: p for name, p in self.trained.items() if hasattr(p, "to_local")}

    def owns(self, part: Part) -> bool:
        """What all ranks hold is the first one's."""
        return part.name in self.experts or self.group.rank() == 0

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        if cut := whole_parameters(optimizer) & {*self.experts.values()}:
            raise UsageError(f"{type(optimizer).__name__} looks at {len(cut)} weights of experts as a whole, and --ep splits them: use AdamW, Lion, Muon or SGD")
        super().shard(optimizer)

    def train_pieces(self, optimizer: torch.optim.Optimizer, pieces: dict[str, tuple[Tensor, int]]) -> None:
        self.pieces = {name: nn.Parameter(local_part(p)[0]) for name, p in self.experts.items()}
        super().train_pieces(optimizer, pieces | {name: (piece, local_part(self.experts[name])[1]) for name, piece in self.pieces.items()})

    def end_window(self, loss: Tensor) -> Tensor:
        self.used.update(name for name, p in self.experts.items() if p.grad is not None)
        return super().end_window(loss)

    def give_grads(self, used: set[str]) -> None:
        super().give_grads(used)
        for name, p in self.experts.items():
            if name in used:
                grad = torch.zeros_like(self.pieces[name]) if p.grad is None else p.grad.to_local()
                with self.world.clock.within("communication"):
                    dist.all_reduce(grad, dist.ReduceOp.AVG, group=self.replicas)
                self.pieces[name].grad = grad / self.group.size()
            p.grad = None
