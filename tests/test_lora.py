"""Low-rank adapters: they start at nothing, are all that is trained and saved, and are those of PEFT."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import Lora, add_lora, remove_lora
from checkpoint import load_model, model_weights
from data import Data
from distributed import whole
from model import GPT, build_model
from state import UsageError
from tests.toy import arguments, gpt, rows, sequences, train_and
from tools.convert import main as convert
from tools.formats import lora_from_peft, lora_to_peft
from train import main
from world import set_seed
from zero import plain

SETTINGS = {"lora_rank": 2, "lora_alpha": 8.0, "max_steps": 6}


def bert(dtype=torch.float64):
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                                    max_position_embeddings=16, num_labels=3, initializer_range=0.3)).to(dtype).eval()


def gpt2(dtype=torch.float64):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).to(dtype).eval()


def llama(dtype=torch.float64):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3)).to(dtype).eval()


IDS = torch.arange(24).view(3, 8) % 20


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(IDS % 17)
    return getattr(found, "logits", found)


def stir(model, seed: int = 1) -> None:
    """Gives what would be trained any values, as if it had been."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("build", [gpt, bert, gpt2, llama])
def test_adapters_start_exactly_at_the_model_and_merge_into_it(build):
    model = build(dtype=torch.float32)
    before, names = outputs(model), set(dict(model.named_parameters()))
    add_lora(model, Lora(r=3, lora_alpha=6, lora_dropout=0.5))
    assert torch.equal(outputs(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(dict(model.named_parameters())) - names
    stir(model)
    adapted = outputs(model)
    assert (adapted - before).abs().max() > 1e-2
    remove_lora(model)
    assert set(dict(model.named_parameters())) == names
    torch.testing.assert_close(outputs(model), adapted, rtol=0, atol=1e-5)


CASES = [(bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}), (bert, {"target_modules": r".*\.layer\.1\..*dense", "bias": "all"}),
         (bert, {"target_modules": ["query", "intermediate.dense"], "bias": "lora_only", "use_rslora": True}),
         (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}), (llama, {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}),
         (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]})]


@pytest.mark.parametrize("build, settings", CASES)
def test_peft_gives_the_same_outputs_with_our_adapters(build, settings, tmp_path):
    from peft import PeftModel
    ours = build()
    add_lora(ours, Lora(r=2, lora_alpha=5, **settings))
    stir(ours)
    save_file({name: tensor.detach().contiguous() for name, tensor in model_weights(ours).items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_to_peft(ours.lora, ours, None)))
    theirs = PeftModel.from_pretrained(build(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(outputs(theirs), outputs(ours), rtol=0, atol=1e-12)
    assert (outputs(build()) - outputs(ours)).abs().max() > 1e-2


@pytest.mark.parametrize("build, settings", CASES)
def test_peft_s_adapters_give_the_same_outputs_and_gradients_here(build, settings, tmp_path):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(build(), LoraConfig(r=2, lora_alpha=5, **settings), autocast_adapter_dtype=False)
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = build()
    add_lora(ours, lora_from_peft(tmp_path))
    assert load_model(ours, tmp_path) == (set(), [])
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=0, atol=1e-12)
    for model in (ours, theirs):
        model(IDS % 17).logits.square().sum().backward()
    grads = {name.removeprefix("base_model.model.").replace("base_layer.", "").replace(".default", "").replace("modules_to_save.", ""): p.grad
             for name, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    assert grads.keys() == {name for name, p in ours.named_parameters() if p.requires_grad and p.grad is not None}
    for name, grad in grads.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, rtol=0, atol=1e-10)


def adapted_run(output_dir, strategy="ddp", resume=None, model=None, dropout=0.0, **changes):
    """(all weights that are not quantized, rows of the history)"""
    args = arguments(output_dir, **{**SETTINGS, "resume_from_checkpoint": resume, "gradient_accumulation_steps": 2, "save_strategy": "steps",
                                    "save_steps": 2, "strategy": strategy, **changes})
    model = (model or gpt)(**{"dropout": dropout} if dropout else {}, dtype=torch.float64)
    return train_and(args, float_weights, model=model, train_set=sequences(11))


def float_weights(run) -> dict[str, np.ndarray]:
    return {name: whole(p).numpy().copy() for name, p in run.model.named_parameters() if len(plain(p)) == 1 and type(getattr(p, "_local_tensor", p)).__name__ != "NF4Tensor"}


def test_only_adapters_are_trained_and_saved(tmp_path):
    trained = adapted_run(tmp_path / "run", lora_modules_to_save="1.mlp_norm")
    base = {name: p.detach().numpy() for name, p in gpt(dtype=torch.float64).named_parameters()}
    assert all(np.array_equal(trained[name], value) == (name != "blocks.1.mlp_norm.weight") for name, value in base.items())
    saved = load_file(tmp_path / "run/checkpoint-6/adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved} == (trained.keys() - base.keys()) | {"blocks.1.mlp_norm.weight"}
    assert not (tmp_path / "run/checkpoint-6/model.safetensors").exists()
    optimizer = load_file(tmp_path / "run/checkpoint-6/optimizer-0.safetensors")
    assert {name.rpartition(".")[0] for name in optimizer} == {name.removeprefix("base_model.model.") for name in saved}


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp"])
def test_adapters_train_and_resume_the_same_under_every_strategy(strategy, ranks, tmp_path):
    """2 ranks go on from a checkpoint of one process, and one process from theirs."""
    alone = adapted_run(tmp_path / "alone", per_device_train_batch_size=4)
    two = ranks.run(2, adapted_run, tmp_path / "two", strategy, str(tmp_path / "alone/checkpoint-2"))[0]
    back = adapted_run(tmp_path / "back", "ddp", str(tmp_path / "two/checkpoint-4"), per_device_train_batch_size=4)
    for name, value in alone.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-11)
        np.testing.assert_allclose(back[name], value, rtol=0, atol=1e-11)


def test_resuming_adapters_is_bit_identical(tmp_path):
    changes = {"dropout": 0.2, "lora_dropout": 0.3, "lora_bias": "all", "ema_decay": 0.9, "optim": "adamw_torch"}
    whole_run = adapted_run(tmp_path / "run", **changes)
    again = adapted_run(tmp_path / "again", resume=str(tmp_path / "run/checkpoint-4"), **changes)
    assert all(np.array_equal(again[name], value) for name, value in whole_run.items())


def wide(dtype=torch.float32):
    """Matrices that 4-bit blocks and two ranks divide."""
    set_seed(0)
    model = GPT(17, 8, n_layer=2, n_head=2, n_embd=64)
    for block in model.blocks:
        nn.init.normal_(block.attn.out.weight, std=0.2)
        nn.init.normal_(block.down.weight, std=0.2)
    return model.float()


@pytest.mark.parametrize("base, strategy", [("nf4", "ddp"), ("nf4", "zero1"), ("nf4", "zero2"), ("nf4", "fsdp"), ("int8", "ddp"), ("int8", "zero2")])
def test_adapters_on_a_quantized_base_train_the_same_on_two_ranks(base, strategy, ranks, tmp_path):
    changes = {"lora_base": base, "check_replicas": 1, "optim": "sgd"}
    plain_base = adapted_run(tmp_path / "plain", model=wide, per_device_train_batch_size=4, **{**changes, "lora_base": "float"})
    alone = adapted_run(tmp_path / "alone", model=wide, per_device_train_batch_size=4, **changes)
    two = ranks.run(2, adapted_run_with, tmp_path / "two", strategy, None, wide, changes)[0]
    assert alone.keys() == two.keys() < plain_base.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=2e-6)
    differences = [np.abs(alone[name] - plain_base[name]).max() for name in alone if name.endswith("lora_B.weight")]
    assert max(differences) > 1e-6      # the base is another one


def adapted_run_with(output_dir, strategy, resume, model, changes):
    return adapted_run(output_dir, strategy, resume, model, **changes)


def test_a_quantized_base_takes_a_fraction_of_the_memory():
    sizes = {}
    for base in ("float", "nf4", "int8"):
        model = wide()
        add_lora(model, Lora(r=2, lora_alpha=2), base)
        sizes[base] = sum(part.nbytes for block in model.blocks for name, p in block.named_parameters() if "lora" not in name and "norm" not in name
                          for part in plain(p))
    assert sizes["nf4"] < 0.15 * sizes["float"] and sizes["int8"] < 0.28 * sizes["float"]


def mistake(output_dir, model=gpt, strategy="ddp", **changes) -> str:
    try:
        adapted_run(output_dir, strategy, model=model, **changes)
    except UsageError as error:
        return str(error)
    return "none"


def test_a_base_that_cannot_be_cut_is_refused_by_name_under_fsdp(ranks, tmp_path):
    messages = ranks.run(2, refused_on_ranks, tmp_path / "int8")
    assert all("blocks.0.attn.qkv.weight is quantized (Int8Tensor) and cannot be cut for 2 ranks" in message and "zero2" in message for message in messages)


def refused_on_ranks(output_dir):
    return mistake(output_dir, wide, "fsdp", lora_base="int8")


def refused_on_three(output_dir):
    return mistake(output_dir, wide, "fsdp", lora_base="nf4")


def test_4_bits_that_three_ranks_cannot_cut_are_refused_by_name(ranks, tmp_path):
    messages = ranks.run(3, refused_on_three, tmp_path / "nf4")
    assert all("blocks.0.attn.out.weight is quantized (NF4Tensor) and cannot be cut for 3 ranks" in message for message in messages)


def build_whole(args):
    """A model out of files, as from_pretrained gives it: never on the meta device."""
    model = gpt(dtype=torch.float64)
    assert not model.head.weight.is_meta
    return model


def through_main(output_dir, strategy, build=build_whole, *flags):
    """Losses of a run of main() itself."""
    samples = sequences(11)
    main(["--output_dir", str(output_dir), "--strategy", strategy, "--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
          "--save_steps", "4", "--disable_tqdm", "--use_cpu", *flags], build_data=lambda args: Data(samples, samples[:3], "numbers"), build_model=build)
    return [row["loss"] for row in rows(output_dir) if "loss" in row]


@pytest.mark.parametrize("flags", [(), ("--lora_rank", "2")])
def test_a_model_that_is_loaded_is_sharded_too(flags, ranks, tmp_path):
    ddp, fsdp = (ranks.run(2, through_main, tmp_path / strategy, strategy, build_whole, *flags)[0] for strategy in ("ddp", "fsdp"))
    np.testing.assert_allclose(fsdp, ddp, rtol=0, atol=1e-11)


SHAPE = ("--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "8", "--vocab_size", "17")


def test_adapters_start_from_the_same_base_under_every_strategy_drawn_or_saved(ranks, tmp_path):
    for name, flags in (("drawn", ()), ("saved", ("--model_name_or_path", str(tmp_path / "base/checkpoint-4")))):
        if name == "saved":
            ranks.run(2, through_main, tmp_path / "base", "ddp", build_model, *SHAPE)
        ddp, fsdp = (ranks.run(2, through_main, tmp_path / name / strategy, strategy, build_model, *SHAPE, "--lora_rank", "2", *flags)[0] for strategy in ("ddp", "fsdp"))
        np.testing.assert_allclose(fsdp, ddp, rtol=0, atol=1e-5)


def test_an_adapter_is_evaluated_at_its_scale_and_on_its_base_or_not_at_all(tmp_path):
    through_main(tmp_path / "base", "ddp", build_model, *SHAPE)
    base = ("--model_name_or_path", str(tmp_path / "base/checkpoint-4"))
    lora = ("--lora_rank", "2", "--lora_alpha", "64")
    run = ["--output_dir", str(tmp_path / "run"), *SHAPE, "--use_cpu", "--do_eval"]
    through_main(tmp_path / "run", "ddp", build_model, *SHAPE, *base, *lora)
    samples = sequences(11)

    def evaluated(*flags):
        return main([*run, *flags], build_data=lambda args: Data(samples, samples, "numbers"))
    assert evaluated(*base, *lora).state.global_step == 4
    with pytest.raises(UsageError, match="the scale 32 .* and this run's is 1"):
        evaluated(*base, "--lora_rank", "2")
    with pytest.raises(UsageError, match="of a run with --model_name_or_path"):
        evaluated(*lora)


class WithStatistics(nn.Module):
    lora = None     # a name of its own

    def __init__(self):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([nn.Linear(4, 4)]), nn.BatchNorm1d(4)


def test_statistics_that_an_adapter_would_not_keep_are_refused():
    with pytest.raises(UsageError, match="norm is a BatchNorm.*--lora_modules_to_save norm"):
        add_lora(WithStatistics(), Lora(r=2, lora_alpha=2, target_modules=["0"]))
    model = WithStatistics()
    add_lora(model, Lora(r=2, lora_alpha=2, target_modules=["0"], modules_to_save=["norm"]))
    assert "base_model.model.norm.running_var" in model_weights(model)
    model = WithStatistics()
    model.lora = nn.Linear(1, 1)
    assert "lora.weight" in model_weights(model)


def test_a_head_that_shares_its_weight_is_not_trained_as_a_whole():
    with pytest.raises(UsageError, match="lm_head shares a weight with another module"):
        add_lora(gpt2(), Lora(r=2, lora_alpha=2, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("changes, said", [
    ({"lora_target_modules": "up,no_such"}, "no module has a name that ends in no_such"),
    ({"lora_target_modules": "no_such"}, "no module has a name that ends in no_such; its linear layers are called down, head, out, qkv, up"),
    ({"lora_target_modules": "(up"}, "it is no regular expression"),
    ({"lora_target_modules": "head"}, "head, which is not called in the forward pass"),
    ({"lora_target_modules": "embed"}, "embed, which is a Embedding, and adapters are for linear layers"),
    ({"lora_modules_to_save": "classifier"}, "no module with a name that ends in classifier"),
    ({"lora_base": "nf4", "lora_target_modules": r"blocks\.0\.(up|attn\.qkv)", "model": lambda dtype: odd()}, "no multiple of 64"),
    ({"lora_rank": None}, "--lora_alpha: it needs --lora_rank"),
    ({"lora_rank": None, "lora_alpha": None, "lora_base": "nf4"}, "for weights that adapters leave frozen"),
    ({"lora_adapter": "x"}, "the settings of --lora_adapter are in its adapter_config.json")])
def test_mistakes_are_one_message(changes, said, tmp_path):
    assert said in mistake(tmp_path / "run", **changes)


def odd():
    return GPT(17, 8, n_layer=1, n_head=1, n_embd=18)


def test_a_head_that_shares_its_weight_gets_no_adapter():
    with pytest.raises(UsageError, match="lm_head, which shares its weight with another layer"):
        add_lora(gpt2(), Lora(r=2, lora_alpha=2, target_modules=["lm_head"]))


@pytest.mark.parametrize("setting, said", [({"use_dora": True}, "use_dora=True"), ({"rank_pattern": {"q": 4}}, "rank_pattern"), ({"peft_type": "IA3"}, "IA3"),
                                           ({"r": "4"}, "impossible values"), ({"lora_dropout": 5}, "impossible values"), ({"modules_to_save": "head"}, "impossible values"),
                                           ({"use_rslora": "no"}, "impossible values"), ({"layers_to_transform": 0}, "layers_to_transform=0"), ({"init_lora_weights": "pissa"}, "changed base"), ({"r": None}, "impossible values")])
def test_an_adapter_of_another_kind_is_refused_by_what_is_unknown(setting, said, tmp_path):
    model = gpt()
    add_lora(model, Lora(r=2, lora_alpha=2))
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_to_peft(model.lora, model, None) | setting))
    with pytest.raises(UsageError, match=said):
        lora_from_peft(str(tmp_path))


def test_training_starts_from_an_adapter_with_its_settings(tmp_path):
    first = adapted_run(tmp_path / "first", use_rslora=True, lora_target_modules="attn.qkv")
    changes = {"lora_rank": None, "lora_alpha": None, "lora_adapter": str(tmp_path / "first/checkpoint-6"), "learning_rate": 0.0}
    second = adapted_run(tmp_path / "second", **changes)
    assert first.keys() == second.keys() and all(np.array_equal(second[name], value) for name, value in first.items())
    config = [json.loads((tmp_path / name / "checkpoint-6/adapter_config.json").read_text()) for name in ("first", "second")]
    assert config[0] == config[1] and config[0]["target_modules"] == ["qkv"]


def test_whole_weights_and_adapters_are_told_apart(tmp_path):
    adapted_run(tmp_path / "adapters")
    with pytest.raises(UsageError, match="holds adapters, which PEFT"):
        convert(["to-hf", str(tmp_path / "adapters/checkpoint-6"), str(tmp_path / "theirs")])
    adapted_run(tmp_path / "whole", lora_rank=None, lora_alpha=None)
    allow = {"allow_change": "lora_rank,lora_alpha"}
    assert "holds adapters: give" in mistake(tmp_path / "a", resume=str(tmp_path / "adapters/checkpoint-4"), lora_rank=None, lora_alpha=None, **allow)
    assert "holds whole weights: to train" in mistake(tmp_path / "b", resume=str(tmp_path / "whole/checkpoint-4"), **allow)
    assert "lora_rank" in mistake(tmp_path / "c", resume=str(tmp_path / "adapters/checkpoint-4"), lora_rank=3)
