"""What tests of chunks and of padding share: a model that watches what it is fed, padded batches,
and one estimate.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Optimal
from hf_flops.estimators import OneSided
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from tests.helpers.tiny import TASKS, model_forward, tiny_batch, tiny_model


class Cramped(nn.Module):
    """Runs a model, and out of memory above so many rows; refuses with a part of the work done."""

    def __init__(self, model, fits=10**9):
        super().__init__()
        self.model, self.fits, self.seen = model, fits, []

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        if len(inputs["labels"]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.seen.append(inputs)
        return outputs


def estimate(model, inputs, kind="rowwise", forward=None, **options):
    vector = ParameterVector.of(model)
    defaults = {
        "objective": TappedLoss(),
        "perturbation": perturb(model, **{kind: vector.names}),
        "estimator": OneSided(),
        "allocator": Optimal(),
        "queries_per_sample": 6,
        "scale": 1e-2,
        "rows_per_forward": 1000,
    }
    model.zero_grad()
    result = estimate_gradient(
        forward or model_forward(model), inputs, Method(**{**defaults, **options}), BatchPosition()
    )
    return torch.cat([p.grad.flatten() for p in vector.parameters]), result


def adapted(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", task_type=TASKS[kind])
        # rounding must not decide counts
        model = get_peft_model(tiny_model(kind, **options), config).eval().double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model


def left(batch):
    """Move the padding of a batch to the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    batch = {
        name: value.gather(1, order) if value.shape == order.shape else value
        for name, value in batch.items()
    }
    if batch["labels"].shape == order.shape:  # what is predicted from padding must not count
        batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    return batch


def padded(kind, samples=4, extra=3, side="right"):
    """A batch with columns of padding that no sample needs."""
    batch = tiny_batch(kind, samples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wide = batch["attention_mask"].shape
    batch = {
        name: nn.functional.pad(value, (0, extra), value=fill[name])
        if value.shape == wide
        else value
        for name, value in batch.items()
    }
    return left(batch) if side == "left" else batch
