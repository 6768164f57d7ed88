"""`hf-flops doctor`: what training would do with a model, a PEFT method and data."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, in_one_line
from .parsers import CommandParser
from .recipes import recipe

TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("c_attn",))
WIDTH = 48  # tokens of a text
LEAST = {"rank": 1, "batch_size": 1, "queries_per_sample": 2, "steps": 2}
SHORT = {
    "DORA": "LORA",
    "PROMPT": "PROMPT_TUNING",
    "PREFIX": "PREFIX_TUNING",
    "LN": "LN_TUNING",
    "P": "P_TUNING",
}
NEEDS = {  # what no option here gives
    "ADALORA": "total_step in its configuration",
    "ADAPTION_PROMPT": "adapter_layers in its configuration",
    "CPT": "cpt_token_ids in its configuration",
    "MULTITASK_PROMPT_TUNING": "task_ids in the data",
    "POLY": "task_ids in the data",
    "TRAINABLE_TOKENS": "token_indices in its configuration",
    "XLORA": "adapters to mix in its configuration",
}


def parser() -> CommandParser:
    """Return what reads the arguments."""
    command = CommandParser(
        prog="hf-flops doctor",
        description="Take a few steps on a copy of an adapter and say, with reasons: which noise "
        "each tensor gets, epsilon, rows per second, memory, signal to noise, and a learning rate "
        "and queries per sample to begin with.",
    )
    command.add_argument(
        "--model",
        default="vit",
        help="vit, minilm, smollm2 (embedded), a folder or a Hub id; default: vit",
    )
    command.add_argument(
        "--peft",
        default="lora",
        help="lora, dora, ia3, vera, prompt, prefix, ln or most other PEFT types; default: lora",
    )
    command.add_argument(
        "--adapter", metavar="DIR", help="a saved adapter, instead of --peft; default: a new one"
    )
    command.add_argument(
        "--data",
        help="images or reviews (embedded), or a Hub id or folder; default: what suits the model",
    )
    command.add_argument(
        "--rank",
        type=int,
        default=8,
        help="rank of LoRA and its kin, or number of virtual tokens; default: %(default)s",
    )
    command.add_argument(
        "--batch_size", type=int, default=32, help="samples of a step; default: %(default)s"
    )
    command.add_argument(
        "--queries_per_sample",
        type=int,
        default=4,
        help="rows of each sample; default: %(default)s",
    )
    command.add_argument(
        "--steps",
        type=int,
        default=32,
        help="of the trial, up to 4 times as many if unclear; default: %(default)s",
    )
    command.add_argument(
        "--minutes",
        type=float,
        help="that the trial may take once the model is loaded; with less time it tells less; "
        "default: 0.75, or 2.5 for a language model; inf: as many as it needs",
    )
    command.add_argument(
        "--json", action="store_true", help="print everything as JSON; default: a table"
    )
    return command


def kind_of(name: str) -> str:
    """Return PEFT's name of a method.

    Raises:
        ConfigurationError: there is no such method, or it needs more than its name.
    """
    from peft import PeftType

    kind = SHORT.get(name.upper(), name.upper())
    if kind not in PeftType.__members__:
        members = [member.lower() for member in PeftType.__members__ if member not in NEEDS]
        raise ConfigurationError(
            f"--peft {name} is no method of the installed PEFT: choose one of "
            f"{', '.join(['dora', 'prompt', 'prefix', 'ln', *members])}."
        )
    if kind in NEEDS:
        raise ConfigurationError(
            f"--peft {name} needs {NEEDS[kind]}: call hf_flops.diagnosis.doctor in Python."
        )
    return kind


def configured(name: str, model: Any, task_type: str | None, rank: int) -> Any:
    """Return PEFT's configuration of a method, with what suits the model.

    Raises:
        ConfigurationError: there is no such method, it needs more than its name, or it is for
            models of text only.
    """
    from peft import PeftType
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = kind_of(name)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    if task_type is None and (kind == "SHADOW" or issubclass(config, PromptLearningConfig)):
        raise ConfigurationError(f"--peft {name} is for models of text.")
    fields: Any = config.__dataclass_fields__
    last = {module.rpartition(".")[2] for module, _ in model.named_modules()}
    targets: Any = next((list(pair) for pair in TARGETS if set(pair) <= last), "all-linear")
    if kind == "LN_TUNING":
        targets = sorted(module for module in last if "norm" in module.lower())
    options: dict[str, Any] = {
        "target_modules": targets,
        "r": rank,
        "num_virtual_tokens": rank,
        "feedforward_modules": [],
    }
    if kind == "OFT":
        del options["r"]
    if name.upper() == "DORA":
        options["use_dora"] = True
    if "classifier" in last and task_type is None:
        options["modules_to_save"] = ["classifier"]
    suitable = {option: value for option, value in options.items() if option in fields}
    return config(task_type=task_type, **suitable)


def images(name: str, data: str | None) -> tuple[Any, Any, Any, None]:
    """Return an image classifier, samples, and what collates them."""
    loader = recipe("images")
    task = loader.load_images("auto" if data in (None, "images") else data)
    model, processor = loader.load_vit(loader.pretrained_vit(task) if name == "vit" else name, task)
    return model, loader.pixel_dataset(task.train, processor), loader.collate, None


def texts(name: str, data: str | None, *, causal: bool) -> tuple[Any, Any, Any, str]:
    """Return a model of texts, samples, what collates them, and PEFT's name for the task."""
    import transformers

    source = "movies" if data in (None, "reviews") else data
    task = recipe("prompts").load_texts(source, validation=0, test=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = []
    for text, label in task.train[:2000]:
        row = tokenizer(text, truncation=True, max_length=WIDTH)
        if not row["input_ids"]:
            raise ConfigurationError(f"text {text!r} has no tokens")
        rows.append({key: row[key] for key in ("input_ids", "attention_mask")} | {"labels": label})
    if causal:
        rows = [{key: row[key] for key in row if key != "labels"} for row in rows]
        collate: Any = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return transformers.AutoModelForCausalLM.from_pretrained(name), rows, collate, "CAUSAL_LM"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=task.classes, ignore_mismatched_sizes=True
    )
    return model, rows, transformers.DataCollatorWithPadding(tokenizer), "SEQ_CLS"


def loaded(name: str, data: str | None) -> tuple[Any, Any, Any, str | None]:
    """Return a model, samples for it, what collates them, and PEFT's name for the task.

    Raises:
        ConfigurationError: there is no such model, or the data cannot be read.
    """
    from transformers import AutoConfig

    try:
        if name == "vit":
            return images(name, data)
        source = getattr(recipe("assets"), name)() if name in ("minilm", "smollm2") else name
        config = AutoConfig.from_pretrained(source)
        if hasattr(config, "image_size"):
            return images(source, data)
        return texts(
            source, data, causal=any("CausalLM" in kind for kind in config.architectures or [])
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"--model {name} with --data {data or 'of its kind'} cannot be loaded: "
            f"{_reason(error)}."
        ) from error


def adapted(options: argparse.Namespace, model: Any, task_type: str | None) -> Any:
    """Return a model with the adapter of --adapter or a new one of --peft.

    Raises:
        ConfigurationError: it does not suit the model.
    """
    from peft import PeftModel

    from ..diagnosis.sandbox import copied

    option = f"--peft {options.peft}" if options.adapter is None else f"--adapter {options.adapter}"
    try:
        if options.adapter is None:
            return copied(model, configured(options.peft, model, task_type, options.rank))
        with warnings.catch_warnings():
            # else they would stay random
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    except (ConfigurationError, ImportError):
        raise
    except Exception as error:  # every method of PEFT has its command
        raise ConfigurationError(
            f"{option} does not suit --model {options.model}: {_reason(error)}."
        ) from error


def _reason(error: Exception) -> str:
    return (
        f"there is no {in_one_line(error)}" if isinstance(error, KeyError) else in_one_line(error)
    )


def main(arguments: list[str] | None = None) -> int:
    """Take the trial's steps and print what they show."""
    options = parser().parse_args(arguments)
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            raise ConfigurationError(
                f"--{name} {getattr(options, name)} is too small: give {least} or more."
            )
    if options.minutes is not None and not options.minutes > 0:
        raise ConfigurationError(f"--minutes {options.minutes:g} is too small: give more than 0.")
    if options.adapter is None:
        kind_of(options.peft)
    elif not Path(options.adapter, "adapter_config.json").is_file():
        raise ConfigurationError(
            f"--adapter {options.adapter} holds no adapter_config.json: name a folder that PEFT "
            "saved."
        )
    import tempfile

    from transformers.utils import logging as transformers_logging

    from ..diagnosis import doctor
    from ..trainer import FlopsTrainingArguments

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, samples, collate, task_type = loaded(options.model, options.data)
    model = adapted(options, model, task_type)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, beside a table
        args = FlopsTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch_size,
            queries_per_sample=options.queries_per_sample,
            report_to="none",
        )
        diagnosis = doctor(
            model,
            samples,
            args=args,
            steps=options.steps,
            minutes=options.minutes or (2.5 if task_type == "CAUSAL_LM" else 0.75),
            bar=sys.stderr.isatty(),
            data_collator=collate,
        )
    print(json.dumps(diagnosis.as_dict(), indent=1) if options.json else diagnosis)
    return 0
