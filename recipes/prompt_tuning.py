"""Tune a prompt of a language model, which is only asked for outputs, to tell classes of texts
apart.

With no arguments, eight virtual tokens after the text teach SmolLM2-135M-Instruct whether a movie
review is good, without a backward pass. With a connection, any causal language model and data set
of the Hub take their place:

    python recipes/prompt_tuning.py --domain products --compare backprop
    python recipes/prompt_tuning.py --label_head True  # beside the words' logits
    python recipes/prompt_tuning.py --objective accuracy
    python recipes/prompt_tuning.py --engine onnx-int8
    python recipes/prompt_tuning.py --engine vllm --adapter lora
    python recipes/prompt_tuning.py --engine vllm --domain sums  # a reward of generated answers
    python recipes/prompt_tuning.py --model Qwen/Qwen2.5-0.5B-Instruct \\
        --domain cornell-movie-review-data/rotten_tomatoes
    python recipes/prompt_tuning.py recipes/prompt_tuning.yaml --seed 1

It ends with a table (report.md, results.json), a picture (report.png) and the adapters.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, set_seed

# also when hf_flops is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes import common, engines, prompts, runs, sums
from recipes.common import option
from recipes.prompt_methods import METHODS, OBJECTIVES, trainer_for
from recipes.prompt_report import PromptOutcome, report


@dataclass
class RecipeArguments(common.Recipe):
    """What is tuned on what, and what it is compared with."""

    model: str | None = option(None, "Hub id or folder; default: the embedded SmolLM2.")
    domain: str = option(
        "movies",
        f"{', '.join(prompts.DOMAINS)} (embedded), or a Hub id with columns text, label; 'sums': a "
        "reward for right numbers, in words of its own, by --engine vllm or torch.",
    )
    template: str = option("{text} It was", "How a text is put; the answer comes at its end.")
    chat: bool = option(False, "Put the text as a user's message, in the model's chat template.")
    label_words: list[str] = option(
        [" terrible", " great"], "One token for each class, in their order."
    )
    adapter: str = option(
        "suffix",
        "A prompt after the text (cheapest) or before it, a prefix, or LoRA.",
        prompts.ADAPTERS,
    )
    label_head: bool | None = option(
        None,
        "Train a head that starts as the label words; by default where there is no --engine "
        "and the objective is the loss. True: each method runs without it too.",
    )
    virtual_tokens: int = option(8, "Length of the prompt or prefix.", least=1)
    init_text: str | None = option(
        " All in all, the movie was just", "A prompt's start; empty: random tokens."
    )
    lora_rank: int = option(2, "Rank of LoRA on queries and values.", least=1)
    per_class: int = option(0, "Training texts per class, 0 for all.", least=0)
    test_texts: int = option(500, "Held-out texts that are reported on.", least=1)
    validation_texts: int = option(128, "Held-out texts for the learning curve.", least=0)
    text_tokens: int = option(48, "Tokens of a text that are kept.", least=1)
    objective: str = option("loss", "'accuracy' and 'macro_f1' have no gradient.", OBJECTIVES)
    engine: str | None = option(
        None,
        "A black box that runs the model, for a suffix, a prompt or vLLM's LoRA.",
        engines.ENGINES,
    )
    engine_url: str | None = option(
        None, "A running vLLM server, without /v1; default: one is started. Key: VLLM_API_KEY."
    )
    engine_model: str = option("small", "What that server calls the model.")
    compare: list[str] = option([], "'backprop' runs beside it with the same prompt and rows.")
    dtype: str = option("float32", "The model's numbers.", ("float32", "bfloat16"))


@dataclass
class RecipeTrainingArguments(common.RecipeDefaults):
    """Training arguments with defaults for this recipe; rate and scale depend on the objective."""

    output_dir: str | None = "outputs/prompt_tuning"
    max_steps: int = 80
    queries_per_sample: int | str | None = 24
    perturbation_scale: float | str | None = option(
        None, "Default: 1e-2; for metrics 0.1, near the embeddings' size."
    )
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    adam_beta2: float = 0.99
    eval_strategy: str = "steps"
    eval_steps: float = 20
    logging_steps: float = 10


parse = partial(common.parse, [RecipeArguments, RecipeTrainingArguments], __doc__, METHODS)


def lines_of(recipe: Any, args: Any) -> dict[str, Any]:
    """Return the recipe of each of a method's lines, by what the line's name ends in."""
    if recipe.label_head is None:
        if recipe.engine and args.process_index == 0:
            print(f"--engine {recipe.engine} has no head: the label words' logits are read.")
        return {"": replace(recipe, label_head=not recipe.engine and recipe.objective == "loss")}
    if not recipe.label_head or args.resume_from_checkpoint:
        return {"": recipe}
    return {"": recipe, "-words": replace(recipe, label_head=False)}


def run(
    method: str, recipe: Any, args: Any, task: Any, known: Any = None, ending: str = ""
) -> tuple[PromptOutcome, Any]:
    """Measure, tune with one method and measure again; a known outcome has the same model and first
    prompt.
    """
    with args.main_process_first(), common.usable(f"--model {recipe.model or '(SmolLM2)'}"):
        base, tokenizer = prompts.load_model(recipe.model, recipe.dtype)
    rewarded = recipe.domain == sums.DOMAIN
    words = None if rewarded else prompts.label_tokens(tokenizer, recipe.label_words, task.classes)
    template = prompts.Template(tokenizer, recipe.template, recipe.text_tokens, recipe.chat)
    recipe = replace(recipe, virtual_tokens=len(template.tail)) if rewarded else recipe
    collate = DataCollatorWithPadding(tokenizer)
    data = {
        part: template.rows(getattr(task, part), tail=recipe.adapter != "suffix")
        for part in prompts.PARTS
    }
    name = method + ending
    folder, args = args.output_dir, runs.method_arguments(args, name)
    if not known and not rewarded:
        asked, plain = template.rows(task.test, tail=True), prompts.WordClassifier(base, words)
        before = runs.accuracy_of(plain, args, prompts.by_length(asked), collate)
    set_seed(args.seed)
    model = engines.adapter_of(recipe, folder, base, template, words)
    sets = {"train_dataset": data["train"], "eval_dataset": prompts.by_length(data["validation"])}
    trainer = trainer_for(method, model, args, recipe, data_collator=collate, **sets)
    test = prompts.by_length(data["test"])
    if known:
        before, start = known.before, known.start
    elif rewarded:  # the adapter starts as the model is
        before = start = runs.tested(trainer, test)
    else:
        start = runs.accuracy_of(model, args, test, collate)
    found = runs.train(trainer, args.resume_from_checkpoint)
    after = runs.tested(trainer, test)
    if args.process_index == 0:
        getattr(model, "save_pretrained", trainer.save_model)(args.output_dir)
        runs.write_card(trainer, task.name)
    return PromptOutcome(
        method=name, before=before, start=start, after=after, texts=len(test), **found
    ), trainer


def main(arguments: list[str] | None = None) -> list[PromptOutcome]:
    """Tune with forward passes, and by the methods that this is compared with."""
    recipe, args = parse(arguments)
    methods, found = runs.begin(args, ["flops", *recipe.compare]), []
    common.reach_hub(recipe, "model")
    engines.check(recipe)
    recipe = sums.settings(recipe) if recipe.domain == sums.DOMAIN else recipe
    with args.main_process_first(), common.usable(f"--domain {recipe.domain}"):
        task = prompts.load_task(recipe, args.seed)
    with engines.running(recipe, args.output_dir) as recipe:
        lines = lines_of(recipe, args)
        for method in runs.announced(methods, args, task):
            for ending, own in lines.items():
                known = found[0] if found else None
                found.append(run(method, own, args, task, known, ending)[0])
    if args.process_index == 0:
        report(lines[""], args, task, found)
    return found


if __name__ == "__main__":
    common.start(main)
