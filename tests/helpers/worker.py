"""A run that tests and benchmarks start with a launcher: trains a tiny model and writes what became
of it.

torchrun --nproc_per_node 2 tests/helpers/worker.py '{"output_dir": "...", "samples": 4}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from accelerate import disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.trainer.checkpoints import last_checkpoint
from tests.helpers.tiny import TASKS, as_dataset, double, tiny_batch, tiny_model


def adapted(
    kind: str, base: torch.nn.Module | None = None, *, prompt: bool = False
) -> torch.nn.Module:
    targets = {"vit": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}[kind]
    saved = ["classifier"] if kind == "vit" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=targets, task_type=TASKS[kind], modules_to_save=saved)
        soft = PromptTuningConfig(num_virtual_tokens=3, task_type=TASKS[kind])
        return get_peft_model(base or tiny_model(kind), soft if prompt else lora)


def loaded(folder: Path, way: str) -> torch.nn.Module:
    """Return a model in float64 that transformers spreads over the processes while it loads it."""
    if torch.distributed.get_rank() == 0:
        tiny_model("llama").double().save_pretrained(folder)
    torch.distributed.barrier()
    config = DistributedConfig(**{way: torch.distributed.get_world_size()})
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float64)


def shard(model: torch.nn.Module, kind: str, *, adapters: bool) -> None:
    """Spread a model's weights over the processes, with its adapters or without."""
    inner = model.get_base_model()
    layers = inner.model.layers if kind == "llama" else inner.vit.layers
    whole = {p for p in model.parameters() if p.requires_grad and not adapters}
    for layer in layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(model, ignored_params=whole)


class Hook(TrainerCallback):
    """Calls a function with the step after every optimizer step."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step)


def build(options: dict[str, Any], act: Any = None) -> FlopsTrainer:
    """Build the trainer of a run: `samples` per optimizer step in all, whatever the number of
    processes.

    Args:
        options: training arguments, and the `kind` of the model, whether it has a soft `prompt` in
            place of LoRA, the `size` of the data and whether all is in float64; "base" or "all" of
            it is `sharded` over the processes, or the base by the option of that name of
            transformers' DistributedConfig; `offload` keeps it on disk.
        act: what is called with the step after every optimizer step.
    """
    options = dict(options)
    spread, on_disk = options.pop("sharded", False), options.pop("offload", False)
    kind, samples, size = (
        options.pop("kind", "vit"),
        options.pop("samples", 4),
        options.pop("size", 22),
    )
    prompt, exact = options.pop("prompt", False), options.pop("double", False)
    batch = double(tiny_batch(kind, size)) if exact else tiny_batch(kind, size)
    args = FlopsTrainingArguments(
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "pictures": False,
            "lora_parts": "both",
            "save_strategy": "no",
            "logging_steps": 1,
            "rows_per_forward": 8,
            "learning_rate": 0.01,
            "queries_per_sample": 4,
            "per_device_train_batch_size": 1,
            **options,
        }
    )
    by_size = str(spread).endswith("size")
    base = loaded(Path(args.output_dir, "base"), spread) if by_size else None
    model = adapted(kind, base, prompt=prompt)
    if exact and not by_size:
        model = model.double()
    if on_disk:
        folder = Path(args.output_dir, "offloaded")
        model = disk_offload(model, folder, execution_device=torch.device("cpu"))
    if spread and not by_size:
        shard(model, kind, adapters=spread == "all")
    whole = args.accelerator_config.split_batches
    parts = args.gradient_accumulation_steps * (1 if whole else args.world_size)
    args.per_device_train_batch_size = samples // parts
    data = [{**row, "sample_id": i} for i, row in enumerate(as_dataset(batch))]
    held_out = data if args.eval_strategy != "no" else None
    return FlopsTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=held_out,
        callbacks=[Hook(act)] if act else None,
    )


def finish(trainer: FlopsTrainer, name: str) -> None:
    """Write the parameters and the log of a finished run."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.process_index == 0:
        state = {
            n: p.detach().contiguous()
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        }
        save_file(state, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


def ending(end: tuple[int, int, int] | None) -> Any:
    """Return what sends a signal to the process of some rank after some step: (signal, rank,
    step).
    """

    def act(step: int) -> None:
        if end is not None and (int(os.environ.get("RANK", 0)), step) == (end[1], end[2]):
            os.kill(os.getpid(), end[0])

    return act


def main() -> None:
    """Run what the command line says, going on from the last checkpoint if there is one and
    `resume` is set.
    """
    for options in json.loads(sys.argv[1]):
        name, resume = options.pop("name", "final"), options.pop("resume", False)
        trainer = build(options, ending(options.pop("end", None)))
        trainer.train(
            resume_from_checkpoint=last_checkpoint(trainer.args.output_dir) if resume else None
        )
        finish(trainer, name)


if __name__ == "__main__":
    main()
