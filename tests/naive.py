"""Data-parallel training with nothing hidden: every rank has the whole model, adds up gradients by hand and makes the same update.

Every strategy is compared with it. It shares no code with the trainer.
"""
import torch
import torch.distributed as dist


def add_up(tensor, world_size):
    if world_size > 1:
        dist.all_reduce(tensor)


def train_naively(model, windows, rank, world_size, lr, weight_decay, max_norm):
    """One AdamW update per window (a list of samples). Rank r takes every world_size-th sample from r on. Returns the losses."""
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    decayed = [p for name, p in model.named_parameters() if name not in norms]
    plain = [p for name, p in model.named_parameters() if name in norms]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=lr)
    losses = []
    for window in windows:
        num_items = sum(int((sample["labels"] != -100).sum()) for sample in window)
        total = torch.zeros(1, dtype=torch.float64)
        for sample in window[rank::world_size]:
            logits = model(sample["input_ids"][None])[0]
            loss = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="sum") / num_items
            loss.backward()
            total += loss.item()
        for p in model.parameters():
            add_up(p.grad, world_size)
        add_up(total, world_size)
        losses.append(total.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses
