"""A model card says what the run has written down, and what is sent to the hub is what was saved."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

import train
from data import Data
from evalloop import likeliest
from rundir import checksum
from state import UsageError
from tests.hub import Hub
from tests.toy import arguments, as_program, gpt, rows, run_training, sequences
from tools.metrics import Accuracy
from tools.publish import main

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "0123456789" * 3
FLAGS = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "0.02", "--max_steps", "4", "--warmup_steps", "1",
         "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "--do_train", "--do_eval"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that ended with the weights of its best update, which is not the last."""
    folder = tmp_path_factory.mktemp("published") / "run"
    train.main(["--output_dir", str(folder), *FLAGS, "--metric_for_best_model", "accuracy", "--greater_is_better", "False"],
               lambda args: Data(sequences(8), sequences(4), "toy"), lambda args: gpt(), compute_metrics=Accuracy(), preprocess_logits_for_metrics=likeliest)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())["state"]


def cells(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line.startswith("| ") and "---" not in line]


def change(checkpoint: Path, name: str, **values) -> None:
    """Puts other values into a JSON file of a checkpoint, or makes one, as somebody could who knows the format."""
    content = json.loads((checkpoint / name).read_text()) if (checkpoint / name).exists() else {}
    (checkpoint / name).write_text(json.dumps(content | values))
    sign(checkpoint)


def sign(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                         for path in checkpoint.iterdir() if path.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))


def test_the_numbers_of_a_card_are_those_of_the_run(run, capsys):
    main(["card", str(run)])
    card = (run / "README.md").read_text()
    assert capsys.readouterr().out == f"{run}/README.md: the card of {run}/checkpoint-4\n"
    logged, title, *lines = rows(run), *cells(card)
    evaluated = [next(row for row in logged if row["step"] == step and "eval_loss" in row) for step in (1, 2, 3, 4)]
    losses = {row["step"]: row["loss"] for row in logged if "loss" in row}
    assert title == ["Training Loss", "Epoch", "Step", "Validation Loss", "Accuracy", "Baseline"]
    assert lines == [[f"{losses[row['step']]:.6g}", f"{row['epoch']:.6g}", str(row["step"]), 
                      *(f"{row[f'eval_{name}']:.6g}" for name in ("loss", "accuracy", "baseline"))] for row in evaluated]
    for line in ("- learning_rate: 0.02", "- train_batch_size: 2", "- eval_batch_size: 8", "- gradient_accumulation_steps: 2", "- total_train_batch_size: 4",
                 "- num_devices: 1", "- seed: 42", r"- optimizer: adamw\_torch\_fused (AdamW) with betas=(0.9,0.999) and epsilon=1e-08", "- lr_scheduler_type: linear",
                 "- lr_scheduler_warmup_steps: 1", "- training_steps: 4", "- strategy: ddp", f"- PyTorch {torch.__version__}", "- Python 3."):
        assert f"\n{line}" in card, line
    assert f"A model of {sum(p.numel() for p in gpt().parameters()):,} parameters (float32), as it was after update 4, epoch 2" in card
    assert "transformers" not in card and "Bert" not in card and "mixed_precision" not in card


def test_results_of_the_end_are_on_the_card_of_the_weights_that_the_run_ended_with(run):
    best = state(run / "checkpoint-4")["best_saved_step"]
    assert best < 4
    for argv, step, ends in (([str(run), "--best"], best, True), ([str(run)], 4, False), ([str(run / f"checkpoint-{best}")], best, True)):
        main(["card", *argv])
        card = (run / "README.md").read_text()
        results = json.loads((run / "eval_results.json").read_text())
        assert f"as it was after update {step}, " in card and len(cells(card)) == 1 + step     # evaluations of later updates are not its own
        assert (f"\n- eval\\_loss: {results['eval_loss']:.6g}\n" in card) == ("\n- train\\_loss: " in card) == ends
    (run / "eval_results.json").write_text(json.dumps(results | {"epoch": 1.25}))       # of neither the end nor the best: another evaluation
    main(["card", str(run), "--best"])
    assert "\n- train\\_loss: " in (run / "README.md").read_text() and "\n- eval\\_loss: " not in (run / "README.md").read_text()
    with pytest.raises(UsageError, match="--best: .*/checkpoint-4 is no run"):
        main(["card", str(run / "checkpoint-4"), "--best"])


def test_the_hub_can_read_a_card(run):
    main(["card", str(run), "--license", "mit", "--datasets", "owner/words", "--task", "text-generation", "--tags", "tiny: # 'x'"])
    card = huggingface_hub.ModelCard.load(run / "README.md")
    last = next(row for row in rows(run) if row["step"] == 4 and "eval_loss" in row)
    assert card.data.to_dict() == huggingface_hub.metadata_load(run / "README.md")
    assert {key: card.data[key] for key in ("library_name", "license", "datasets", "metrics", "tags", "pipeline_tag", "model_name")} == {
        "library_name": "pytorch", "license": "mit", "datasets": ["owner/words"], "metrics": ["accuracy"],
        "tags": ["generated_from_trainer", "tiny: # 'x'"], "pipeline_tag": "text-generation", "model_name": "run"}
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"accuracy": last["eval_accuracy"], "loss": last["eval_loss"]}
    assert {(result.task_type, result.dataset_type) for result in card.data.eval_results} == {("text-generation", "owner/words")}
    assert not {"language", "base_model"} & card.data.to_dict().keys()
    main(["card", str(run), "--task", "text-generation"])      # results of nobody knows what data are none
    assert huggingface_hub.metadata_load(run / "README.md") == {
        "library_name": "pytorch", "pipeline_tag": "text-generation", "tags": ["generated_from_trainer"], "metrics": ["accuracy"]}


def test_names_are_the_hubs_or_are_left_out(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for model, data, there in (("owner/base-1", "owner/words", True), ("local", "words.txt", False), (str(tmp_path / "local"), "a/b/*.jsonl", False)):
        change(run / "checkpoint-4", "args.json", model_name_or_path=model, dataset=data)
        main(["card", str(run)])
        front, card = huggingface_hub.metadata_load(run / "README.md"), (run / "README.md").read_text()
        assert [front.get("base_model"), front.get("datasets")] == ([model, [data]] if there else [None, None])
        assert (model in card) == (data in card) == there and ("\n- datasets " in card)
    change(run / "checkpoint-4", "args.json", dataset="words", eval_dataset="mine.txt")
    main(["card", str(run), "--task", "text-generation"])      # it was evaluated on something else
    assert "model-index" not in huggingface_hub.metadata_load(run / "README.md")


def test_settings_are_those_that_the_run_went_by(run):
    def settings() -> str:
        main(["card", str(run)])
        return (run / "README.md").read_text()
    change(run / "checkpoint-4", "args.json", bf16=True, max_steps=-1, num_train_epochs=2.5, per_device_train_batch_size=3, lr_scheduler_kwargs={"a": 1})
    change(run / "checkpoint-4", "state.json", world_size=5)
    for line in ("mixed_precision_training: bf16", "num_epochs: 2.5", "num_devices: 5", "total_train_batch_size: 30", "lr_scheduler_kwargs: {'a': 1}"):
        assert f"\n- {line}\n" in settings(), line
    assert "training_steps" not in settings()
    for optim, kind, said in (("sgd", "SGD", "sgd (SGD)"), ("lion", "Lion", "lion (Lion) with betas=(0.9,0.999)"), ("adamw_torch", "Lamb", "Lamb"),
                              ("muon", "MuonAdamW", "muon (MuonAdamW) with betas=(0.9,0.999) and epsilon=1e-08 and optimizer\\_args=a=1")):
        change(run / "checkpoint-4", "args.json", optim=optim, optim_args="a=1" if optim == "muon" else None)
        change(run / "checkpoint-4", "state.json", optimizer={"class": kind, "evaluates": False, "extra": None})
        assert f"\n- optimizer: {said}\n" in settings().replace("optimizer_args", "optimizer\\_args"), said


def test_without_evaluations_the_last_loss_is_told(tmp_path):
    for name, strategy in (("logged", "steps"), ("silent", "no")):
        run_training(arguments(tmp_path / name, max_steps=3, save_strategy="steps", logging_steps=2, logging_strategy=strategy))
        main(["card", str(tmp_path / name)])
    *_, loss = [row for row in rows(tmp_path / "logged") if "loss" in row]
    assert cells((tmp_path / "logged" / "README.md").read_text()) == [["Training Loss", "Epoch", "Step"], [f"{loss['loss']:.6g}", f"{loss['epoch']:.6g}", str(loss["step"])]]
    assert "\nNothing was logged.\n" in (tmp_path / "silent" / "README.md").read_text()


def test_the_library_is_told_by_what_lies_beside_the_weights(run):
    checkpoint, said = run / "checkpoint-4", f"A model of {sum(p.numel() for p in gpt().parameters()):,} parameters"
    change(checkpoint, "config.json", model_type="gpt")
    main(["card", str(run)])
    assert huggingface_hub.metadata_load(run / "README.md")["library_name"] == "transformers"
    assert f"{said} (float32)" in (run / "README.md").read_text() and "\n- transformers " in (run / "README.md").read_text()
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    change(checkpoint, "adapter_config.json", peft_type="LORA")
    main(["card", str(run)])
    assert huggingface_hub.metadata_load(run / "README.md")["library_name"] == "peft" and f"{said} in its adapter" in (run / "README.md").read_text()


def test_an_edited_card_is_kept(run):
    readme = run / "README.md"
    main(["card", str(run)])
    main(["card", str(run), "--license", "mit"])        # one that was written here is replaced
    written = readme.read_text()
    assert "license: mit" in written
    for edited in (written.replace("Step", "step"), written + " ", written.replace("license: mit", "license: gpl"), "mine\n", written.replace("\n", "\r\n")):
        readme.write_bytes(edited.encode())
        with pytest.raises(UsageError, match="edited by a person.*--overwrite"):
            main(["card", str(run)])
        assert readme.read_bytes() == edited.encode()
    main(["card", str(run), "--license", "mit", "--overwrite"])
    assert readme.read_text() == written
    for step, argv in ((3, [str(run / "checkpoint-3")]), (4, [str(run / "checkpoint-4")])):
        (run / "token").write_text(TOKEN)
        other = str(run / f"checkpoint-{7 - step}")
        main(["card", *argv, "--overwrite"])
        with pytest.raises(UsageError, match=f"README.md is the card of update {step}, and {other} is another"):
            main(["push", other, "me/model", "--token_file", str(run / "token")])
    (run / "secret").write_text(written)
    readme.unlink()
    readme.symlink_to(run / "secret")
    with pytest.raises(UsageError, match="README.md cannot be used: it is not a plain file"):
        main(["card", str(run)])


def test_averaged_weights_have_the_figures_and_are_not_what_is_sent(tmp_path):
    for decay in (None, 0.5):
        folder = tmp_path / f"run{decay}"
        run_training(arguments(folder, max_steps=2, save_strategy="steps", ema_decay=decay, eval_strategy="steps"), eval_set=sequences(2))
        main(["card", str(folder), "--task", "text-generation", "--datasets", "words"])
        assert ("averaged weights" in (folder / "README.md").read_text()) == (decay is not None)
        assert ("model-index" in huggingface_hub.metadata_load(folder / "README.md")) == (decay is None)


EVIL = "a\n---\n| <script>x</script> [y](z) `q` **b** -->: é\x1b"


def test_what_a_stranger_wrote_stays_text(run):
    main(["card", str(run)])
    plain = (run / "README.md").read_text()
    change(run / "checkpoint-4", "args.json", lr_scheduler_type=EVIL, strategy=EVIL, model_name_or_path=EVIL, dataset=EVIL, optim_args=EVIL)
    log = [row | {f"eval_{EVIL}": EVIL} if "eval_loss" in row else row for row in rows(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    main(["card", str(run)])
    card = (run / "README.md").read_text()
    assert card.isascii() and card.isprintable() is False and "\x1b" not in card
    assert huggingface_hub.metadata_load(run / "README.md") == {"library_name": "pytorch", "tags": ["generated_from_trainer"], "metrics": ["accuracy"]}
    assert len(card.splitlines()) == len(plain.splitlines()) + 1        # the version of datasets: a line came by no other way
    for raw in ("<script", "[y]", "`q", "**b", "| <"):
        assert raw not in card.replace("\\[", "").replace("\\<", "").replace("\\`", "").replace("\\*", ""), raw
    assert {line.replace("\\|", "").count("|") for line in card.splitlines() if line.startswith("|")} == {8}
    for name, values in (("args.json", {"per_device_train_batch_size": "8"}), ("args.json", {"dataset": 3}), ("state.json", {"world_size": 2.5})):
        change(run / "checkpoint-4", name, **values)
        with pytest.raises(UsageError, match=f"checkpoint-4/{name} cannot be used") as error:
            main(["card", str(run)])
        assert error.value.exit_code == 3


def test_only_an_undamaged_checkpoint_is_published(run):
    weights = run / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (run / "token").write_text(TOKEN)
    for argv in (["card", str(run)], ["push", str(run), "me/model", "--token_file", str(run / "token")]):
        with pytest.raises(UsageError, match="model.safetensors cannot be used: its content is not what was saved"):
            main(argv)
    assert not (run / "README.md").exists()


# -- sending: huggingface_hub decides when it is imported whether it may use the network, so another process does it

DRIVER = """
import json, os, sys
from state import UsageError
from tools.publish import main
for os.environ["HF_TOKEN"], argv in json.loads(sys.argv[1]):
    try:
        main(["push", *argv])
        print("RESULT", json.dumps([0, ""]))
    except UsageError as error:
        print("RESULT", json.dumps([error.exit_code, str(error)]))
"""
SAID = {     # by the repository that was asked for: exit code, and a part of the message
    "me/model": (0, ""), "me/whole": (0, ""), "me/empty": (0, ""), "me/again": (0, ""),
    "me/full": (2, "me/full holds 3 files already (LICENSE, README.md, model-0"), "me/public": (2, "me/public is public"),
    "me/ignoring": (2, "me/ignoring has not taken model.safetensors: does its .gitignore"),
    "expired/model": (2, "the hub answers 401, so says the hub: the token is not valid"),
    "foreign/model": (2, "the hub answers 403, so says the hub: the token may not write there"),
    "nobody/model": (2, "the hub answers 404, so says the hub: there is no such owner"), "broken/model": (1, "the hub answers 418, so says the hub: try again later"),
    "silent/model": (1, "silent/model: sending failed (RemoteProtocolError: "), "me/-x-": (1, "check the network and OWNER/NAME"),
    "alone": (2, "expected OWNER/NAME"), "me/none": (2, "no token: log in"), "me/odd": (2, "the token holds a space"),
    "me/a": (2, "none cannot be read: No such file"), "me/b": (2, "no token in"), "me/c": (2, "the token holds a space")}
NEEDED = ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "generation_config.json", "model.safetensors"]
OLD = {"LICENSE": b"text", "model-00001-of-00002.safetensors": b"old", "README.md": b"old"}


def child(command: list, url: str, home: Path) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, env={
        **kept, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"})


@pytest.fixture(scope="module")
def pushed(trained, tmp_path_factory):
    """(folder of the runs, hub, repository -> exit code and message) after every push of SAID, by one process."""
    folder = tmp_path_factory.mktemp("pushed")
    run, edited = (Path(shutil.copytree(trained, folder / name)) for name in ("run", "edited"))
    (edited / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    for name in (*NEEDED[:-1], "notes.json"):
        change(run / "checkpoint-4", name, about=name)
    for name, text in (("another", "hf_another\n"), ("empty", "\n"), ("two", f"{TOKEN}\n{TOKEN}\n")):
        (folder / name).write_text(text)
    more = {"me/model": ["--private"], "me/whole": ["--everything", "--revision", "v1/a", "--token_file", str(folder / "another")], "me/public": ["--private"],
            "me/again": ["--overwrite"], "me/ignoring": ["--overwrite"], "me/a": ["--token_file", str(folder / "none")],
            "me/b": ["--token_file", str(folder / "empty")], "me/c": ["--token_file", str(folder / "two")]}
    tokens = {"me/none": "", "me/odd": f"{TOKEN} x"}
    lines = [[tokens.get(name, TOKEN), [str(edited if name == "me/again" else run), name, *more.get(name, [])]] for name in SAID]
    with Hub() as hub:
        for name, files in (("me/full", OLD), ("me/again", OLD), ("me/ignoring", {".gitignore": b"model.safetensors"}), ("me/public", {}), ("me/empty", {})):
            hub.add(name, files)
        done = child(["-c", DRIVER, json.dumps(lines)], hub.url, folder / "home")
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(lines) and TOKEN not in done.stdout + done.stderr, done.stderr.replace(TOKEN, "the token")
    return folder, hub, dict(zip(SAID, results))


def test_the_hub_gets_the_files_that_were_saved(pushed):
    folder, hub, _ = pushed
    saved = {path.name: path.read_bytes() for path in (folder / "run" / "checkpoint-4").iterdir()}
    card = {"README.md": (folder / "run" / "README.md").read_bytes()}
    sent, whole = hub.repositories["me/model"], hub.repositories["me/whole"]
    attributes = {".gitattributes": sent["branches"]["main"][".gitattributes"]}
    assert sent["branches"] == {"main": {**{name: saved[name] for name in NEEDED}, **card, **attributes}} and sent["private"]
    assert whole["branches"] == {"main": attributes, "v1/a": {**saved, **card, **attributes}} and not whole["private"]
    assert [len(each["commits"]) for each in (sent, whole)] == [1, 1] and sent["commits"][0]["summary"] == "Add checkpoint-4"


def test_the_token_goes_only_into_the_header_that_is_for_it(pushed):
    folder, hub, _ = pushed
    tokens = set()
    for method, path, headers, body in hub.requests:
        authorization = {key.lower(): value for key, value in headers.items()}.get("authorization")
        others = repr([path, {key: value for key, value in headers.items() if key.lower() != "authorization"}, body])
        assert TOKEN not in others and "hf_another" not in others
        assert (authorization is None) == (method == "PUT"), path        # the store of large files gets none
        tokens.add(authorization)
    assert tokens == {None, f"Bearer {TOKEN}", "Bearer hf_another"}
    assert [path.name for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == ["two"]      # as it was given


def test_what_stands_on_the_hub_is_replaced_only_on_demand(pushed):
    folder, hub, results = pushed
    assert "--overwrite" in results["me/full"][1]
    assert [len(hub.repositories[name]["commits"]) for name in ("me/full", "me/public", "me/empty")] == [0, 0, 1]
    files = hub.repositories["me/again"]["branches"]["main"]
    assert files.keys() == {".gitattributes", "LICENSE", "README.md", "model.safetensors"}      # not the old weights beside the new
    assert files["README.md"] == (folder / "edited" / "README.md").read_bytes() == b"---\nlicense: mit\n---\nmine\n"


def test_what_the_hub_refuses_is_one_message_that_says_what_to_do(pushed, monkeypatch):
    folder, hub, results = pushed
    for name, (code, said) in SAID.items():
        found_code, found = results[name]
        assert found_code == code and said in found and bool(said) == bool(found) and "\n" not in found and TOKEN not in found, (name, found)
    assert {name for name in hub.repositories if not name.startswith("me/")} == set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, told = as_program("tools.publish", "push", folder / "run", "me/model")       # this process is off line (conftest.py)
    assert code == 2 and told.startswith("error: me/model cannot be reached: HF_HUB_OFFLINE") and told.count("\n") == 1, told
