"""The command line: HF's names and defaults, and one clear message for everything wrong with it."""
import argparse
import dataclasses
from pathlib import Path

import pytest

from args import TrainArgs, check_args, parse_args
from state import UsageError
from tools.renamed import REMOVED


def problems(*argv) -> str:
    with pytest.raises(UsageError) as error:
        parse_args(list(argv))
    assert error.value.exit_code == 2
    return str(error.value)


def test_without_flags_the_defaults_are_those_of_the_hf_trainer():
    from transformers import TrainingArguments
    theirs = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    args = parse_args([])
    shared = [f.name for f in dataclasses.fields(args) if f.name in theirs]
    assert len(shared) > 30
    different = set()
    for name in shared:
        default = theirs[name].default if theirs[name].default is not dataclasses.MISSING else theirs[name].default_factory()
        if getattr(args, name) != (getattr(default, "value", default)):
            different.add(name)
    # theirs None means trainer_output, and no activation checkpointing; theirs False is worked out from the terminal here
    assert different <= {"output_dir", "disable_tqdm", "activation_checkpointing",
                         "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
                         "do_train"}     # None there: what PyTorch does by default


def test_values_are_read_by_type():
    args = parse_args(["--learning_rate", "3e-4", "--max_steps=7", "--data_seed", "None", "--eval_steps", "0.5", "--optim", "sgd",
                       "--output_dir", "a b"])
    assert (args.learning_rate, args.max_steps, args.data_seed, args.eval_steps, args.optim, args.output_dir) == \
        (3e-4, 7, None, 0.5, "sgd", "a b")


def test_booleans_take_no_value_or_true_or_false_and_the_last_of_a_flag_wins():
    assert parse_args(["--use_cpu"]).use_cpu and parse_args(["--use_cpu", "True"]).use_cpu and parse_args(["--use_cpu=true"]).use_cpu
    assert not parse_args(["--use_cpu", "False"]).use_cpu
    assert not parse_args(["--use_cpu", "--use_cpu", "False"]).use_cpu
    assert parse_args(["--max_steps", "3", "--max_steps", "4"]).max_steps == 4
    assert "--use_cpu maybe: expected True or False" in problems("--use_cpu", "maybe")


@pytest.mark.parametrize("flag, meant", [("learning_rat", "learning_rate"), ("max_step", "max_steps"), ("seeed", "seed"), ("output-dir", "output_dir")])
def test_prefixes_and_misspelt_flags_are_refused_with_the_nearest_name(flag, meant):
    assert f"--{flag} is not a flag: did you mean --{meant}?" in problems(f"--{flag}", "1")


@pytest.mark.parametrize("flag, hint", [("evaluation_strategy", "--eval_strategy"), ("no_cuda", "--use_cpu"), ("warmup_ratio", "--warmup_steps"),
                                        ("overwrite_output_dir", "--output_dir"), ("logging_nan_inf_filter", "nan_steps"),
                                        ("per_gpu_train_batch_size", "--per_device_train_batch_size"), ("deepspeed", "--strategy zero1, zero2 or fsdp"),
                                        ("fsdp", "--strategy fsdp"), ("fsdp_config", "--reshard_after_forward"), ("save_safetensors", "safetensors")])
def test_removed_flags_are_refused_with_what_replaced_them(flag, hint):
    message = problems(f"--{flag}", "x")
    assert f"--{flag} is not a flag here" in message and hint in message


def test_a_removed_flag_is_never_a_flag_and_its_hint_names_only_flags_that_exist():
    names = TrainArgs().to_dict().keys()
    assert not REMOVED.keys() & names
    for hint in REMOVED.values():
        assert all(word.strip(",;") [2:] in names for word in hint.split() if word.startswith("--"))


@pytest.mark.parametrize("flag, value", [("learning_rate", "nan"), ("learning_rate", "1e999"), ("learning_rate", "-1"), ("learning_rate", "-1e-3"),
                                         ("per_device_train_batch_size", "0"), ("per_device_train_batch_size", "-4"), ("seed", "-1"),
                                         ("gradient_accumulation_steps", "0"), ("num_train_epochs", "-3"), ("max_steps", "9" * 20),
                                         ("max_steps", "-2"), ("dropout", "1"), ("adam_beta1", "-inf"), ("save_total_limit", "0")])
def test_absurd_numbers_are_refused_with_the_allowed_range(flag, value):
    message = problems(f"--{flag}", value)
    assert flag in message and " to " in message, message


@pytest.mark.parametrize("flag, value", [("max_steps", "1.5"), ("max_steps", "many"), ("learning_rate", "fast"), ("optim", "adam"), ("seed", "")])
def test_wrong_types_are_refused_with_what_was_expected(flag, value):
    assert f"--{flag} {value}: expected" in problems(f"--{flag}", value)


def test_a_flag_without_its_value_and_a_stray_word_are_refused():
    assert "--learning_rate: expected a value" in problems("--learning_rate", "--max_steps", "3")
    assert "'stray'" in problems("stray")
    assert "'words'" in problems("--text_column", "two", "words")


@pytest.mark.parametrize("argv, said", [("--logging_steps 0", "logging_steps=0"), ("--logging_steps 2.5", "whole number"),
                                        ("--save_steps 0", "save_steps=0"), ("--eval_strategy steps --eval_steps 0", "eval_steps=0"),
                                        ("--max_steps 0", "max_steps=0"), ("--num_train_epochs 0", "num_train_epochs"),
                                        ("--n_embd 30 --n_head 4", "n_embd=30"), ("--streaming", "--dataset"),
                                        ("--dataset a.txt --streaming", "--max_steps"), ("--eval_dataset a.txt", "--dataset"),
                                        ("--warmup_steps -1", "warmup_steps=-1"), ("--warmup_steps 2.5", "whole number")])
def test_settings_that_do_not_fit_together_are_refused(argv, said):
    assert said in problems(*argv.split())


def test_all_problems_come_in_one_message():
    message = problems("--learning_rat", "1", "--optim", "adam", "--max_steps", "x", "--per_device_train_batch_size", "0", "stray")
    for part in ("--learning_rat", "--optim adam", "--max_steps x", "per_device_train_batch_size=0", "'stray'"):
        assert part in message


def test_a_bad_value_hides_no_other_problem_and_makes_no_false_one():
    message = problems("--per_device_train_batch_size", "0", "--max_steps", "0", "--n_embd", "30", "--streaming")
    for part in ("per_device_train_batch_size=0", "max_steps=0", "n_embd=30", "--streaming needs --dataset"):
        assert part in message
    assert "--streaming needs" not in problems("--streaming", "--dataset", "x", "--max_steps", "foo")
    assert "eval_steps=0" in problems("--logging_strategy", "no", "--logging_steps", "0", "--eval_strategy", "steps")


def test_paths_and_true_are_taken_as_people_write_them_in_python():
    args = TrainArgs(output_dir=Path("a"), resume_from_checkpoint=True)
    check_args(args)
    assert (args.output_dir, args.resume_from_checkpoint) == ("a", "True")


def test_arguments_made_in_python_are_checked_alike():
    with pytest.raises(UsageError, match=r"(?s)max_steps=2.5.*optim='adam'.*"):
        check_args(TrainArgs(optim="adam", max_steps=2.5))


def test_drop_last_is_not_a_default():
    assert parse_args([]).dataloader_drop_last is False


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in TrainArgs().to_dict())


def test_no_flag_is_a_prefix_of_two_of_torchruns():
    """torchrun reads such a flag as its own, even behind the script's name."""
    from torch.distributed.run import get_args_parser
    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    assert isinstance(get_args_parser(), argparse.ArgumentParser)
    for name in TrainArgs().to_dict():
        assert sum(option.startswith(f"--{name}") for option in theirs) == 0, name


def test_flags_of_a_task_come_before_the_users_and_what_is_to_be_done_is_only_one_of_them():
    args = parse_args(["--max_steps", "7"], "--max_steps 5 --seed 3 --do_train --do_eval")
    assert (args.max_steps, args.seed, args.trains, args.do_eval) == (7, 3, True, True)
    args = parse_args(["--do_predict"], "--max_steps 5 --do_train --do_eval")
    assert (args.max_steps, args.trains, args.do_eval, args.do_predict) == (5, False, False, True)
    assert "leaves nothing to do" in problems("--do_train", "False")


def test_flags_that_a_task_does_not_look_at_are_refused(tmp_path):
    from train import main
    for flags, said in ((["--n_layer", "3", "--dropout", "0.1"], "--n_layer, --dropout: this task has its own model"), (["--dataset", "x.txt"], "--dataset: this task has its own data")):
        with pytest.raises(UsageError, match=said):
            main([*flags, "--output_dir", str(tmp_path)], build_data=lambda args: None, build_model=lambda args: None)
    assert not list(tmp_path.iterdir())
