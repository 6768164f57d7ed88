"""Sums, a task whose answers a program checks: a model is rewarded for the right number at once."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hf_flops import FlopsTrainer, GeneratedMetric

DOMAIN = "sums"
MOST_TOKENS = 4  # a space, two digits, and what ends the number
NOISE = ((0.1, 3e-2), (3e-2, 1e-2))  # scale and learning rate, for a prompt and for LoRA
ENDING = "?\nA: The sum is"


def texts(most: int = 10) -> list[tuple[str, int]]:
    """Return the sums of two numbers from 1 on, and what they are."""
    return [(f"{a} + {b}", a + b) for a, b in product(range(1, most + 1), repeat=2)]


def settings(recipe: Any) -> Any:
    """Return the prompt recipe with a template of sums, whose end a prompt starts as."""
    asked = {"template": "Q: What is {text}" + ENDING, "init_text": ENDING}
    return replace(recipe, **asked, label_words=[], objective="reward")


def numbers(answers: list[str]) -> Tensor:
    """Return the numbers (R,) that answers start with, 0 for none."""
    found = [re.match(r"\s*(\d{1,2})\b", answer) for answer in answers]
    return torch.tensor([int(match[1]) if match else 0 for match in found])


def reward(answers: list[str], inputs: dict[str, Any]) -> Tensor:
    """Return 1 for each answer that starts with the number in the labels, else 0."""
    return (numbers(answers) == inputs["labels"].cpu()).float()


class SumsTrainer(FlopsTrainer):
    """Trains for the reward of generated answers, and evaluates by the share of right ones."""

    def __init__(self, model: Any, args: Any, tokenizer: Any, **options: Any) -> None:
        objective = GeneratedMetric(reward, tokenizer, max_new_tokens=MOST_TOKENS)
        super().__init__(model, args, objective=objective, **options)
        self.tokenizer = tokenizer

    def prediction_step(self, model: Any, inputs: Any, *options: Any, **others: Any) -> Any:
        """Return the number that each answer starts with, as logits (R, 100)."""
        del options, others
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**rows, max_new_tokens=MOST_TOKENS)
        found = numbers(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return None, torch.nn.functional.one_hot(found, 100).float(), inputs["labels"]
