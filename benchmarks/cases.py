"""What speed and memory are measured on: real models with adapters, a batch, and the four ways to
send its rows through.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_flops import BatchPosition, Method, SuffixPromptModel, estimate_gradient
from hf_flops.allocators import Optimal, Uniform
from hf_flops.autotune.first_batch import prepare_tap
from hf_flops.autotune.row_loss_check import choose_objective
from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.base.batch import batch_size, take
from hf_flops.estimators import Antithetic, LogitJacobian, OneSided
from hf_flops.objectives import Objective, TappedLoss
from hf_flops.perturbations import perturb
from hf_flops.reuse import LastLogits, ReusePlan, choose_reuse, with_last_logits
from hf_flops.trainer.preparation import shared_texts, without_cache
from recipes.assets import minilm, sentences, smollm2

QUERIES = 16
SIDES = ("plain", "ours", "mezo", "backprop")


def texts(path: str, samples: int, tokens: int, *, answers: bool) -> dict[str, Tensor]:
    """Tokenize movie reviews to exactly `tokens` tokens each (several in one where they are
    short).
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = sentences()
    joined = [" ".join(text for text, _ in pairs[i * 16 : i * 16 + 16]) for i in range(samples)]
    ids = torch.tensor([tokenizer(text)["input_ids"][:tokens] for text in joined])
    labels = torch.tensor([pairs[i * 16][1] for i in range(samples)])
    if not answers:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    words = torch.tensor(
        [
            tokenizer(word, add_special_tokens=False)["input_ids"][0]
            for word in (" terrible", " great")
        ]
    )
    ids = torch.cat([ids, words[labels][:, None]], 1)
    targets = torch.full_like(ids, -100)
    targets[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}


def lora(
    model: nn.Module, layers: list[int] | None, names: list[str], rank: int = 8, **options: Any
) -> nn.Module:
    """Put LoRA on queries and values, of all layers or of some, with B away from zero as in
    training.
    """
    model = get_peft_model(
        model, LoraConfig(r=rank, target_modules=names, layers_to_transform=layers, **options)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass
class Case:
    """A model, a batch of B samples with 16 rows each, and how many rows go through at a time."""

    name: str
    model: Any
    inputs: dict[str, Tensor]
    chunk: int
    objective: Objective = field(default_factory=TappedLoss)

    @property
    def rows(self) -> int:
        """Rows of a step, the clean ones included."""
        return batch_size(self.inputs) * QUERIES

    def forward(self, inputs: Any) -> tuple[Tensor, Any]:
        """Run the model as the trainer does."""
        outputs = self.model(**without_cache(self.model, dict(inputs)))
        return outputs.loss, outputs

    def plain(self) -> None:
        """Send the same rows through the model, and nothing else."""
        with torch.no_grad(), self.shortened():
            for owner in (
                torch.arange(self.rows).div(QUERIES, rounding_mode="floor").split(self.chunk)
            ):
                self.inference(take(self.inputs, owner))

    def inference(self, rows: dict[str, Tensor]) -> None:
        """Run rows; a suffix prompt's rows go through its base as whole sequences, of which only
        the answer is asked.
        """
        if not isinstance(self.model, SuffixPromptModel):
            self.forward(rows)
            return
        words, prompt = self.model.base.get_input_embeddings(), self.model.prompt.weight
        text = words(rows["input_ids"][:, :-1])
        sequence = torch.cat([text, prompt.expand(len(text), -1, -1)], 1)
        mask = torch.ones(sequence.shape[:2], dtype=torch.long)
        last = torch.tensor([sequence.shape[1] - 1])
        self.model.base(
            inputs_embeds=sequence, attention_mask=mask, use_cache=False, logits_to_keep=last
        )

    def backprop(self) -> None:
        """Forward and backward of the same rows."""
        with self.shortened():
            for owner in (
                torch.arange(self.rows).div(QUERIES, rounding_mode="floor").split(self.chunk)
            ):
                self.forward(take(self.inputs, owner))[0].backward()

    def shortened(self) -> AbstractContextManager[None]:
        """Let everyone take logits where our objective takes them, so that the comparison is about
        the rest.
        """
        return (
            self.objective.installed() if isinstance(self.objective, LastLogits) else nullcontext()
        )

    def methods(self) -> dict[str, Callable[[], None]]:
        """Return what runs a step, for each of `SIDES` and for ours without the control variate;
        checks are done here.
        """
        with torch.no_grad():
            objective, _ = choose_objective(self.forward, self.inputs)
            self.objective = with_last_logits(self.model, objective, self.forward, self.inputs)
            ours = self._ours(self.objective)
        names = [
            name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        ]
        shared = perturb(self.model, shared=names, distribution="gaussian")
        mezo = replace(
            ours,
            perturbation=shared,
            estimator=Antithetic(),
            allocator=Uniform(),
            reuse=ReusePlan(),
            control=None,
        )
        sides = {
            "plain": self.plain,
            "ours": self._step(ours),
            "mezo": self._step(mezo),
            "backprop": self.backprop,
        }
        return (
            sides
            if ours.control is None
            else {**sides, "no control": self._step(replace(ours, control=None))}
        )

    def _ours(self, objective: Objective) -> Method:
        perturbation, notes = choose_perturbation(self.model, objective, self.forward, self.inputs)
        reuse, reason = choose_reuse(self.model, objective, self.forward, self.inputs, perturbation)
        prepare_tap(self.model, objective, self.forward, self.inputs, control=True)
        control = LogitJacobian() if getattr(objective, "logits", False) else None
        for note in [*notes, reason]:
            if note:
                print(f"{self.name}: {note}")
        return Method(
            objective,
            perturbation,
            OneSided(),
            Optimal(),
            QUERIES,
            1e-3,
            self.chunk,
            reuse=reuse,
            control=control,
        )

    def _step(self, method: Method) -> Callable[[], None]:
        steps = count()  # new noise each time, and a control variate that learns, as in training

        def run() -> None:
            start = time.perf_counter()
            with torch.no_grad(), shared_texts(self.model, self.inputs, method.needs_clean):
                # texts that all rows share are a forward, too
                self.seconds += time.perf_counter() - start
                found = estimate_gradient(
                    self.timed, self.inputs, method, BatchPosition(step=next(steps))
                )
                run.rows = found.rows  # type: ignore[attr-defined]

        return run

    seconds = 0.0

    def timed(self, inputs: Any) -> tuple[Tensor, Any]:
        """`forward`, with its time added to `seconds`."""
        start = time.perf_counter()
        try:
            return self.forward(inputs)
        finally:
            self.seconds += time.perf_counter() - start


def minilm_lora(layers: list[int] | None = None) -> Case:
    """MiniLM (22.7M), 16 sentences of 32 tokens, 256 rows."""
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    name = "MiniLM, LoRA in all layers" if layers is None else "MiniLM, LoRA in the last third"
    inputs = texts(minilm(), 16, 32, answers=False)
    return Case(
        name, lora(model, layers, ["query", "value"]), inputs, 64 if layers is None else 128
    )


def vit_lora(layers: list[int] | None = None) -> Case:
    """A ViT of the size of ViT-Tiny (192 wide, 12 layers, 65 tokens; random weights, as speed does
    not depend on them).
    """
    sizes = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 64,
        "patch_size": 8,
    }
    model = ViTForImageClassification(ViTConfig(num_labels=10, **sizes))
    name = "ViT, LoRA in all layers" if layers is None else "ViT, LoRA in the last third"
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(16, 3, 64, 64, generator=generator),
        "labels": torch.arange(16) % 10,
    }
    return Case(
        name, lora(model, layers, ["q_proj", "v_proj"]), inputs, 64 if layers is None else 128
    )


def smollm2_lora(layers: list[int] | None = None) -> Case:
    """SmolLM2-135M, 8 texts of 32 tokens and an answer, 128 rows."""
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    name = "SmolLM2, LoRA in all layers" if layers is None else "SmolLM2, LoRA in the last third"
    model = lora(model, layers, ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Case(name, model, texts(smollm2(), 8, 32, answers=True), 64)


def smollm2_prompt() -> Case:
    """SmolLM2-135M with PEFT's prompt tuning, 8 virtual tokens before 8 texts of 32 tokens, 128
    rows.
    """
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    model = get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
    ).eval()
    return Case("SmolLM2, prompt tuning", model, texts(smollm2(), 8, 32, answers=True), 64)


def smollm2_suffix() -> Case:
    """SmolLM2-135M with 8 virtual tokens behind 2 texts of 128 tokens, 32 rows."""
    model = SuffixPromptModel(
        AutoModelForCausalLM.from_pretrained(smollm2()), num_virtual_tokens=8
    ).eval()
    return Case(
        "SmolLM2, suffix prompt, 128 tokens", model, texts(smollm2(), 2, 128, answers=True), 32
    )


CASES: dict[str, Callable[[], Case]] = {
    "minilm": minilm_lora,
    "minilm-third": lambda: minilm_lora([4, 5]),
    "vit": vit_lora,
    "vit-third": lambda: vit_lora([8, 9, 10, 11]),
    "smollm2": smollm2_lora,
    "smollm2-third": lambda: smollm2_lora(list(range(20, 30))),
    "smollm2-prompt": smollm2_prompt,
    "smollm2-suffix": smollm2_suffix,
}
