"""Texts and answers of a batch: rows taken from it are split without reading them again."""

import pytest
import torch

from hf_flops.base.batch import samples_of, take
from hf_flops.base.completion import BatchSplit, split
from hf_flops.base.padding import TrimmedBatch
from tests.prompts.test_suffix_prompt import batch, draw_rows

NAMES = ("input_ids", "attention_mask", "labels")
LENGTHS = [(5, 1), (2, 3), (6, 2)]


def inputs_of(side):
    return {name: batch(draw_rows(LENGTHS), side)[name] for name in NAMES}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("owner", [[0, 1, 2], [1, 1], [2, 0, 0], [0]])
def test_rows_are_split_as_their_values_would_be(side, owner):
    inputs, owner = inputs_of(side), torch.tensor(owner)
    kept = BatchSplit(tuple(inputs.values()), split(*inputs.values()))
    rows = TrimmedBatch(inputs, frozenset([side])).of(owner)[0]
    found, wanted = kept.of(*(rows[name] for name in NAMES)), split(*rows.values())
    assert found is not None
    for name in ("text", "text_mask", "answer", "targets"):
        assert getattr(found, name).equal(getattr(wanted, name)), name
    assert found.keys() == wanted.keys()


def test_other_rows_are_read():
    inputs = inputs_of("left")
    kept, ids = BatchSplit(tuple(inputs.values()), split(*inputs.values())), inputs["input_ids"]
    rows = list(take(inputs, torch.tensor([1, 2])).values())
    assert kept.of(*rows) is not None
    assert kept.of(rows[0].clone(), *rows[1:]) is None  # may have been changed
    assert kept.of(*rows[:2], None) is None  # without the labels all is text
    assert kept.of(rows[0], *list(take(inputs, torch.tensor([2, 1])).values())[1:]) is None
    again = take(take({"input_ids": ids}, torch.tensor([2, 0])), torch.tensor([1, 1, 0]))
    assert samples_of(again["input_ids"], ids).tolist() == [0, 0, 2]
