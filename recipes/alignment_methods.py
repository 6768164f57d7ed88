"""How the alignment recipe trains: forward-only by a preset, by SPSA as BlackVIP uses it, or by
backprop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_flops import ContrastiveLoss, FlopsTrainer
from hf_flops.trainer import PRESETS
from recipes.runs import stock_arguments

METHODS = ["flops", "mezo", "spsa-gc", "backprop"]
# Best of a grid on validation images: benchmarks/alignment.py.
LEARNING_RATES = {"flops": 1e-3, "mezo": 3e-3, "spsa-gc": 1e-1, "backprop": 1e-2}
CONTRAST = ContrastiveLoss(same_texts="positives")


class BackpropTrainer(Trainer):
    """The stock trainer with the recipe's contrastive loss."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch."""
        _, outputs = CONTRAST.run(
            model, {name: value for name, value in inputs.items() if name != "sample_id"}
        )
        base = getattr(model, "get_base_model", lambda: model)()
        loss = CONTRAST.loss(outputs, inputs, base.logit_scale, getattr(base, "logit_bias", None))
        return (loss, outputs) if return_outputs else loss


def trainer_for(method: str, model: nn.Module, args: Any, data: Any, collate: Any) -> Trainer:
    """Build the trainer of a method: the stock one for backprop, ours with a preset for the rest.

    SPSA with gradient correction, as in BlackVIP (Oh et al., 2023, arXiv 2303.14773), averages
    two-sided differences, follows them with Nesterov's momentum of 0.9 and a step of
    `rate / (step + 1)^0.4`. Its noise is of signs here, whose reciprocals, which SPSA multiplies
    with, are themselves.
    """
    options: dict[str, Any] = {"model": model, "train_dataset": data, "data_collator": collate}
    if method == "backprop":
        return BackpropTrainer(args=stock_arguments(args, remove_unused_columns=False), **options)
    name = "mezo" if method == "spsa-gc" else method
    preset: dict[str, Any] = {"preset": name, **PRESETS[name]}
    if method == "spsa-gc":
        preset["noise"] = "rademacher"
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=args.learning_rate, momentum=0.9, nesterov=True)
        options["optimizers"] = (
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.4),
        )
    return FlopsTrainer(
        args=replace(args, remove_unused_columns=False, **preset), objective=CONTRAST, **options
    )
