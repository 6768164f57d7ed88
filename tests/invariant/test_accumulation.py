"""Micro-batches of a step give what the whole batch gives."""

import pytest
import torch

from hf_flops import BatchPosition
from tests.helpers.quadratic import SAMPLES, Quadratic, one_estimate, quadratic_batch
from tests.helpers.runs import entropy, flat, logged, short, short_run


def test_micro_batches_add_up_to_the_whole_batch():
    model, inputs = Quadratic(), quadratic_batch()
    for kind in ("rowwise", "shared"):
        whole, result = one_estimate(model, inputs, kind=kind)
        parts = [
            one_estimate(
                model,
                {name: value[i : i + 1] for name, value in inputs.items()},
                kind=kind,
                elements=SAMPLES,
                place=BatchPosition(position=i),
            )
            for i in range(SAMPLES)
        ]
        torch.testing.assert_close(
            torch.stack([gradient for gradient, _ in parts]).sum(0), whole, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(sum(part.loss for _, part in parts), result.loss)
        averaged = [one_estimate(model, inputs, kind=kind, batches=2)[0] for _ in range(2)]
        torch.testing.assert_close(sum(averaged), whole)


@pytest.mark.parametrize(
    ("kind", "preset", "objective"),
    [
        ("vit", "flops", None),
        ("vit", "mezo", None),
        ("vit", "flops", entropy),
        ("llama", "flops", None),  # texts with uneven numbers of tokens
        ("llama", "mezo", None),
        ("bert", "flops", None),  # a head that ignores num_items_in_batch
        ("questions", "flops", None),  # a loss that has no rows
    ],
)
def test_accumulation_does_not_change_the_run(kind, preset, objective, tmp_path):
    options = {
        "preset": preset,
        "allocator": "uniform",
        "optim": "sgd",
        "learning_rate": 0.01,
        "perturbation_scale": 0.01,
    }
    one = short(tmp_path, per_device_train_batch_size=8, **options)
    many = short(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    one, many = (short_run(args, kind, torch.float64, objective=objective) for args in (one, many))
    torch.testing.assert_close(flat(one), flat(many), rtol=0, atol=1e-5)
    assert logged(one, "loss") == pytest.approx(logged(many, "loss"), rel=1e-3)
    assert logged(one, "rows") == logged(many, "rows")
