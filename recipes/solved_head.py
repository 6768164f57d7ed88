"""A head solved on the features of an image model: what there is without an adapter, and how far an
adapter went.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.utils.data import DataLoader, Subset

from hf_flops.base.memory import PeakMemory
from recipes import images
from recipes.runs import Outcome

FROZEN = "frozen adapter, solved head"
MOST = 4096  # training images that the training loss is measured on
PRECISION = 0.3  # of the Gaussian prior on the weights, as in hf_flops.estimators.HeadSolver


@torch.no_grad()
def features(model: Any, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs (N, H) float64 of the classifier for all rows of a split, and labels
    (N,).
    """
    training, device, inputs, labels = model.training, next(model.parameters()).device, [], []
    hook = model.base_model.model.classifier.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].double().cpu())
    )
    model.eval()
    try:
        for batch in DataLoader(data, batch_size=256, collate_fn=images.collate):
            model(pixel_values=batch["pixel_values"].to(device))
            labels.append(batch["labels"])
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(inputs).nan_to_num(0.0, 0.0, 0.0).numpy(), torch.cat(labels).numpy()


def solve(found: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Fit softmax regression to features and labels."""
    return LogisticRegression(C=1 / PRECISION, max_iter=1000).fit(found, labels)


def training_loss(model: Any, data: Any) -> float:
    """Return the mean cross-entropy of training images under a head that is solved for the adapter
    of the moment, whatever head the model has.
    """
    found, labels = features(model, Subset(data, range(min(len(data), MOST))))
    return float(log_loss(labels, solve(found, labels).predict_proba(found)))


def frozen_adapter(model: Any, data: Any) -> Outcome:
    """Solve the head of a model whose adapter stays as it starts: one row per training image."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        found, labels = features(model, data["train"])
        head = solve(found, labels)
        seconds = time.perf_counter() - start
    accuracy = {part: head.score(*features(model, data[part])) for part in ("validation", "test")}
    return Outcome(
        method=FROZEN,
        before=accuracy["test"],
        after=accuracy["test"],
        learning_rate=0.0,
        parameters=head.coef_.size + head.intercept_.size,
        rows=len(labels),
        tokens=0,
        seconds=seconds,
        peak_megabytes=memory.megabytes,
        steps=0,
        curve=[(len(labels), accuracy["validation"])],
        losses=[(len(labels), training_loss(model, data["train"]))],
    )
