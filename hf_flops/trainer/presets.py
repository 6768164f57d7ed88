"""Presets: values of the options that are not given; and what options may be."""

from __future__ import annotations

from typing import Any

from ..allocators import ALLOCATORS
from ..distributed.exchange import REDUCE
from ..estimators import CONTROL_VARIATES, ESTIMATORS
from ..perturbations import DISTRIBUTIONS, PERTURBATIONS

PRESETS: dict[str, dict[str, Any]] = {
    # Ours: noise per row, forward differences from one clean row, queries where they pay.
    "flops": {
        "perturbation": "auto",
        "estimator": "one_sided",
        "allocator": "optimal",
        "noise": "rademacher",
        "closed_form_head": "solve",
        "control_variate": "feature_jacobian",
    },
    # n-SPSA as published with MeZO (arXiv 2305.17333): one noise for the batch, central
    # differences, equal counts.
    "mezo": {
        "perturbation": "shared",
        "estimator": "antithetic",
        "allocator": "uniform",
        "noise": "gaussian",
        "closed_form_head": "none",
        "control_variate": "none",
    },
    # What the code published with FLOPS does, its bias included: see `AuthorsBernoulli`.
    "flops-authors": {
        "perturbation": "shared",
        "estimator": "antithetic",
        "allocator": "authors_bernoulli",
        "noise": "gaussian",
        "closed_form_head": "none",
        "control_variate": "none",
    },
}

LORA_PARTS = ("auto", "both", "B", "B_then_A")
HEADS = ("solve", "gradient", "none")

CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "perturbation": PERTURBATIONS,
    "estimator": tuple(ESTIMATORS),
    "allocator": tuple(ALLOCATORS),
    "noise": tuple(DISTRIBUTIONS),
    "closed_form_head": HEADS,
    "control_variate": tuple(CONTROL_VARIATES),
    "lora_parts": LORA_PARTS,
    "prefix_cache": ("memory", "disk"),
    "reduce": REDUCE,
}
