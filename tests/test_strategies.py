"""ddp, zero1, zero2, fsdp and hsdp are the same training: the weights of one process, whatever is split."""
import json
import os
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
from callbacks import Callback
from distributed import build_on, parallelize, whole
from evalloop import evaluate, predict
from loader import Loader
from loop import train, train_step
from loss import compute_loss, cross_entropy
from model import GPT
from state import UsageError
from tests.naive import train_naively
from tests.toy import LENGTH, VOCAB, arguments, rows, sequences, toy_run, train_and, weights
from tools.generate import generate
from world import open_world, set_seed

STRATEGIES = [(3, "ddp"), (3, "zero1"), (2, "zero2"), (3, "fsdp"), (4, "hsdp")]
SAMPLES = 61        # in windows of 24: the third of a pass is uneven, and on 4 ranks one of them has nothing in its last micro-batch
UPDATES = 10      # of runs that are compared with one written by hand; others begin a second pass too


def odd_gpt(dtype: torch.dtype = torch.float64) -> GPT:
    """Sizes that 2, 3 and 4 do not divide: 17 x 18 embeddings, matrices of 18 x 18 and 72 x 18."""
    set_seed(0)
    model = GPT(VOCAB, LENGTH, n_layer=2, n_head=3, n_embd=18)
    for block in model.blocks:
        nn.init.normal_(block.attn.out.weight, std=0.2)
        nn.init.normal_(block.down.weight, std=0.2)
    return model.to(dtype)


def settings(output_dir, world_size: int, strategy: str = "ddp", **changes):
    return arguments(output_dir, **{"strategy": strategy, "per_device_train_batch_size": 12 // world_size, "gradient_accumulation_steps": 2,
                                    "max_steps": 4, "max_grad_norm": 0.5, "weight_decay": 0.1,
                                    "hsdp_shard_size": 2 if strategy == "hsdp" else None, **changes})


def finish(output_dir, world_size: int, strategy: str = "ddp", dtype: torch.dtype = torch.float64, model=None, loss_fn=compute_loss, **changes):
    """Weights and losses at the end."""
    args = settings(output_dir, world_size, strategy, **changes)
    model, samples = model(dtype) if model else odd_gpt(dtype), sequences(SAMPLES)
    result = train_and(args, weights, loss_fn, model=model, train_set=samples, eval_set=sequences(5, seed=1))
    return result, [row["loss"] for row in rows(output_dir) if "loss" in row]


def call(function, positional, keywords):
    return function(*positional, **keywords)


def on_ranks(ranks, function, *positional, world_size: int, **keywords):
    return ranks.run(world_size, call, function, (*positional, world_size), keywords)


def close(got, expected, weight_tolerance: float | None = 1e-11, loss_tolerance: float = 1e-11):
    """weight_tolerance None: losses alone."""
    assert got[0].keys() == expected[0].keys()
    for name, value in expected[0].items() if weight_tolerance is not None else ():
        np.testing.assert_allclose(got[0][name], value, rtol=0, atol=weight_tolerance, err_msg=name)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=loss_tolerance)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process gets, by its settings."""
    known = {}

    def get(**changes):
        key = repr(sorted(changes.items(), key=str))
        if key not in known:
            known[key] = finish(tmp_path_factory.mktemp("one"), 1, **changes)
        return known[key]
    return get


def naive(world_size: int, lr: float = 1e-2):
    rank, model, samples = int(os.environ["RANK"]) if world_size > 1 else 0, odd_gpt(), sequences(SAMPLES)
    order = [Loader(samples, None, 1, seed=42, shuffle=True).order(epoch).tolist() for epoch in range(UPDATES // 3 + 1)]
    windows = [[samples[i] for i in epoch[start:start + 24]] for epoch in order for start in range(0, SAMPLES, 24)][:UPDATES]
    losses = train_naively(model, windows, rank, world_size, lr, 0.1, 0.5)
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}, losses


def naive_ranks(world_size: int):
    with open_world(arguments("unused")):
        return naive(world_size)


def test_one_process_and_many_get_the_weights_of_a_trainer_written_by_hand(ranks, one, tmp_path):
    settings = {"max_steps": UPDATES, "lr_scheduler_type": "constant"}
    by_hand = naive(1)
    close(one(**settings), by_hand)
    for got in ranks.run(3, naive_ranks, 3):
        close(got, by_hand)


@pytest.mark.parametrize("world_size, strategy", [(n, s) for n in (1, 2, 3, 4) for s in ("ddp", "zero1", "zero2", "fsdp")] + [(4, "hsdp")])
def test_every_strategy_gets_the_weights_of_one_process(ranks, one, tmp_path, world_size, strategy):
    settings = {"max_steps": UPDATES, "lr_scheduler_type": "constant"}
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, strategy=strategy, **settings):
        close(got, one(**settings))


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_in_float32_the_weights_of_sgd_and_the_losses_of_adamw_are_those_of_one_process(ranks, one, tmp_path, world_size, strategy):
    """AdamW divides noise by noise where a gradient is zero, so its weights say nothing in float32."""
    for optim, tolerance in (("sgd", 1e-6), ("adamw_torch_fused", None)):
        settings = {"optim": optim, "dtype": torch.float32}
        for got in on_ranks(ranks, finish, tmp_path / optim, world_size=world_size, strategy=strategy, **settings):
            close(got, one(**settings), tolerance, 1e-5)


@pytest.mark.parametrize("world_size, strategy, optim", [(n, s, optim) for n, s in STRATEGIES for optim in ("muon", "adafactor")] +
                         [(3, "zero1", "lion"), (3, "fsdp", "lion"), (2, "zero2", "sgd"), (4, "hsdp", "sgd")])
def test_every_optimizer_gets_the_weights_of_one_process(ranks, one, tmp_path, world_size, strategy, optim):
    """Elementwise ones are cut anywhere; Muon and Adafactor look at whole matrices."""
    settings = {"optim": optim, "learning_rate": 1e-3}
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, strategy=strategy, **settings):
        close(got, one(**settings))


def test_options_of_a_strategy_do_not_change_the_training(ranks, one, tmp_path):
    for i, (strategy, option) in enumerate([
            ("ddp", {"ddp_bucket_cap_mb": 0.001}), ("ddp", {"ddp_find_unused_parameters": False}), ("zero1", {"ddp_bucket_cap_mb": 0.001}),
            ("zero2", {"ddp_bucket_cap_mb": 0.001}), ("zero2", {"accumulate_unsharded": True}), ("zero1", {"cpu_offload": True}),
            ("fsdp", {"accumulate_unsharded": True}), ("fsdp", {"reshard_after_forward": False}), ("fsdp", {"cpu_offload": True}),
            ("fsdp", {"fsdp_transformer_layer_cls_to_wrap": "Attention,Block"})]):
        for got in on_ranks(ranks, finish, tmp_path / str(i), world_size=2, strategy=strategy, **option):
            close(got, one())


@pytest.mark.parametrize("world_size, strategy", [(4, "ddp"), *STRATEGIES[1:]])
def test_two_runs_are_bit_identical_and_all_ranks_agree(ranks, tmp_path, world_size, strategy):
    runs = [on_ranks(ranks, finish, tmp_path / str(i), world_size=world_size, strategy=strategy) for i in range(2)]
    for got in (*runs[0], *runs[1]):
        close(got, runs[0][0], 0, 0)


def accumulating(strategy: str) -> dict:
    return {"activation_checkpointing": True} if strategy != "ddp" else {"activation_checkpointing": True, "ddp_find_unused_parameters": False}


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_activation_checkpointing_and_compilation_work_under_every_strategy(ranks, one, tmp_path, world_size, strategy):
    for got in on_ranks(ranks, finish, tmp_path / "a", world_size=world_size, strategy=strategy, **accumulating(strategy)):
        close(got, one())
    if strategy in ("zero2", "fsdp"):      # slow to compile; one of each kind
        for got in on_ranks(ranks, finish, tmp_path / "b", world_size=2, strategy=strategy, torch_compile=True,
                            torch_compile_backend="aot_eager", max_steps=2):
            close(got, one(max_steps=2))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_16_bits_stay_near_one_process(ranks, one, tmp_path, world_size, strategy, kind):
    """fsdp and hsdp gather weights in 16 bits too, which autocast leaves in 32."""
    settings = {kind: True, "dtype": torch.float32}
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, strategy=strategy, **settings):
        close(got, one(**settings), None, 3e-2)


class Planted(nn.Module):
    """A parameter whose gradient overflows in float16 when a batch holds the number 9."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        nn.init.ones_(self.a.weight)
        nn.init.ones_(self.b.weight)

    def forward(self, x):
        return (self.a(x) * torch.where(x[:, :1] == 9, 1e36, 1.0)).sum() + self.b(x).sum()


def overflow(output_dir, world_size: int, strategy: str):
    samples = [{"x": torch.full((3,), 9.0 if i == 1 else 0.5)} for i in range(world_size)]
    args = settings(output_dir, world_size, strategy, per_device_train_batch_size=1, gradient_accumulation_steps=1, fp16=True, optim="sgd")
    with toy_run(args, model=Planted(), train_set=samples) as (run, loader, _):
        window = list(loader.epoch())
        scales, before = [run.precision.scaler.get_scale()], weights(run)
        train_step(run, window, lambda model, batch: model(batch["x"]))
        skipped = run.state.skipped_steps
        scales.append(run.precision.scaler.get_scale())
        after = weights(run)
        return scales, skipped, all((before[n] == after[n]).all() for n in before)


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_an_overflow_on_one_rank_skips_the_update_on_all(ranks, tmp_path, world_size, strategy):
    for got in on_ranks(ranks, overflow, tmp_path, world_size=world_size, strategy=strategy):
        assert got == ([65536.0, 32768.0], 1, True)


class Branches(nn.Module):
    """Two heads on one body; which ones are used depends on the batch. `scale` is frozen, `never` unused, `out` tied to `embed`."""

    def __init__(self):
        super().__init__()
        set_seed(1)
        self.embed, self.body = nn.Embedding(VOCAB, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.out = nn.Linear(5, VOCAB, bias=False)
        self.out.weight = self.embed.weight
        self.scale, self.never = nn.Parameter(torch.full((3,), 2.0), requires_grad=False), nn.Linear(3, 3)
        self.seen = set()

    def forward(self, ids, labels):
        x = self.body(self.embed(ids)) * self.scale[0]
        head = 1 if ids[0, 0] % 2 else 0       # of this micro-batch alone: ranks differ
        x = self.heads[head](x) if ids[0, 1] % 3 else x
        return cross_entropy(self.out(x), labels)


def branch_settings(world_size: int) -> dict:
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12 // world_size}


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_unused_frozen_and_tied_parameters_are_trained_as_by_one_process(ranks, one, tmp_path, world_size, strategy):
    """A parameter unused on some ranks gets the gradient of the others; one unused on all is left alone, moments and decay too."""
    expected = one(model=branches, **branch_settings(1))
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, strategy=strategy, model=branches, **branch_settings(world_size)):
        close(got, expected)
    start = Branches().double()
    assert (expected[0]["never.weight"] == start.never.weight.detach().numpy()).all() and (expected[0]["scale"] == 2).all()
    assert not (expected[0]["heads.0.weight"] == start.heads[0].weight.detach().numpy()).all()


def branches(dtype):
    return Branches().to(dtype)


def test_ddp_without_the_search_names_the_unused_parameter_and_the_flag(ranks, tmp_path):
    for message in on_ranks(ranks, refused, tmp_path, world_size=2, model=never, ddp_find_unused_parameters=False):
        assert "does not use never.bias, never.weight: leave --ddp_find_unused_parameters" in message


def never(dtype):
    model = Branches().to(dtype)
    model.forward = lambda ids, labels: cross_entropy(model.out(model.heads[0](model.heads[1](model.body(model.embed(ids))))), labels)
    return model


def refused(output_dir, world_size: int, finish=finish, **changes) -> str:
    try:
        finish(output_dir, world_size, **changes)
    except UsageError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("changes, said", [
    ({"strategy": "hsdp", "hsdp_shard_size": 3}, "groups of --hsdp_shard_size=3"),
    ({"strategy": "fsdp", "fsdp_transformer_layer_cls_to_wrap": "Blok"}, "no module of that class; it has Attention, Block"),
    ({"strategy": "zero1", "optim": "adagrad"}, "Adagrad makes its state before training, so it cannot")])
def test_what_a_strategy_cannot_do_is_refused(ranks, tmp_path, changes, said):
    for message in on_ranks(ranks, refused_adagrad if changes.get("optim") else refused, tmp_path, world_size=2, **changes):
        assert said in message


def refused_adagrad(output_dir, world_size: int, strategy: str, optim: str) -> str:
    args = settings(output_dir, world_size, strategy)
    try:
        with toy_run(args, make_optimizer=lambda model, args: torch.optim.Adagrad(model.parameters())):
            return "nothing was refused"
    except UsageError as error:
        return str(error)


def watched(output_dir, world_size: int, strategy: str):
    """Evaluations before, between and after training: their losses, predictions, and the weights with and without them."""
    quiet = finish(output_dir / "quiet", world_size, strategy)[0]
    args = settings(output_dir / "watched", world_size, strategy, eval_strategy="steps", eval_steps=2, eval_on_start=True, ema_decay=0.5)
    with toy_run(args, model=odd_gpt(), train_set=sequences(SAMPLES), eval_set=sequences(5, seed=1)) as (run, train_loader, eval_loader):
        first = evaluate(run, eval_loader, compute_loss)["eval_loss"]
        train(run, train_loader, eval_loader, compute_loss)
        last, predictions = evaluate(run, eval_loader, compute_loss)["eval_loss"], predict(run, eval_loader).predictions
        loud = weights(run)
        text = generate(run.model, torch.tensor([1]), 5)
    assert all((quiet[name] == loud[name]).all() for name in quiet)
    return first, last, predictions.numpy(), text.tolist(), [row["eval_loss"] for row in rows(output_dir / "watched") if "eval_loss" in row]


@pytest.fixture(scope="module")
def watched_by_one(tmp_path_factory):
    return watched(tmp_path_factory.mktemp("watched"), 1, "ddp")


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_evaluating_at_any_time_is_right_and_leaves_training_alone(ranks, watched_by_one, tmp_path, world_size, strategy):
    """5 samples in batches of 2 on up to 4 ranks: some have nothing to evaluate. The weights evaluated are an average's."""
    for got in on_ranks(ranks, watched, tmp_path, world_size=world_size, strategy=strategy):
        assert got[3] == watched_by_one[3]
        for one, other in zip(got, watched_by_one):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def gathers(output_dir, world_size: int, **changes) -> int:
    """How often an evaluation brings the weights of other ranks."""
    with toy_run(settings(output_dir, world_size, "zero1", **changes), model=odd_gpt(), eval_set=sequences(5)) as (run, _, eval_loader):
        calls, gather = [], run.parallel.gather
        run.parallel.gather = lambda: calls.append(gather())
        evaluate(run, eval_loader, compute_loss)
    return len(calls)


def test_an_evaluation_gathers_weights_only_where_it_changes_them(ranks, tmp_path):
    assert on_ranks(ranks, gathers, tmp_path / "plain", world_size=2) == [0, 0]
    assert on_ranks(ranks, gathers, tmp_path / "averaged", world_size=2, ema_decay=0.5) == [2, 2]


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive at one time of those made inside."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu":     # a DTensor says the size of the whole
                self.made[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self.made = {ref: size for ref, size in self.made.items() if not ref.expired()}
        self.most = max(self.most, sum(self.made.values()))
        return out


def unlike(tied: bool) -> GPT:
    """Its head is the embedding, or its blocks are initialised by what is no reset_parameters."""
    model = GPT(VOCAB, LENGTH, n_layer=2, n_head=3, n_embd=18)
    if tied:
        model.head.weight = model.embed.weight
    else:
        model.blocks.apply(lambda m: nn.init.normal_(m.weight, std=0.3) if isinstance(m, nn.Linear) else None)
    return model


def deep_gpt() -> GPT:
    return GPT(VOCAB, LENGTH, n_layer=8, n_head=3, n_embd=18)


BUILDERS = [(deep_gpt, True), (partial(unlike, True), True), (partial(unlike, False), False)]


def from_meta(output_dir, world_size: int, strategy: str, build, meta_init: bool):
    """Initial weights, bytes of shards, most bytes that were alive while they were made, and whether the model came from the meta device."""
    args = settings(output_dir, world_size, strategy)
    with open_world(args) as world:
        set_seed(3)
        model = build_on(world, build, meta_init)
        on_meta = all(p.is_meta for p in model.parameters())
        with Alive() as alive:
            parallelize(model, args, world)
        held = sum(p.to_local().nbytes for p in model.parameters())
        return {name: whole(p).numpy() for name, p in model.named_parameters()}, held, alive.most, on_meta


@pytest.mark.parametrize("world_size, strategy", STRATEGIES[3:])
@pytest.mark.parametrize(("build", "meta_init"), BUILDERS, ids=["plain", "tied", "own"])
def test_a_sharded_model_starts_with_the_weights_of_one_process_and_no_rank_holds_it_whole(ranks, tmp_path, world_size, strategy, build, meta_init):
    set_seed(3)
    expected = build()
    total = sum(p.nbytes for p in expected.parameters())
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in expected.modules())
    for got, held, most, on_meta in on_ranks(ranks, from_meta, tmp_path, world_size=world_size, strategy=strategy, build=build,
                                                 meta_init=meta_init):
        assert all((got[name] == p.detach().numpy()).all() for name, p in expected.named_parameters())
        assert on_meta == meta_init
        if build is deep_gpt:
            assert held < total * 1.2 / (2 if strategy == "hsdp" else world_size)
            assert most < held * 1.1 + 3 * largest < total      # its shards, and one module at a time


def saved(output_dir, world_size: int, strategy: str, resume=None, max_steps: int = 4, **changes):
    """Everything that a checkpoint keeps, after loading and at the end: weights and whole moments by name, of all ranks' parts."""
    args = settings(output_dir, world_size, strategy, save_strategy="steps", save_steps=2, resume_from_checkpoint=resume, max_steps=max_steps,
                    ema_decay=0.9, **changes)
    with toy_run(args, model=odd_gpt(), train_set=sequences(SAMPLES)) as (run, loader, _):
        loaded = held_state(run)
        train(run, loader, None, compute_loss)
        return loaded, held_state(run)


def held_state(run) -> dict[str, np.ndarray]:
    state = {name: whole(p).numpy().copy() for name, p in run.model.named_parameters()}
    for part, average in zip(run.parallel.parts, run.ema.parts):
        for key, value in {**run.optimizer.state.get(part.piece, {}), "ema": average.piece, "piece": part.piece}.items():
            if value.shape == part.piece.shape:
                state[f"{part.name}.{key}.{part.start}"] = value.detach().numpy().flatten().copy()
            else:
                state[f"{part.name}.{key}"] = value.detach().numpy().copy()
    return state


def join(states: list[dict]) -> dict[str, np.ndarray]:
    """Whole tensors from the parts of all ranks."""
    joined: dict[str, dict] = {}
    for state in states:
        for name, value in state.items():
            base, _, start = name.rpartition(".")
            if start.isdigit():
                joined.setdefault(base, {})[int(start)] = value
            else:
                joined[name] = {0: value}
    return {name: np.concatenate([parts[start].ravel() for start in sorted(parts)]) for name, parts in joined.items()}


FULL = os.environ.get("PORTS") == "full"       # every source with every target: minutes
PORTS = [(1, "ddp"), *((n, strategy) for strategy in ("ddp", "zero1", "zero2", "fsdp") for n in (2, 3, 4)), (4, "hsdp")] if FULL else \
    [(1, "ddp"), (3, "ddp"), (3, "zero1"), (4, "zero2"), (3, "fsdp"), (4, "hsdp")]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_any_strategy_goes_on_from_any_checkpoint(ranks, tmp_path, optim):
    """Loaded weights, moments and averages are bit-equal; the end is that of a run that was not cut, to the bit under the same strategy."""
    cut, whole_run = {}, {}
    sources = PORTS if FULL or optim != "muon" else PORTS[1::2]     # with the targets after them, these are all
    for n, strategy in sources:
        whole_run[n, strategy] = on_ranks(ranks, saved, tmp_path / f"{n}{strategy}", world_size=n, strategy=strategy, optim=optim)
        cut[n, strategy] = tmp_path / f"{n}{strategy}" / "checkpoint-2"
    for source in sources:
        before, i = None, PORTS.index(source)
        for target in PORTS if FULL else (source, PORTS[(i + 1) % len(PORTS)]):
            name = f"{source}-{target}"
            results = on_ranks(ranks, saved, tmp_path / name, world_size=target[0], strategy=target[1], optim=optim, resume=str(cut[source]))
            loaded, end = (join([result[k] for result in results]) for k in (0, 1))
            before = before or loaded
            assert loaded.keys() == before.keys()
            assert all((loaded[key] == before[key]).all() for key in before), name
            for key, value in join([result[1] for result in whole_run[source]]).items():
                np.testing.assert_allclose(end[key], value, rtol=0, atol=0 if target == source else 1e-11, err_msg=f"{name} {key}")


@pytest.mark.parametrize("world_size, strategy", [(1, "ddp"), *STRATEGIES])
def test_every_strategy_writes_the_whole_model_in_one_file_or_in_shards_with_an_index(ranks, tmp_path, world_size, strategy):
    on_ranks(ranks, saved, tmp_path / "a", world_size=world_size, strategy=strategy, max_steps=2)
    on_ranks(ranks, saved_in_shards, tmp_path / "b", world_size=world_size, strategy=strategy)
    one = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in one.items()} == {name: tuple(p.shape) for name, p in odd_gpt().named_parameters()}
    folder = tmp_path / "b" / "checkpoint-2"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    for file in files:
        for name, tensor in load_file(folder / file).items():
            assert index["weight_map"].pop(name) == file and torch.equal(tensor, one[name])
    assert not index["weight_map"]


def saved_in_shards(output_dir, world_size: int, strategy: str):
    kept, checkpoint.MAX_FILE_BYTES = checkpoint.MAX_FILE_BYTES, 30_000
    try:
        saved(output_dir, world_size, strategy, max_steps=2)
        loaded = saved(output_dir.with_name("c"), world_size, strategy, resume=str(output_dir / "checkpoint-2"), max_steps=2)
    finally:
        checkpoint.MAX_FILE_BYTES = kept
    return loaded


def gpt2(dtype):
    from transformers import GPT2Config, GPT2LMHeadModel
    set_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=18, n_layer=2, n_head=3, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return GPT2LMHeadModel(config).to(dtype)


def hf_loss(model, batch):
    return cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])


@pytest.mark.parametrize("world_size, strategy", STRATEGIES[2:])
def test_a_transformers_model_with_tied_weights_trains_under_every_strategy(ranks, one, tmp_path, world_size, strategy):
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, strategy=strategy, model=gpt2, loss_fn=hf_loss):
        close(got, one(model=gpt2, loss_fn=hf_loss))


class TwoLayers(nn.Module):
    """Two matrices of different shapes: with Adafactor two of four ranks have nothing to update."""

    def __init__(self):
        super().__init__()
        set_seed(2)
        self.a, self.b = nn.Linear(LENGTH, 6, bias=False), nn.Linear(6, VOCAB, bias=False)

    def forward(self, ids, labels):
        logits = self.b(self.a(ids.to(self.a.weight.dtype)))[:, None].expand(-1, LENGTH, -1)
        return cross_entropy(logits, labels)


def two_layers(dtype):
    return TwoLayers().to(dtype)


@pytest.mark.parametrize("world_size, strategy", [(4, "zero1"), (4, "zero2"), (4, "fsdp")])
def test_a_rank_with_nothing_to_update_keeps_step_with_the_others_and_their_loss_scale(ranks, tmp_path, world_size, strategy):
    changes = {"optim": "adafactor", "fp16": True, "model": two_layers, "dtype": torch.float32}
    ddp = on_ranks(ranks, finish, tmp_path / "ddp", world_size=world_size, **changes)
    for got in on_ranks(ranks, finish, tmp_path / "split", world_size=world_size, strategy=strategy, **changes):
        close(got, ddp[0], None, 3e-2)


def shares(output_dir, world_size: int, strategy: str, optim: str):
    args = settings(output_dir, world_size, strategy, optim=optim)
    model = GPT(VOCAB, LENGTH, n_layer=4, n_head=2, n_embd=32)
    total = sum(p.numel() for p in model.parameters())
    with toy_run(args, model=model) as (run, _, _):
        buckets = sum(bucket.size for bucket in getattr(run.parallel, "buckets", []))
        return sum(part.piece.numel() for part in run.parallel.parts) / total, buckets / total


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
@pytest.mark.parametrize("optim", ["muon", "adafactor"])
def test_whole_matrices_are_spread_evenly_over_ranks(ranks, tmp_path, strategy, optim):
    got = on_ranks(ranks, shares, tmp_path, world_size=4, strategy=strategy, optim=optim)
    assert sum(share for share, _ in got) == pytest.approx(1)
    assert all(0.15 < share < 0.35 for share, _ in got), got
    assert all(size < 1.15 for _, size in got), got


class Meddle(Callback):
    """Runs forward and backward of its own between updates."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model(torch.zeros(1, LENGTH, dtype=torch.long), torch.zeros(1, LENGTH, dtype=torch.long)).backward()
        model.zero_grad()

    on_step_begin = on_train_begin


def meddled(output_dir, world_size: int, strategy: str):
    args = settings(output_dir, world_size, strategy)
    return train_and(args, weights, model=odd_gpt(), train_set=sequences(SAMPLES), callbacks=[Meddle()]), []


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_a_backward_of_a_callback_does_not_touch_training(ranks, one, tmp_path, world_size, strategy):
    for got in on_ranks(ranks, meddled, tmp_path, world_size=world_size, strategy=strategy):
        close(got, (one()[0], []))


class Normalised(torch.optim.AdamW):
    """Looks at all of a gradient at once, though it comes from an optimizer that does not."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= p.grad.norm() + 1e-3
        return super().step(closure)


def with_normalised(output_dir, world_size: int, strategy: str):
    args = settings(output_dir, world_size, strategy)
    return train_and(args, weights, model=odd_gpt(), train_set=sequences(SAMPLES),
                     make_optimizer=lambda model, args: Normalised(model.parameters(), lr=1e-2)), []


@pytest.mark.parametrize("world_size, strategy", STRATEGIES)
def test_an_optimizer_that_is_not_known_gets_whole_parameters(ranks, tmp_path, world_size, strategy):
    expected = with_normalised(tmp_path / "one", 1, "ddp")
    for got in on_ranks(ranks, with_normalised, tmp_path / "many", world_size=world_size, strategy=strategy):
        close(got, expected)


class Unfreeze(Callback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.body.weight.requires_grad_(state.global_step > 0)


def mistake(kind: str, dtype: torch.dtype = torch.float32):
    model = Branches().to(dtype)
    if kind == "scalar":
        model.temperature = nn.Parameter(torch.tensor(1.0))
    if kind == "empty":
        model.nothing = nn.Parameter(torch.zeros(0, 3))
    if kind == "sparse":
        model.embed.sparse = True
    if kind == "batchnorm":
        model.norm = nn.BatchNorm1d(5)
    if kind == "tied":
        model.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        model.blocks[1].weight = model.blocks[0].weight
    if kind == "unfreeze":
        model.body.weight.requires_grad_(False)
    return model


def mistaken(output_dir, world_size: int, strategy: str, kind: str, **changes) -> str:
    make = {"make_optimizer": lambda model, args: torch.optim.SGD(model.heads.parameters(), lr=0.1)} if kind == "held" else {}
    try:
        train_and(settings(output_dir, world_size, strategy, **changes), weights, model=mistake(kind), train_set=sequences(8),
                  callbacks=[Unfreeze()] if kind == "unfreeze" else [], **make)
    except UsageError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("strategy, kind, said", [
    ("fsdp", "scalar", "temperature is a single number. Use --strategy zero2"), ("fsdp", "empty", "nothing is empty"),
    ("fsdp", "tied", "blocks.1.weight is tied to a weight of another block"), ("fsdp", "batchnorm", "norm is a BatchNorm"),
    ("ddp", "sparse", "embed gives sparse gradients"), ("zero1", "held", "the optimizer trains 4 parameters, and not"),
    ("ddp", "unfreeze", "body.weight did not require a gradient when training began"), ("fsdp", "unfreeze", "body.weight did not require")])
def test_a_model_that_cannot_be_trained_is_refused_by_the_name_of_its_parameter(ranks, tmp_path, strategy, kind, said):
    changes = {"bf16": True} if kind == "batchnorm" else {}
    for message in on_ranks(ranks, mistaken, tmp_path, world_size=2, strategy=strategy, kind=kind, **changes):
        assert said in message


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.out = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, VOCAB)

    def forward(self, ids, labels):
        x = self.embed(ids)
        for _ in range(3):
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True)
        return cross_entropy(self.out(x), labels)


def reentrant(dtype):
    return Reentrant().to(dtype)


def test_a_gradient_that_comes_in_pieces_is_refused_by_name(ranks, tmp_path):
    for message in on_ranks(ranks, refused, tmp_path, world_size=2, strategy="zero2", model=reentrant):
        assert "the gradient of layer." in message and "use_reentrant=False" in message


def test_an_empty_parameter_is_saved_and_loaded(tmp_path):
    for resume in (None, "True"):
        args = settings(tmp_path, 1, save_strategy="steps", save_steps=1, max_steps=2 if resume else 1, resume_from_checkpoint=resume)
        train_and(args, weights, model=mistake("empty"), train_set=sequences(24))
