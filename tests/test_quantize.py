"""What the recipe of quantization loses, saves, loads, trains and refuses, on small GPTs."""
from __future__ import annotations

import json
import random
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from args import parse_args
from callbacks import Callback
from model import GPT
from state import UsageError
from tests.toy import LENGTH, VOCAB, arguments, run_training, sequences

pytest.importorskip("torchao")
from torchao.quantization import quantize_

from recipes.quantize import Aware, after_training, load, quantize_static, run, save, weight_only, widths_of

SMALL = ["--n_layer", "2", "--n_embd", "64", "--block_size", "32", "--max_steps", "60", "--logging_steps", "60", "--warmup_steps", "5"]


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(VOCAB, LENGTH, n_layer=2, n_head=2, n_embd=32)
    for block in model.blocks:      # no layer gives zeros
        torch.nn.init.normal_(block.attn.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model


def logits(model: GPT, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(ids)


def inputs(n: int = 3) -> list[torch.Tensor]:
    return [torch.stack([sample["input_ids"] for sample in sequences(4, seed)]) for seed in range(n)]


def quantized(way: str, model: GPT | None = None) -> GPT:
    model, config = (model or gpt()).requires_grad_(False), after_training()[way]
    if way == "int8-static":
        quantize_static(model, inputs())
    elif config is not None:
        quantize_(model.blocks, config)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, flags, rows) of a run that learns sums, and of another, the second half of which is trained for 2 bits."""
    folder, draw = tmp_path_factory.mktemp("quantize"), random.Random(0)
    lines = [f"{a} and {b} make {a + b}\n" for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(4000))]
    (folder / "sums.txt").write_text("".join(lines))
    flags = [*SMALL, "--dataset", str(folder / "sums.txt"), "--output_dir", str(folder / "run"), "--seed", "1", "--disable_tqdm"]
    return folder / "run", flags, {row["weights"]: row for row in run(["after", "32,2", *flags])}


def test_eight_bits_lose_little_and_fewer_bits_take_less(trained):
    folder, _, rows = trained
    whole = rows["float32"]
    for way in ("int8", "int8-dynamic", "int8-static"):
        assert abs(rows[way]["held-out loss"] - whole["held-out loss"]) < 0.005, way
        assert 3.5 < whole["MB of the blocks"] / rows[way]["MB of the blocks"] < 4
    assert whole["MB of the blocks"] / rows["int4-packed"]["MB of the blocks"] > 6
    others = {round(row["MB"] - row["MB of the blocks"], 2) for way, row in rows.items() if way not in ("bfloat16", "int4-packed")}
    assert len(others) == 1 and others != {0}       # of embedding and head, which stay
    table = (folder / "quantization.md").read_text().splitlines()
    assert json.loads((folder / "quantization.json").read_text()) == [*rows.values()]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [*rows]


def test_training_for_two_bits_loses_less_than_rounding_to_them_afterwards(trained):
    rows = trained[2]
    whole, after, aware, simulated = (rows[way]["held-out loss"] for way in ("float32", "int2", "32,2: int2", "32,2: simulated"))
    assert aware - whole < 0.6 * (after - whole) and after - whole > 0.03
    assert aware == pytest.approx(simulated, abs=1e-4)


def test_a_checkpoint_has_the_rows_of_the_run_that_saved_it_and_its_weights_are_whole(trained):
    folder, flags, rows = trained
    before = (folder / "metrics.jsonl").read_bytes()
    timeless = [{key: value for key, value in row.items() if key != "tokens/s"} for row in rows.values()]
    again = run(["after", "32,2", *flags, "--do_eval"])
    assert [{key: value for key, value in row.items() if key != "tokens/s"} for row in again] == timeless
    assert (folder / "metrics.jsonl").read_bytes() == before
    weight = load_file(folder / "aware-32-2" / "checkpoint-60" / "model.safetensors")["blocks.0.up.weight"]
    assert len(weight[0].unique()) > 32     # in two groups of 32, int2 has 8 values


# ---------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("way", ["int8", "int8-dynamic", "int8-static", "int4", "int2"])
def test_a_loaded_model_gives_the_logits_of_the_saved_one_bit_for_bit(tmp_path, way):
    model = quantized(way)
    save(model, str(tmp_path / "model.safetensors"))
    loaded = load(gpt(seed=1), str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), logits(gpt()))
    assert load_file(tmp_path / "model.safetensors")["blocks.0.up._weight_qdata"].dtype == torch.int8


def test_torchao_cannot_save_what_it_packs(tmp_path):
    """The recipe leaves such a model out; should torchao learn to save it, it need not."""
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        save(quantized("int4-packed", gpt().bfloat16()), str(tmp_path / "model.safetensors"))


def test_only_linear_layers_in_the_blocks_are_quantized():
    whole, model = dict(gpt().named_parameters()), quantized("int8")
    changed = {name for name, p in model.named_parameters() if type(p.data) is not torch.Tensor}
    assert changed == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.out", "up", "down")}
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters() if name not in changed)


# ---------------------------------------------------------------------------------------------------- static int8
def test_inputs_within_what_calibration_saw_are_rounded_by_half_a_step_at_most():
    """A layer with the identity as weights gives its rounded inputs: those seen are near, those far outside are cut off."""
    model = gpt().requires_grad_(False)
    layer, seen = model.blocks[0].attn.qkv, []
    layer.weight.copy_(torch.eye(32).repeat(3, 1))
    with layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])):
        for input_ids in inputs():
            model(input_ids)
    quantize_static(model, inputs())
    low, high = min(x.min() for x in seen), max(x.max() for x in seen)
    step = (high - low) / 255
    for x in seen:
        assert (layer(x)[..., :32] - x).abs().max() <= 0.51 * step + 0.005 * x.abs().max()     # the weight 1 is rounded too
    assert layer(seen[0] * 0 + 10 * high).max() < high + 2 * step


# ---------------------------------------------------------------------------------------------------- training for fewer bits
class Widths(Callback):
    """What the layers round to at each update, and at the end."""

    def __init__(self):
        self.seen = []

    def look(self, model) -> set:
        found = [layer.weight_fake_quantizer for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
        assert len(found) == 8
        return {(each.enabled, each.config.dtype) for each in found}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen += self.look(model)


@pytest.mark.parametrize("widths", [[4], [8, 6, 4], [32, 32, 3, 2]])
def test_widths_take_equal_shares_and_the_model_ends_as_it_was_simulated(tmp_path, widths):
    watch = Widths()
    done = run_training(arguments(tmp_path, max_steps=12), model=gpt(), callbacks=[Aware(widths), watch])
    assert watch.seen == [(bits < 32, getattr(torch, f"int{min(bits, 8)}")) for bits in widths for _ in range(12 // len(widths))]
    assert watch.look(done.model) == {(True, getattr(torch, f"int{widths[-1]}"))}
    simulated, converted = logits(done.model), deepcopy(done.model).requires_grad_(False)
    quantize_(converted.blocks, weight_only(widths[-1], "convert"))
    torch.testing.assert_close(logits(converted), simulated, rtol=0, atol=1e-5)
    plain = gpt()
    plain.load_state_dict(done.model.state_dict())
    assert (logits(plain) - simulated).abs().max() > 1e-2      # rounding shows
    quantize_(plain.blocks, weight_only(widths[-1]))
    assert torch.equal(logits(plain), logits(converted))


def test_a_resumed_run_goes_on_with_the_width_it_was_at(tmp_path):
    common = {"max_steps": 12, "save_strategy": "steps", "save_steps": 8}
    whole = run_training(arguments(tmp_path / "a", **common), model=gpt(), callbacks=[Aware([8, 4, 2])])
    watch = Widths()
    again = run_training(arguments(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"), **common), model=gpt(seed=1),
                         callbacks=[Aware([8, 4, 2]), watch])
    assert watch.seen == [(True, torch.int2)] * 4
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in whole.model.named_parameters())


def test_only_widths_of_32_train_the_same_as_without(tmp_path):
    plain = run_training(arguments(tmp_path / "a", max_steps=6), model=gpt())
    until = run_training(arguments(tmp_path / "b", max_steps=6), model=gpt(), callbacks=[Aware([32, 32, 32, 32, 32, 32, 4])])
    for name, p in plain.model.named_parameters():
        assert torch.equal(p, until.model.get_parameter(name)), name


# ---------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("word, flags, said", [
    ("before", "", "expected after, or bits"), ("4,8", "", "do not rise"), ("9", "", "32 (not rounded) or 8 to 2"), ("1", "", "8 to 2"),
    ("8,", "", "expected after"), ("4,32", "", "not rise"), ("32", "", "not 32 at the end"), ("16", "", "8 to 2"),
    ("8,6,4", "--max_steps 2", "has 3 parts"), ("8,4", "--load_best_model_at_end --eval_strategy steps", "more bits"),
    ("32,4", "--early_stopping_patience 2 --eval_strategy steps", "more bits"), ("4", "--n_embd 48", "--n_embd that it divides"),
    ("after", "--streaming --dataset a.txt --max_steps 9", "leave --streaming away"), ("after", "--bf16_full_eval", "leave --bf16_full_eval"), ("4", "--use_cpu False", "for CPUs")])
def test_mistakes_are_told_before_training(tmp_path, word, flags, said):
    with pytest.raises(UsageError, match="^[^\n]*" + said.replace("(", r"\(").replace(")", r"\)")):
        run([word, *flags.split(), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_data_without_held_out_samples_and_several_ranks_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a few words " * 30)
    with pytest.raises(UsageError, match="give --eval_dataset"):
        run(["after", "--dataset", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "new")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        widths_of("4", parse_args([]))
