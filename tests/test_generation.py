"""Generation with a cache writes what recomputing everything would, and packed documents never meet."""
import pytest
import torch

from collators import CausalLMCollator, PackingCollator
from evalloop import evaluate
from loss import compute_loss
from model import GPT, Cache
from state import UsageError
from tests.toy import VOCAB, arguments, gpt, sequences, toy_run
from tools.generate import generate

BLOCK = 24


def model(dtype=torch.float64, **changes) -> GPT:
    """Its block_size is BLOCK, which its weights do not depend on."""
    model = gpt(dtype=dtype)
    model.block_size = changes.get("block_size", BLOCK)
    return model


def tokens(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


PROMPTS = tokens(5, 1, 12, 12, 2)


def recomputed(net: GPT, prompt: torch.Tensor, length: int) -> list[int]:
    """Greedily, all from scratch for each token."""
    ids = prompt
    for _ in range(length):
        ids = torch.cat([ids, net(ids[None])[0, -1].argmax()[None]])
    return ids[len(prompt):].tolist()


# ---------------------------------------------------------------------------------------------------- the cache
def test_greedy_with_a_cache_is_greedy_from_scratch():
    net = model()
    for prompt in PROMPTS:
        length = BLOCK - len(prompt)
        assert generate(net, prompt, length, temperature=0).tolist() == [recomputed(net, prompt, length)]


def test_logits_with_a_cache_are_those_without_whatever_the_pieces():
    net, (ids,) = model(), tokens(BLOCK)
    ids, whole = torch.stack([ids, ids.flip(0)]), net(torch.stack([ids, ids.flip(0)]))
    for pieces in ((BLOCK,), (1,) * BLOCK, (7, 1, 10, 6)):
        cache = Cache(BLOCK)
        found = torch.cat([net(piece, cache=cache) for piece in ids.split(list(pieces), dim=1)], dim=1)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_a_cached_document_boundary_stays_one():
    net, (one, two) = model(), tokens(4, 5)
    cache, positions = Cache(BLOCK), torch.tensor([[0, 1, 2, 3, 0, 1]])
    net(torch.cat([one, two[:2]])[None], position_ids=positions, cache=cache)
    torch.testing.assert_close(net(two[None, 2:], cache=cache), net(two[None])[:, 2:], rtol=0, atol=1e-12)


def test_beyond_the_block_a_token_sees_the_last_block_size_tokens():
    """A model of one layer does not see further back by way of others: then sliding equals recomputing the window."""
    torch.manual_seed(0)
    net = GPT(VOCAB, 6, n_layer=1, n_head=2, n_embd=16).double()
    torch.nn.init.normal_(net.blocks[0].attn.out.weight)
    for prompt in tokens(1, 6, 20):
        ids = prompt
        for _ in range(20):
            ids = torch.cat([ids, net(ids[None, -6:])[0, -1].argmax()[None]])
        assert generate(net, prompt, 20, temperature=0)[0].tolist() == ids[-20:].tolist()
    for block_size in (1, 2):
        assert generate(model(block_size=block_size), PROMPTS, 9).shape == (5, 9)


def test_the_cache_spares_work():
    net, seen = model(), []
    net.embed.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    generate(net, PROMPTS[2], 12)
    assert seen == [12] + [1] * 11


# ---------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}])
def test_a_row_writes_what_it_would_write_alone(settings):
    """Also past the block, when padding and prompts leave the cache."""
    net, seeds = model(), [7, 7, 3, 4, 5]
    together = generate(net, PROMPTS, 2 * BLOCK, seeds=seeds, **settings)
    for prompt, seed, row in zip(PROMPTS, seeds, together):
        assert torch.equal(generate(net, prompt, 2 * BLOCK, seeds=[seed], **settings)[0], row)
    assert torch.equal(generate(net, torch.stack(PROMPTS[2:4]), 2 * BLOCK, seeds=seeds[2:4], **settings), together[2:4])
    assert torch.equal(generate(net, PROMPTS, 5, seeds=seeds, **settings), together[:, :5])
    other = generate(net, PROMPTS, 2 * BLOCK, seeds=[8] * 5, **settings)
    assert torch.equal(other, together) == (settings["temperature"] == 0)


def test_generating_leaves_no_trace():
    net = model()
    net.blocks[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(net, PROMPTS, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training and net.blocks[1].attn.training and not net.blocks[0].training
    assert all(p.grad is None for p in net.parameters())


def test_the_end_ends_a_row_and_all_ends_end_the_writing():
    net, calls = model(), []
    net.embed.register_forward_hook(lambda *_: calls.append(1))
    free = generate(net, PROMPTS, 20)
    eos = free[0, 3].item()
    written = generate(net, PROMPTS, 20, eos_id=eos, pad_id=16)
    for row, expected in zip(written.tolist(), free.tolist()):
        end = expected.index(eos) + 1 if eos in expected else 20
        assert row == expected[:end] + [16] * (20 - end)
    calls.clear()
    stop = free[0].tolist().index(eos) + 1
    assert generate(net, PROMPTS[0], 20, eos_id=eos).shape == (1, 20) and len(calls) == stop
    said = []
    generate(net, PROMPTS[0], 20, eos_id=eos, agree=lambda done: said.append(done) or len(said) == stop + 5)      # another rank still writes
    assert said == [False] * (stop - 1) + [True] * 6 and len(calls) == 2 * stop + 5


# ---------------------------------------------------------------------------------------------------- sampling
class Fixed(torch.nn.Module):
    """A model of the same logits everywhere."""

    block_size = 8

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, ids, position_ids=None, cache=None):
        return self.logits.expand(*ids.shape, -1)


LOGITS = [1.0, 3.0, -1.0, 2.0, 2.5, 0.0, 2.25, -2.0]


def frequencies(**settings) -> torch.Tensor:
    drawn = generate(Fixed(LOGITS), torch.zeros(40, 1, dtype=torch.long), 500, **settings)
    return torch.bincount(drawn.flatten(), minlength=8) / drawn.numel()


def allowed(temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Probabilities, token by token: those of the top_k likeliest, while those before it do not reach top_p."""
    p = [x.item() for x in torch.softmax(torch.tensor(LOGITS, dtype=torch.float64) / temperature, 0)]
    order = sorted(range(8), key=lambda i: -p[i])[:top_k]
    total, mass, kept = sum(p[i] for i in order), 0.0, {}
    for i in order:
        if top_p is None or mass < top_p * total:
            kept[i] = p[i]
        mass += p[i]
    return torch.tensor([kept.get(i, 0.0) / sum(kept.values()) for i in range(8)])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.5, None, None), (3.0, None, None), (1.0, 3, None), (1.0, 100, None), (1.0, None, 0.5), (1.0, None, 0.9), (1.0, None, 1.0),
    (2.0, 5, 0.7), (0.7, 4, 0.95)])
def test_tokens_come_as_often_as_softmax_says_and_only_allowed_ones(temperature, top_k, top_p):
    found, expected = frequencies(temperature=temperature, top_k=top_k, top_p=top_p), allowed(temperature, top_k, top_p)
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()


def test_one_token_to_choose_from_is_greedy():
    net = model()
    greedy = generate(net, PROMPTS, 10, temperature=0)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        assert torch.equal(generate(net, PROMPTS, 10, **settings), greedy)
    assert frequencies(top_k=1)[1] == frequencies(top_p=1e-9)[1] == 1
    assert set(generate(Fixed([1.0] * 8), torch.zeros(1, dtype=torch.long), 300, top_k=3)[0].tolist()) == {0, 1, 2}      # ties


# ---------------------------------------------------------------------------------------------------- packed documents
DOCUMENTS = [{"input_ids": ids} for ids in tokens(5, 1, 8, 3, seed=2)]


def grads(net: GPT, batches: list[dict]) -> tuple[float, list[torch.Tensor]]:
    net.zero_grad()
    loss = sum(compute_loss(net, batch) for batch in batches)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in net.parameters()]


def test_a_packed_row_is_the_sum_of_its_documents():
    net = model()
    loss, grad = grads(net, [PackingCollator()(DOCUMENTS)])
    for others in ([PackingCollator()([one]) for one in DOCUMENTS], [CausalLMCollator(0)(DOCUMENTS)]):
        other_loss, other_grad = grads(net, others)
        assert loss == pytest.approx(other_loss, rel=1e-12)
        for one, two in zip(grad, other_grad, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_token_changes_no_logits_of_other_documents_nor_before_it():
    net, batch = model(), PackingCollator()(DOCUMENTS)
    ids, positions = batch["input_ids"], batch["position_ids"]
    before, document = net(ids, position_ids=positions)[0], (positions[0] == 0).cumsum(0)
    for at in range(ids.shape[1]):
        other = ids.clone()
        other[0, at] = (ids[0, at] + 1) % VOCAB
        changed = (net(other, position_ids=positions)[0] != before).any(-1)
        assert torch.equal(changed, (document == document[at]) & (torch.arange(len(document)) >= at))


def test_rows_of_a_batch_have_documents_of_their_own():
    net, (a, b) = model(), tokens(6, 6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    found = net(torch.stack([a, b]), position_ids=positions)
    for row, ids in ((found[0], a), (found[1, :2], b[:2]), (found[1, 2:], b[2:])):
        torch.testing.assert_close(row, net(ids[None])[0], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("prompts, settings, said", [
    (torch.zeros(0, dtype=torch.long), {}, r"shapes \[\(0,\)\] and 1 seeds"), ([], {}, r"shapes \[\]"),
    ([PROMPTS[0], PROMPTS[0][:0]], {}, r"shapes \[\(5,\), \(0,\)\]"), (PROMPTS, {"seeds": [1]}, "1 seeds"), (torch.tensor(3), {}, "prompts"),
    (PROMPTS, {"temperature": -1}, "temperature=-1"), (PROMPTS, {"top_k": 0}, "top_k=0"), (PROMPTS, {"top_p": 0}, "top_p=0"),
    (PROMPTS, {"top_p": 1.5}, "top_p=1.5"), (PROMPTS, {"temperature": float("nan")}, "temperature=nan")])
def test_a_mistake_is_one_message(prompts, settings, said):
    with pytest.raises(UsageError, match=said):
        generate(model(), prompts, 3, **settings)


def test_a_diverged_model_is_said_to_be_one_and_keeps_its_mode():
    net = model()
    net.head.weight.data[3] = torch.nan
    with pytest.raises(UsageError, match="its training has diverged"):
        generate(net, PROMPTS, 3)
    assert net.training and net.blocks[0].training


class Exact:
    """Streaming: the share of samples whose continuation is what the label says."""

    def reset(self):
        self.hits = self.rows = 0

    def update(self, predictions, labels):
        self.hits += int((predictions == labels).all(-1).sum())
        self.rows += len(labels)

    def compute(self):
        return {"exact_match": self.hits / self.rows, "n": self.rows}


def evaluated(output_dir, strategy: str, batch_size: int):
    """Evaluation with a predict_fn that generates, where rows end after unequal numbers of tokens."""
    model = gpt(dtype=torch.float64)
    prompts = [sequence["input_ids"][:3] for sequence in sequences(7)]
    references = generate(model, prompts, 5, temperature=0, eos_id=3, pad_id=0)
    samples = [{"input_ids": prompt, "labels": row} for prompt, row in zip(prompts, references)]
    samples[2]["labels"] = samples[2]["labels"] * 0 + 16
    with toy_run(arguments(output_dir, strategy=strategy, per_device_eval_batch_size=batch_size), model=model, train_set=samples, eval_set=samples) as (run, _, loader):
        def write(model, batch):
            return generate(model, batch["input_ids"], 5, temperature=0, eos_id=3, pad_id=0, agree=run.world.all)
        metrics = evaluate(run, loader, lambda model, batch: model(batch["input_ids"]).sum(), Exact(), predict_fn=write)
    return metrics["eval_exact_match"], metrics["eval_n"], len({int((row == 3).int().argmax()) for row in references})


def test_generation_in_evaluation_is_the_same_over_ranks_that_shard_the_weights(ranks, tmp_path):
    one = evaluated(tmp_path, "ddp", 3)
    assert one[:2] == (6 / 7, 7) and one[2] > 1
    for strategy in ("ddp", "fsdp"):
        assert ranks.run(2, evaluated, tmp_path / strategy, strategy, 2) == [one] * 2
