"""What a checkpoint says to other libraries: adapter_config.json, which PEFT reads, and what from_pretrained of transformers wants."""
from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
from dataclasses import asdict
from types import NoneType

from torch import nn

from adapters import Lora, is_transposed, lora_of, matches
from state import UsageError
from storage import PLAIN_NAME, FilePlan, plan_json, read_json, reading

# by the end of the name of a transformers class; for others PEFT would look for a classifier in the file
PEFT_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
# what says nothing about the numbers, or, as fan_in_fan_out, is seen from the layers
PEFT_ONLY = {"peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "init_lora_weights",
             "fan_in_fan_out", "megatron_core", "qalora_group_size"}


def plan_foreign(model: nn.Module, processing_class, base: str | None) -> dict[str, FilePlan]:
    """What from_pretrained wants beside the weights: the configuration of a transformers model, or of adapters, and the files of a
    tokenizer. base: the name of the model under the adapters, if it does not know it itself."""
    lora, transformers = lora_of(model), sys.modules.get("transformers")       # if the model is one of its own, it has been imported
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        if lora is not None:
            files["adapter_config.json"] = plan_json(lora_to_peft(lora, model, getattr(model, "name_or_path", base)))
        elif transformers is not None and isinstance(model, transformers.PreTrainedModel):
            config = copy.deepcopy(model.config)        # as save_pretrained of the model completes it; fully_shard has put a class in front
            config.architectures = [next(cls.__name__ for cls in type(model).__mro__ if not hasattr(cls, "reshard"))]
            config.dtype = model.dtype
            config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        return files | {name: read_plan(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


def read_plan(path: str) -> FilePlan:
    """A small file as it is."""
    if not os.path.isfile(path) or os.path.islink(path) or not PLAIN_NAME.fullmatch(os.path.basename(path)):
        raise UsageError(f"{path}: a checkpoint holds only plain files, of names of letters, digits, and _.-; of a processing_class too")
    with open(path, "rb") as file:
        content = file.read()
    return FilePlan(content, len(content), [])


def lora_from_peft(path: str) -> Lora:
    """The settings in the adapter_config.json of a folder. UsageError if it asks for what is not here, such as DoRA."""
    with reading(path, "adapter_config.json"):
        config = read_json(path, "adapter_config.json")
        if config["peft_type"] != "LORA":
            raise ValueError(f"it is of type {config['peft_type']!r:.50}, and LORA is all that is known here")
        known = {key: value for key, value in config.items() if key in Lora.__dataclass_fields__}
        if strange := [f"{key}={value!r:.50}" for key, value in config.items()
                       if key not in {*known, *PEFT_ONLY} and not (value is None or value is False or value in ({}, [], ""))]:
            raise ValueError(f"these settings are not known here: {', '.join(strange)}")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError("it was started from a changed base (init_lora_weights): convert it by PEFT first")
        lora, names = Lora(**known), (list, NoneType)
        fits = type(lora.r) is int and lora.r > 0 and type(lora.lora_alpha) in (int, float) and type(lora.use_rslora) is bool \
            and type(lora.lora_dropout) in (int, float) and 0 <= lora.lora_dropout < 1 and lora.bias in ("none", "all", "lora_only") \
            and isinstance(lora.target_modules, (list, str)) and isinstance(lora.modules_to_save, names) \
            and all(isinstance(name, str) for name in (*lora.target_modules, *(lora.modules_to_save or ())))
        if not fits:
            raise ValueError(f"impossible values: {known!r:.300}")
        return lora


def lora_to_peft(lora: Lora, model: nn.Module, base: str | None) -> dict:
    """What adapter_config.json holds. Layers are named by the ends of their names, if these ends mean no other layers."""
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    targets: list[str] | str = sorted({name.rpartition(".")[2] for name in names})
    if [name for name, _ in model.named_modules() if matches(name, targets)] != names:
        targets = "|".join(map(re.escape, names))
    task = next((task for end, task in PEFT_TASKS.items() if any(cls.__name__.endswith(end) for cls in type(model).__mro__)), None)
    return {**asdict(lora), "target_modules": targets, "peft_type": "LORA", "base_model_name_or_path": base, "task_type": task,
            "fan_in_fan_out": any(is_transposed(model.get_submodule(name)) for name in names), "inference_mode": True, "init_lora_weights": True}
