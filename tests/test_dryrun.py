"""A dry run tells what real ranks hold, send and compute, and what formulas of papers say of many."""
import argparse
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as functional

from args import parse_args
from cost import Clock
from loss import compute_loss
from model import build_model
from state import UsageError
from tools.dryrun import (
    AlikeChunks,
    Figures,
    at_least,
    check_peaks,
    compare,
    main,
    measure,
    open_dry_world,
    predict,
    seconds,
    with_strategy,
)
from tools.flops import main as count_flops
from tools.growth import Bytes, Point, arrange, draw, formulas, traced
from tools.ledger import Ledger, Route, Traffic, sent
from tools.strategies import BATCH, BUCKET_MB, LENGTH, Case, run_case

SMALL = "--n_layer 2 --n_embd 36 --n_head 3 --vocab_size 97 --block_size 16 --per_device_train_batch_size 2"     # sizes that 4 ranks do not divide


def settings(flags: str):
    return parse_args([*SMALL.split(), *flags.split(), "--save_strategy", "no"])


def check(predicted: Figures, measured: Figures, share: float = 0.02) -> None:
    for name in ("parameters", "gradients", "optimizer", "flops", "host", "trained"):
        assert getattr(predicted, name) == pytest.approx(getattr(measured, name), rel=share), name
    for name in ("activations", "peak"):
        assert getattr(predicted, name) == pytest.approx(getattr(measured, name), rel=max(0.1, share)), name
    assert predicted.peak_phase == measured.peak_phase
    assert predicted.traffic.keys() == measured.traffic.keys()
    for route, traffic in predicted.traffic.items():
        assert vars(traffic) == pytest.approx(vars(measured.traffic[route]), rel=share), route


@pytest.mark.parametrize(("world_size", "flags"), [
    (2, "--strategy ddp --gradient_accumulation_steps 4 --ddp_bucket_cap_mb 0.01"),
    (2, "--strategy zero2 --fp16 --cpu_offload --ema_decay 0.9 --ddp_bucket_cap_mb 0.01"),
    (4, "--strategy hsdp --hsdp_shard_size 2 --gradient_accumulation_steps 3 --activation_checkpointing --bf16"),
    (2, "--tp 2 --n_head 2"), (4, "--strategy fsdp --cp 2 --tp 2 --n_embd 48 --n_head 4 --n_layer 1"),
    (4, "--strategy zero1 --pp 2 --gradient_accumulation_steps 4 --ddp_bucket_cap_mb 0.01")])
def test_it_predicts_what_real_ranks_hold_send_and_compute(world_size, flags, ranks):
    args = settings(flags)
    measured = ranks.run(world_size, measure, args, 2)
    for rank in {0, world_size - 1} if args.tp * args.pp > 1 else {world_size - 1}:      # the last of tp has fewer words, of pp it is another stage
        check(predict(args, world_size, 2, rank), measured[rank])
    if args.strategy in ("zero2", "fsdp"):
        assert sum(figures.trained for figures in measured) == sum(p.numel() for p in build_model(args).parameters())


def test_experts_are_predicted_with_even_routing(ranks):
    args = settings("--ep 2 --n_experts 4 --gradient_accumulation_steps 2")
    measured = ranks.run(2, measure, args, 2)
    assert measured[0].flops != measured[1].flops
    for rank in range(2):
        check(predict(args, 2, 2, rank), measured[rank], share=0.15)       # routers of 32 tokens that know nothing


def test_it_agrees_with_another_count_of_what_ranks_hold(ranks):
    measured = ranks.run(2, run_case, Case("zero1", 2, 2), 2, False)[0]
    predicted = predict(parse_args(f"--strategy zero1 --n_embd 64 --block_size {LENGTH} --per_device_train_batch_size {BATCH // 4} "
                                   f"--gradient_accumulation_steps 2 --ddp_bucket_cap_mb {BUCKET_MB}".split()), 2, 8)
    held = {"weights": predicted.parameters, "gradients": predicted.gradients, "optimizer": predicted.optimizer}
    assert held == pytest.approx(measured["held"], rel=0.02) and predicted.peak > predicted.activations + sum(held.values())
    assert predicted.total("inside") == pytest.approx(measured["sent"], rel=0.02) and predicted.total("between") == 0


@pytest.mark.parametrize(("kind", "accumulation", "ranks", "rank"), [
    ("zero1", 5, 16, 0), ("zero2", 5, 512, 0), ("fsdp", 5, 512, 0), ("hsdp", 5, 512, 0),
    ("tp", 2, 512, 9), ("pp", 8, 16, 0), ("pp", 3, 16, 15), ("cp", 2, 16, 3)])
def test_it_grows_as_the_formulas_of_papers(kind, accumulation, ranks, rank):
    flags = f"--n_layer {8 if kind == 'pp' else 2} --n_embd 1024 --n_head 8 --vocab_size 512 --block_size 64 --per_device_train_batch_size 2 " \
            f"--gradient_accumulation_steps {accumulation}"
    args = arrange(parse_args(flags.split()), kind, ranks, 8)
    predicted, formula = predict(args, ranks, 8, rank), formulas(args, ranks, rank)
    found = traced(predicted)
    assert found.held == pytest.approx(formula.held, rel=0.02)
    assert found.sent == pytest.approx(formula.sent, rel=0.02) and found.kept == pytest.approx(formula.kept, rel=0.05)
    if kind == "hsdp":      # between nodes only an all-reduce of what a rank holds
        P = sum(p.numel() for p in build_model(args).parameters())
        assert predicted.total("between") == pytest.approx(2 * 4 * P / 8 * (1 - 8 / ranks), rel=0.02)


def test_activations_are_what_autograd_keeps():
    args, saved = settings("--n_embd 96"), {}
    model = build_model(args)
    batch = {name: torch.zeros(2, 16, dtype=torch.int64) for name in ("input_ids", "labels")}
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *batch.values()]}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute_loss(model, batch)
    kept = sum(storage.nbytes() for place, storage in saved.items() if place not in known) + loss.nbytes
    assert predict(args, 1, 8).activations == pytest.approx(kept, rel=0.02)


def test_a_ledger_knows_what_is_alive():
    foreign = torch.ones(500)
    with Ledger(Clock(), 8) as ledger:
        a = torch.ones(1000)
        foreign.view(10, 50).add_(1)        # made out of sight, as what a backend keeps for itself
        b, nothing = a[:10] + 1, torch.empty(1000, device="meta") + 1
        assert ledger.now == 4040 and nothing.nbytes == 4000
        c = a * 2
        del a, c
        assert (ledger.now, ledger.peak) == (40, 8040)
        c = torch.ones(1000)
        c.untyped_storage().resize_(0)      # as FSDP lets gathered weights go
        ledger.start([])
        assert (ledger.now, ledger.peak) == (40, 40)
        c.untyped_storage().resize_(4000)
        c.zero_()
        assert (ledger.now, ledger.peak, ledger.gathered()) == (4040, 4040, 4000)
        c.untyped_storage().resize_(0)
        b.add_(1)
        assert (ledger.now, ledger.gathered()) == (40, 0)
        ledger.start([b.add_(1)])           # on the host
        assert ledger.now == 0


def test_operations_are_those_that_flops_counts(capsys):
    flags = ["--n_layer", "2", "--n_embd", "64", "--block_size", "32", "--per_device_train_batch_size", "2"]
    assert predict(parse_args([*flags, "--gradient_accumulation_steps", "5"]), 1, 8).flops == 5 * 2 * 32 * count_flops(flags)


@pytest.mark.parametrize(("route", "inside", "between"), [
    (Route("all-reduce", "all", 4, 4, False), 1.5, 0), (Route("all-reduce", "all", 16, 8, False), 2 * 15 / 16 * 7 / 8, 2 * 15 / 16 / 8),
    (Route("all-gather", "all", 4, 1, False), 0, 3 / 4), (Route("reduce-scatter", "all", 4, 2, False), 3 / 8, 3 / 8), (Route("broadcast", "all", 1, 1, False), 0, 0),
    (Route("all-to-all", "all", 8, 2, False), 1 / 8, 6 / 8), (Route("send", "all", 2, 2, False), 1, 0), (Route("send", "all", 2, 1, False), 0, 1),
    (Route("receive", "all", 2, 1, False), 0, 0)])
def test_what_a_collective_sends(route, inside, between):
    assert sent(route, 4096) == Traffic(1, 4096, pytest.approx(4096 * inside), pytest.approx(4096 * between))


def test_collectives_of_other_parallelisms_are_counted_with_their_group():
    with open_dry_world(settings(""), 16, 9, 8), FakeTensorMode(), Ledger(Clock(), 8, fake=True) as ledger:
        neighbours, across = dist.new_group([8, 9, 10, 11]), dist.new_group([1, 9])
        x = torch.ones(64)
        functional.all_to_all_single(x, None, None, neighbours)
        functional.all_gather_single(x, 0, neighbours)
        functional.all_reduce(x, "sum", across)
        dist.all_to_all_single(torch.empty(64), x, group=across)
        dist.isend(x, 1, group=across)
        dist.isend(x, 10)
        dist.irecv(x, 1)
        counted = {(route.kind, route.size, route.local): (traffic.count, traffic.payload) for route, traffic in ledger.traffic.items()}
    assert counted == {("all-to-all", 4, 4): (1, 256), ("all-gather", 4, 4): (1, 1024), ("all-reduce", 2, 1): (1, 256),
                       ("all-to-all", 2, 1): (1, 256), ("send", 2, 1): (1, 256), ("send", 2, 2): (1, 256), ("receive", 2, 1): (1, 256)}


def test_what_depends_on_numbers_is_refused():
    clock = Clock()
    with FakeTensorMode(), Ledger(clock, 8, fake=True):
        x = torch.ones(3)
        clock.to("forward")
        with pytest.raises(UsageError, match="forward pass depends on a number"):
            x.sum().item()
        clock.to("optimizer")
        assert x.sum().item() == 1


@pytest.mark.parametrize(("flags", "message"), [
    ("--torch_compile --ranks 8", "--torch_compile cannot be simulated"), ("--lora_rank 2 --lora_base nf4", "--lora_base cannot"),
    ("--ranks 12", "full nodes"), ("--ranks 4 --rank 4", "rank from 0 to 3"), ("--strategy hsdp --ranks 8", "hsdp splits 8 ranks"),
    ("--cpu_offload --strategy zero1", "one process has no part"), ("--ranks 16 --flops 1e12", "--bandwidth, --node_bandwidth too"),
    ("--ranks 8 --bandwidth 1e9", "depends on --flops"), ("--memory 0", "expected more than 0"), ("--ranks 2 --n_layers 3", "--n_layer")])
def test_what_cannot_be_simulated_is_refused_by_name(flags, message):
    with pytest.raises(UsageError, match=message):
        main(flags.split())


def test_a_time_has_what_is_waited_for_and_the_slowest_of_the_rest():
    traffic = {Route("all-reduce", "all", 16, 8, False): Traffic(1, 8e6, 14e6, 2e6), Route("all-gather", "tp", 8, 8, False): Traffic(1, 8e6, 7e6, 0)}
    figures = Figures(1, 1, 1, 1, 1, "forward", 0, 6e9, traffic, 1)
    flags = argparse.Namespace(ranks=16, ranks_per_node=8, flops=2e9, bandwidth=7e6, node_bandwidth=4e6, memory=None)
    check_peaks(flags)
    times = seconds(figures, settings("--tp 8 --strategy fsdp --n_embd 48 --n_head 8"), flags)
    assert times == {"compute": 3.0, "exchanges in between": 1.0, "sending inside nodes": 2.0, "sending between nodes": 4.0} and at_least(times) == 5
    times = seconds(figures, settings("--tp 8 --n_embd 48 --n_head 8"), flags)       # gradients come after all of backward
    assert times == {"compute": 3.0, "exchanges in between": 7.0} and at_least(times) == 10
    times = seconds(figures, settings("--pp 2 --gradient_accumulation_steps 4"), flags)
    assert times == {"compute": 3.0, "waiting for stages": 0.75, "exchanges in between": 7.0} and at_least(times) == 10.75


def test_what_is_assumed_is_said(capsys):
    main(f"{SMALL} --ranks 4 --pp 2 --rank 3".split())
    main(f"{SMALL} --ranks 2 --n_experts 4 --ep 2".split())
    told = capsys.readouterr().out
    assert "bubble: 50.0% of the time, with 1 micro-batches in 2 stages; they are fewer" in told and "equal shares of the tokens" in told


def test_the_cheapest_that_fits_is_named(capsys):
    args = settings("--strategy hsdp --gradient_accumulation_steps 2 --hsdp_shard_size 2 --n_layer 1")
    flags = argparse.Namespace(ranks=4, ranks_per_node=4, rank=0, flops=None, bandwidth=None, node_bandwidth=None, memory=None)
    flags.memory = predict(with_strategy(args, "ddp", 4)[0], 4, 4).peak - 1
    assert compare(args, flags) == "zero1"
    args, flags.memory = settings("--tp 2 --n_head 2 --n_layer 1"), 1
    assert compare(args, flags) is None
    told = capsys.readouterr().out
    assert "none fits" in told and told.count("cannot be used: --tp 2 does not go with --strategy") == 3


@pytest.mark.parametrize(("rows", "ranks"), [(8, 4), (7, 4), (5, 4), (1, 4), (9, 6), (4, 16), (6, 1)])
def test_chunks_that_are_alike_have_the_shapes_of_chunks(rows, ranks):
    weight = torch.empty(rows, 3, device="meta")
    expected = [chunk.shape for chunk in torch.chunk(weight, ranks, dim=0)]
    with AlikeChunks():
        found = [chunk.shape for chunk in torch.chunk(weight, ranks, dim=0)]
    assert len(found) == ranks and found == expected + [(0,)] * (ranks - len(expected))


def test_the_picture_has_every_point():
    points = [Point(kind, ranks, Bytes(1e9 / ranks, 1e8 * (ranks - 1), 1e7), Bytes(1e9, 1e8, 1e7)) for kind in ("ddp", "fsdp", "tp") for ranks in (1, 8, 64)]
    picture = ElementTree.fromstring(draw(points))
    dots = [each for each in picture if each.tag.endswith("circle") and each.get("class") != "key"]
    assert len(dots) == 2 * (3 + 2) + 3 + 2 + 3       # nothing is sent by one rank; activations are shown of layouts
