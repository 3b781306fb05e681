"""Precision, schedules, optimizers and losses: each against its definition, or against what it must not change."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.optimization import Adafactor as TheirAdafactor

import loss as losses
from args import TrainArgs, parse_args
from evalloop import evaluate
from loop import train
from loss import compute_loss, cross_entropy, head_cross_entropy
from model import build_model
from optim import Adafactor, Lion, build_optimizer, parameter_groups, parse_optim_args
from precision import Precision
from rundir import list_checkpoints
from schedules import Plateau, build_schedule
from state import UsageError
from tests.test_arithmetic import linear_loss
from tests.toy import Numbers, arguments, flat, gpt, rows, run_training, sequences, toy_run, weights


def rates(kind, total=10, peak=10.0, warmup_steps=2, **kwargs) -> list[float]:
    args = TrainArgs(lr_scheduler_type=kind, learning_rate=peak, warmup_steps=warmup_steps, lr_scheduler_kwargs=kwargs or None)
    schedule = build_schedule(args, total)
    return [schedule(step) for step in range(total + 1)]


@pytest.mark.parametrize("kind, kwargs, expected", [
    ("constant", {}, [10] * 11), ("linear", {}, [0, 5, 10, 8.75, 7.5, 6.25, 5, 3.75, 2.5, 1.25, 0]),
    ("cosine", {}, [0, 5, 10, 9.6194, 8.5355, 6.9134, 5, 3.0866, 1.4645, .3806, 0]),
    ("cosine_with_restarts", {"num_cycles": 2}, [0, 5, 10, 8.5355, 5, 1.4645, 10, 8.5355, 5, 1.4645, 0]),
    ("polynomial", {"power": 2}, [0, 5, 10, 7.6563, 5.625, 3.9063, 2.5, 1.4063, .625, .1563, 0]),
    ("inverse_sqrt", {}, [0, 5, 10, 8.1650, 7.0711, 6.3246, 5.7735, 5.3452, 5, 4.7140, 4.4721]),
    ("cosine_with_min_lr", {"min_lr_rate": .1}, [0, 5, 10, 9.6575, 8.6820, 7.2221, 5.5, 3.7779, 2.3180, 1.3425, 1]),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": .1}, [5, 10, 9.6575, 8.6820, 7.2221, 5.5, 3.7779, 2.3180, 1.3425, 1, 1]),
    ("warmup_stable_decay", {"num_decay_steps": 3}, [0, 5, 10, 10, 10, 10, 10, 10, 7.5, 2.5, 0]),
])
def test_schedules_have_their_first_peak_and_last_values(kind, kwargs, expected):
    assert rates(kind, **kwargs) == pytest.approx(expected, abs=1e-4)


def test_a_schedule_stays_at_its_end_after_the_last_update():
    for kind, kwargs in (("cosine_with_min_lr", {"min_lr_rate": .1}), ("cosine_warmup_with_min_lr", {"min_lr_rate": .1})):
        schedule = build_schedule(TrainArgs(lr_scheduler_type=kind, learning_rate=10.0, lr_scheduler_kwargs=kwargs), 10)
        assert [schedule(step) for step in (11, 15, 20)] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("kind, kwargs, said", [
    ("cosine", {"cycles": 1}, "'cycles'.*knows num_cycles"), ("warmup_stable_decay", {}, "needs 'num_decay_steps'"),
    ("cosine_with_min_lr", {}, "min_lr_rate"), ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "cubic"}, "cubic"),
    ("polynomial", {"lr_end": 11.0}, "must be below"), ("constant", {"x": 1}, "knows none"),
    ("warmup_stable_decay", {"num_decay_steps": 9}, "more than the run's 10 updates"), ("cosine", {"num_cycles": "2"}, "expected a number"),
    ("reduce_lr_on_plateau", {"mode": "auto"}, "min or max"), ("reduce_lr_on_plateau", {"factor": 2.0}, "below 1")])
def test_wrong_schedule_settings_are_clear_errors(kind, kwargs, said):
    with pytest.raises(UsageError, match=said):
        rates(kind, **kwargs)


def test_schedule_settings_are_json_on_the_command_line():
    assert parse_args(["--lr_scheduler_kwargs", '{"num_cycles": 2}']).lr_scheduler_kwargs == {"num_cycles": 2}
    for wrong in ("num_cycles=2", "[1]"):
        with pytest.raises(UsageError, match="expected a JSON object"):
            parse_args(["--lr_scheduler_kwargs", wrong])


@pytest.mark.parametrize("settings", [{"patience": 1}, {"patience": 0, "cooldown": 2, "factor": 0.5}, {"mode": "max", "patience": 1},
                                      {"threshold_mode": "abs", "threshold": 0.3, "patience": 1, "min_lr": 1e-3}])
def test_plateau_follows_torchs_own(settings):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs, ours = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **settings), Plateau(0.1, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        metric = torch.rand((), generator=generator).item()
        theirs.step(metric)
        ours.observe(metric)
        assert ours(0) == optimizer.param_groups[0]["lr"]


def test_decay_groups_follow_type_and_name():
    model = torch.nn.ModuleDict({"fc1": torch.nn.Linear(2, 2), "norm": torch.nn.RMSNorm(2), "ln_1": torch.nn.LayerNorm(2),
                                 "normalizer": torch.nn.Linear(2, 2, bias=False), "rms": torch.nn.RMSNorm(2), "wte": torch.nn.Embedding(3, 2),
                                 "q_norm": torch.nn.RMSNorm(2), "bias_proj": torch.nn.Linear(2, 2, bias=False)})
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert decayed == ["fc1.weight", "normalizer.weight", "rms.weight", "wte.weight"]
    assert plain == ["fc1.bias", "norm.weight", "ln_1.weight", "ln_1.bias", "q_norm.weight", "bias_proj.weight"]


def stepped(optimizer_of, steps=5):
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (6,), (2, 3, 4))]
    optimizer = optimizer_of(parameters)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("extra", [{}, {"beta1": 0.9}, {"weight_decay": 0.1, "clip_threshold": 0.5}])
def test_adafactor_is_that_of_transformers(extra):
    theirs = stepped(lambda p: TheirAdafactor(p, lr=0.1, scale_parameter=False, relative_step=False, **extra))
    for a, b in zip(stepped(lambda p: Adafactor(p, lr=0.1, **extra)), theirs):
        assert torch.equal(a, b)


def test_lion_steps_by_the_sign_of_its_interpolated_momentum():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    p.grad = torch.tensor([3.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))
    p.grad = torch.tensor([-0.2, 0.0])      # momentum 0.03, -0.01: 0.9 x 0.03 - 0.1 x 0.2 > 0
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.data, before * 0.95 + torch.tensor([-0.1, 0.1]))


def test_muon_turns_hidden_matrices_only_and_adamw_the_rest():
    model = gpt()
    args = TrainArgs(optim="muon", learning_rate=0.1, weight_decay=0.0)
    optimizer = build_optimizer(model, args)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        change = p.detach() - before[name]
        hidden = name.startswith("blocks") and p.ndim == 2
        assert ("momentum_buffer" in optimizer.state[p]) == hidden and ("exp_avg" in optimizer.state[p]) == (not hidden)
        if hidden:     # orthogonal: all singular values alike
            values = torch.linalg.svdvals(change)
            assert values.median() > 0.5 * values.max(), name      # the smallest one may need more iterations
        else:
            torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1), rtol=1e-3, atol=0)


def test_optim_args_are_typed_and_wrong_ones_are_errors():
    assert parse_optim_args("momentum=0.9, nesterov=True,steps=5,name=x,eps=1e-3") == {"momentum": 0.9, "nesterov": True, "steps": 5, "name": "x",
                                                                                      "eps": 1e-3}
    group = build_optimizer(gpt(), TrainArgs(optim="sgd", optim_args="momentum=0.9,nesterov=true")).param_groups[0]
    assert group["momentum"] == 0.9 and group["nesterov"] is True
    for wrong in ("speed=1", "momentum", "nesterov=True", "momentum=-1", "momentum=1.2.3"):
        with pytest.raises(UsageError, match="--optim_args"):
            build_optimizer(gpt(), TrainArgs(optim="sgd", optim_args=wrong))


def test_label_smoothing_has_its_known_value():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0], [5.0, 0.0, 0.0]]), torch.tensor([0, -100])
    assert cross_entropy(logits, labels, 0.1).item() == pytest.approx(0.5076059, abs=1e-6)
    assert cross_entropy(logits, labels).item() == pytest.approx(0.4076059, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("frozen", ["none", "hidden", "head"])
def test_chunked_cross_entropy_is_the_plain_one(monkeypatch, smoothing, frozen):
    generator = torch.Generator().manual_seed(0)
    results = []
    for limit in (2**40, 100):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", limit)
        hidden = torch.randn(3, 7, 5, generator=generator.manual_seed(0), requires_grad=frozen != "hidden")
        head = torch.randn(19, 5, generator=generator, requires_grad=frozen != "head")
        labels = torch.randint(19, (3, 7), generator=generator)
        labels[:, 3] = -100
        loss = head_cross_entropy(hidden, head, labels, smoothing)
        (loss * 0.25).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)


def test_chunked_cross_entropy_in_evaluation_fp16_and_half_weights(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 256 * 64)
    taken = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, real=torch.autograd.grad, **k: taken.append(1) or real(*a, **k))
    generator = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(4096, 16, generator=generator) * 24, torch.zeros(4096, dtype=torch.long)
    head = torch.randn(256, 16, generator=generator, requires_grad=True)
    with torch.no_grad():
        head_cross_entropy(hidden, head, labels)
    assert not taken                                        # nothing is differentiated in evaluation
    with torch.autocast("cpu", dtype=torch.float16):
        head_cross_entropy(hidden, head, labels).backward()
    assert torch.isfinite(head.grad).all()                  # no scale could have saved float16 here
    chunked, plain, exact = (head.detach().bfloat16().to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.bfloat16, torch.float64))
    head_cross_entropy(hidden.bfloat16(), chunked, labels).backward()
    for weight in (plain, exact):
        cross_entropy(F.linear(hidden.bfloat16().to(weight.dtype), weight), labels).backward()
    assert (chunked.grad - exact.grad).norm() < 1.5 * (plain.grad - exact.grad).norm()      # summed in float32, not in bfloat16


def test_chunked_cross_entropy_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1000)
    sizes = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *a, real=F.cross_entropy, **k: sizes.append(logits.numel()) or real(logits, *a, **k))
    head_cross_entropy(torch.randn(100, 4, requires_grad=True), torch.randn(50, 4), torch.zeros(100, dtype=torch.long))
    assert max(sizes) <= 1000 and sum(sizes) == 5000


def poisoned(at, what="loss"):
    """A loss that is NaN, or has NaN gradients, in the micro-batch that holds sample `at`."""
    def loss(model, batch):
        bad = (batch["x"] == at).any()
        value = model(batch["x"]).sum() / 10
        if what == "loss":
            return value * torch.where(bad, math.nan, 1.0)
        if bad:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value
    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_not_applied_and_stops_the_run(tmp_path, what):
    model = torch.nn.Linear(1, 1, bias=False)
    args = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1, optim="sgd", save_strategy="steps", save_steps=1, data_seed=42)
    said = r"update 10: .* is not finite; it was not applied. Last good checkpoint: checkpoint-9"
    with pytest.raises(UsageError, match=said) as error:
        run_training(args, poisoned(7, what), model=model, train_set=Numbers(10))        # sample 7 is the last of the order
    assert error.value.exit_code == 4 and rows(tmp_path)[-1]["nan_steps"] == 1
    assert torch.isfinite(model.weight).all() and list_checkpoints(tmp_path)[0] == 9


def test_updates_that_are_not_finite_can_be_skipped_counted_and_do_not_advance_the_schedule(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    run = run_training(arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1, optim="sgd", on_nonfinite="skip", logging_steps=1),
                       poisoned(6), model=model, train_set=Numbers(10))      # the second of the order
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert [row.get("nan_steps", 0) for row in logged] == [0, 1] + [0] * 8 and math.isnan(logged[1]["loss"])
    assert (run.state.nan_steps, run.state.skipped_steps, run.state.global_step) == (1, 1, 10)
    assert [row["learning_rate"] for row in logged] == pytest.approx([1e-2 * (1 - s / 10) for s in (0, 1, 1, 2, 3, 4, 5, 6, 7, 8)])
    assert math.isfinite(rows(tmp_path)[-1]["train_loss"])


def test_train_loss_is_the_mean_of_the_finite_losses_even_if_a_gradient_was_not(tmp_path):
    def ten(model, batch):
        value = 10.0 + 0 * model(batch["x"]).sum()
        if batch["x"].item() % 2:
            value.register_hook(lambda gradient: gradient * math.nan)
        return value
    run = run_training(arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1, on_nonfinite="skip"), ten,
                       model=torch.nn.Linear(1, 1, bias=False), train_set=Numbers(10))
    assert run.state.nan_steps == 5 and rows(tmp_path)[-1]["train_loss"] == pytest.approx(10.0)


def test_an_fp16_overflow_that_no_scale_cures_stops_the_run(tmp_path):
    def hopeless(model, batch):
        value = compute_loss(model, batch)
        value.register_hook(lambda gradient: gradient * math.nan)
        return value
    with pytest.raises(UsageError, match="update 18: the gradient norm is not finite") as error:     # 2**16 halved 17 times is below 1
        run_training(arguments(tmp_path, fp16=True, max_steps=100), hopeless)
    assert error.value.exit_code == 4


def test_too_many_in_a_row_stop_the_run_all_the_same(tmp_path):
    def always(model, batch):
        return linear_loss(model, batch) * math.nan
    with pytest.raises(UsageError, match="update 4: the loss of rank 0 is not finite, 4 times in a row"):
        run_training(arguments(tmp_path, max_steps=9, on_nonfinite="skip", max_nonfinite=3), always, model=torch.nn.Linear(1, 1, bias=False),
                     train_set=Numbers(30))


def poisoned_on_a_rank(output_dir, at):
    model = torch.nn.Linear(1, 1, bias=False)
    args = arguments(output_dir, num_train_epochs=1, per_device_train_batch_size=1)
    try:
        run_training(args, poisoned(at), model=model, train_set=Numbers(10))
    except UsageError as error:
        return str(error).split(" is not")[0], error.exit_code, torch.isfinite(model.weight).all().item()
    return None


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_it(ranks, tmp_path):
    # order 2, 6, 1, 8, 4, 5, ...: sample 8 is rank 1's second
    assert ranks.run(2, poisoned_on_a_rank, tmp_path, 8) == [("update 2: the loss of rank 1", 4, True)] * 2


def overflowing(output_dir, bad_rank):
    """fp16 with an infinite gradient on one rank at the first update."""
    calls = []

    def loss(model, batch):
        import os
        calls.append(1)
        value = compute_loss(model, batch)
        if len(calls) == 1 and int(os.environ.get("RANK", "0")) == bad_rank:
            value = value + (value - value.detach()) * 1e38      # the same loss, a gradient beyond float32 once it is scaled
        return value
    args = arguments(output_dir, fp16=True, max_steps=4, per_device_train_batch_size=2)
    with toy_run(args) as (run, loader, _):
        start = flat(run)
        train(run, loader, None, loss)
    return run.state.skipped_steps, run.precision.scaler.get_scale(), [row["learning_rate"] for row in rows(output_dir) if "loss" in row], \
        flat(run).tolist(), (flat(run) != start).any()


def test_an_fp16_overflow_on_one_rank_skips_the_update_on_all_and_does_not_advance_the_schedule(ranks, tmp_path):
    for world_size, bad_rank in ((1, 0), (2, 1)):
        first, *others = ranks.run(world_size, overflowing, tmp_path / str(world_size), bad_rank)
        skipped, scale, learning_rates, _, moved = first
        assert skipped == 1 and scale == 2.0**15 and moved
        assert learning_rates == pytest.approx([1e-2, 1e-2, 7.5e-3, 5e-3])        # T - 1 long
        for other in others:
            assert other == first
        assert [row.get("skipped_steps", 0) for row in rows(tmp_path / str(world_size)) if "loss" in row] == [1, 0, 0, 0]


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_16_bit_training_follows_float32(tmp_path, flag):
    losses_of = {}
    for name, changes in (("fp32", {}), (flag, {flag: True})):
        run = run_training(arguments(tmp_path / name, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=4, **changes),
                           train_set=sequences(16))
        assert all(w.dtype == np.float32 for w in weights(run).values())
        losses_of[name] = rows(tmp_path / name)[-1]["train_loss"]
    assert losses_of[flag] == pytest.approx(losses_of["fp32"], rel=0.02) and losses_of[flag] != losses_of["fp32"]


def test_fp16_weights_are_refused_by_name_before_the_first_update(tmp_path):
    model = gpt()
    model.blocks[1].up.half()
    with pytest.raises(UsageError, match="blocks.1.up.weight is float16"), toy_run(arguments(tmp_path, fp16=True), model=model):
        pass


def test_full_16_bit_evaluation_casts_the_weights_and_puts_them_back(tmp_path):
    seen = []

    def loss(model, batch):
        seen.append(next(model.parameters()).dtype)
        return compute_loss(model, batch)
    args = arguments(tmp_path, max_steps=1, bf16_full_eval=True, eval_strategy="steps")
    with toy_run(args, eval_set=sequences(2)) as (run, loader, eval_loader):
        before = flat(run)
        evaluate(run, eval_loader, loss)
        assert (flat(run) == before).all()
        train(run, loader, eval_loader, loss)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]     # outside training, training, evaluation inside it


def test_neftune_adds_its_noise_in_training_only(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 64))
    with torch.no_grad():
        model[0].weight.zero_()
    args = arguments(tmp_path, neftune_noise_alpha=5.0)
    with toy_run(args, model=model, train_set=[{"x": torch.zeros(16, dtype=torch.long)}]):
        noise = model(torch.zeros(4, 16, dtype=torch.long))
        size = 5 / math.sqrt(16 * 64)
        assert size * 0.95 < noise.abs().max() <= size and abs(noise.mean()) < size / 20
        model.eval()
        assert (model(torch.zeros(4, 16, dtype=torch.long)) == 0).all()


def test_activation_checkpointing_computes_twice_and_changes_no_bit_even_with_dropout(tmp_path):
    for name, value, times in (("off", False, 1), ("on", True, 2)):
        calls, model = [], gpt(dropout=0.2)
        model.blocks[0].up.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run_training(arguments(tmp_path / name, max_steps=3, activation_checkpointing=value, save_strategy="steps"), model=model)
        assert len(calls) == 3 * times
    first, second = ((tmp_path / name / "checkpoint-3" / "model.safetensors").read_bytes() for name in ("off", "on"))
    assert first == second


@pytest.mark.parametrize("world_size", [1, 2])
def test_compiling_changes_nothing_but_rounding_and_no_name_in_a_file(ranks, tmp_path, world_size):
    plain, *_ = ranks.run(world_size, compiled, tmp_path / "plain", False)
    for names, losses_ in ranks.run(world_size, compiled, tmp_path / "compiled", True):
        assert names == plain[0] and not any("_orig_mod" in name or "module." in name for name in names)
        assert losses_ == pytest.approx(plain[1], abs=1e-5)


def compiled(output_dir, on):
    """Names in the checkpoint and losses; graphs are captured, and run by torch's own kernels since C++ takes long to compile."""
    from safetensors import safe_open
    extra = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if on else {}
    args = arguments(output_dir, max_steps=3, save_strategy="steps", **extra)
    run_training(args, model=gpt(), train_set=sequences(12))
    with safe_open(output_dir / "checkpoint-3" / "model.safetensors", "pt") as file:
        return sorted(file.keys()), [row["loss"] for row in rows(output_dir) if "loss" in row]


def test_label_smoothing_reaches_the_built_in_model(tmp_path):
    model = build_model(TrainArgs(label_smoothing_factor=0.1, n_layer=1, n_embd=16, block_size=8, vocab_size=17))
    batch = {key: torch.stack([s[key] for s in sequences(3)]) for key in ("input_ids", "labels")}
    expected = cross_entropy(model(batch["input_ids"]), batch["labels"], 0.1)
    torch.testing.assert_close(compute_loss(model, batch), expected)
    assert abs(expected - cross_entropy(model(batch["input_ids"]), batch["labels"])) > 0.1


def test_ema_is_the_average_it_says_is_evaluated_and_saved(tmp_path):
    from safetensors.numpy import load_file
    args = arguments(tmp_path, max_steps=3, ema_decay=0.5, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=3)
    with toy_run(args, eval_set=sequences(3)) as (run, loader, eval_loader):
        start = weights(run)
        train(run, loader, eval_loader, compute_loss)
        expected = start
        for step in (1, 2, 3):
            now = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
            expected = {n: 0.5 * w + 0.5 * now[n] for n, w in expected.items()}
        saved = load_file(tmp_path / "checkpoint-3" / "ema-0.safetensors")
        for name, value in expected.items():
            np.testing.assert_allclose(saved[name], value, rtol=0, atol=1e-6)
        evaluated = next(row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row)
        run.ema, averages = None, {part.name: part.piece for part in run.ema.parts}
        plain = evaluate(run, eval_loader, compute_loss)["eval_loss"]
        for name, p in run.model.named_parameters():
            p.data = averages[name]
        assert evaluated == pytest.approx(evaluate(run, eval_loader, compute_loss)["eval_loss"], abs=1e-9) and evaluated != plain


def test_running_out_of_memory_says_what_to_try(tmp_path):
    def huge(model, batch):
        return torch.empty(2**60).sum() + compute_loss(model, batch)
    with pytest.raises(UsageError, match=r"(?s)micro-batches of 2 samples and accumulation 3.*--per_device_train_batch_size 1 "
                                         r"--gradient_accumulation_steps 6.*--activation_checkpointing"):
        run_training(arguments(tmp_path, gradient_accumulation_steps=3), huge)


def test_an_auxiliary_loss_is_weighted_like_the_items_of_its_micro_batch(tmp_path):
    """A penalty on the weights, once per micro-batch, is the same update however unequal the micro-batches are."""
    def with_penalty(model, batch):
        return compute_loss(model, batch) + 0.5 * model.head.weight.square().sum() * (batch["labels"] != -100).sum()
    results = [flat(run_training(arguments(tmp_path / f"{b}", max_steps=1, optim="sgd", per_device_train_batch_size=b, learning_rate=0.1,
                                           gradient_accumulation_steps=8 // b, max_grad_norm=0), with_penalty, model=gpt(dtype=torch.float64)))
               for b in (8, 1)]
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong, said", [(lambda model, batch: {"loss": 1}, "a dict"), (lambda model, batch: batch["x"], r"a tensor of shape \(2, 1\)")])
def test_a_loss_that_is_not_one_number_is_a_clear_error(tmp_path, wrong, said):
    with pytest.raises(UsageError, match=f"the loss function returned {said}; expected one number"):
        run_training(arguments(tmp_path), wrong, model=torch.nn.Linear(1, 1), train_set=Numbers(4))


def test_tf32_sets_torchs_precision():
    try:
        for flag, expected in ((True, "tf32"), (False, "ieee")):
            Precision(torch.device("cpu"), tf32=flag)
            assert torch.backends.fp32_precision == expected
    finally:
        torch.backends.fp32_precision = "none"


RESUMED = {"fp16": {"fp16": True}, "ema": {"ema_decay": 0.9}, "adafactor": {"optim": "adafactor"}, "lion": {"optim": "lion"}, "muon": {"optim": "muon"},
           "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"}, "neftune": {"neftune_noise_alpha": 5.0},
           "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "factor": 0.5},
                       "eval_strategy": "steps", "eval_steps": 1},
           "wsd": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}}}


def test_a_lowered_loss_scale_survives_a_resume(tmp_path):
    def loss(model, batch):
        value = compute_loss(model, batch)
        if not (tmp_path / "whole" / "checkpoint-1").exists():     # the first update overflows
            value.register_hook(lambda gradient: gradient * math.inf)
        return value
    settings = {"fp16": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = run_training(arguments(tmp_path / "whole", **settings), loss)
    part = run_training(arguments(tmp_path / "part", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", **settings), loss)
    assert part.precision.state_dict() == whole.precision.state_dict() and part.precision.scaler.get_scale() == 2.0**15
    assert (flat(part) == flat(whole)).all()


def averages(run) -> list[torch.Tensor]:
    return [part.piece for part in run.ema.parts]


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "lion"])
def test_bfloat16_models_resume_bit_for_bit_and_average_in_float32(tmp_path, optim):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": optim, "ema_decay": 0.99}
    whole = run_training(arguments(tmp_path / "whole", **settings), model=gpt(dtype=torch.bfloat16))
    part = run_training(arguments(tmp_path / "part", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3", **settings),
                        model=gpt(dtype=torch.bfloat16))
    for a, b in zip(whole.model.parameters(), part.model.parameters()):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(averages(whole), averages(part)))


def test_another_optimizer_cannot_take_over_a_state(tmp_path):
    run_training(arguments(tmp_path, max_steps=1, save_strategy="steps"))
    with pytest.raises(UsageError, match="holds the state of AdamW, and this run trains with Lion") as error:
        run_training(arguments(tmp_path, max_steps=2, optim="lion", resume_from_checkpoint="True"))
    assert error.value.exit_code == 3


def test_label_smoothing_is_refused_for_a_model_that_would_not_see_it(tmp_path):
    with pytest.raises(UsageError, match="--label_smoothing_factor is for the built-in model"):
        run_training(arguments(tmp_path, label_smoothing_factor=0.1), linear_loss, model=torch.nn.Linear(1, 1), train_set=Numbers(2))


@pytest.mark.parametrize("name", RESUMED)
def test_everything_that_decides_the_numbers_survives_a_resume(tmp_path, name):
    def finish(output_dir, resume=None):
        args = arguments(output_dir, max_steps=6, save_strategy="steps", save_steps=3, resume_from_checkpoint=resume, learning_rate=1e-3,
                         **RESUMED[name])
        run_training(args, model=gpt(dropout=0.1), eval_set=sequences(2))
        return [(path.name, path.read_bytes()) for path in sorted((output_dir / "checkpoint-6").glob("*.safetensors"))], \
            [(row["loss"], row["learning_rate"]) for row in rows(output_dir) if "loss" in row]
    whole = finish(tmp_path / "whole")
    assert finish(tmp_path / "part", str(tmp_path / "whole" / "checkpoint-3")) == whole
    if name == "plateau":
        assert len({rate for _, rate in whole[1]}) > 3
