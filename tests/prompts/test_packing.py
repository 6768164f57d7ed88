"""Rows of the same text in one sequence: the same logits as alone, from fewer copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Optimal
from hf_flops.estimators import OneSided
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.prompts import packing
from hf_flops.prompts.packing import Packing, continued, may_be_packed
from hf_flops.trainer.preparation import shared_texts
from tests.helpers.tiny import generator, model_forward
from tests.prompts.test_suffix_prompt import KINDS, batch, draw_rows, suffix

FREE = [kind for kind in KINDS if kind != "windows"]
ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@given(rows=ROWS, slots=st.integers(1, 5))
def test_a_line_holds_rows_of_one_text_and_every_row_has_a_slot_of_its_own(rows, slots):
    rows = torch.tensor(rows)
    found = Packing.of(rows, slots)
    assert found.texts[found.line].equal(rows)
    assert len(set(zip(found.line.tolist(), found.slot.tolist(), strict=True))) == len(rows)
    assert int(found.slot.max()) < slots
    assert len(found.texts) == sum(-(-count // slots) for count in torch.bincount(rows).tolist())
    values = torch.randn(len(rows), 2, 3, generator=generator())
    assert found.unpack(found.pack(values)).equal(values)


@pytest.mark.parametrize(
    ("rows", "slots"), [([0, 1, 2, 3], 1), ([0] * 15 + [1] * 15, 15), ([0] * 19 + [1] * 11, 11)]
)
def test_rows_are_packed_where_slots_stay_full(rows, slots):
    assert Packing.cheapest(torch.tensor(rows), 8, 128).slots == slots


@settings(max_examples=25)
@given(
    kind=st.sampled_from(FREE),
    rows=ROWS,
    slots=st.integers(2, 4),
    lengths=st.lists(st.tuples(st.integers(1, 7), st.just(1)), min_size=4, max_size=4),
    data=st.data(),
)
@torch.no_grad()
def test_logits_are_those_of_rows_alone(kind, rows, slots, lengths, data):
    model, inputs = suffix(kind), batch(draw_rows(lengths))
    tokens = torch.randn(len(rows), 3, 16, generator=generator(1))
    real = data.draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    kept = (torch.arange(3) < torch.tensor(real)[:, None]).long()
    with model.cached_texts(inputs):
        texts = model.texts
    own = torch.tensor(rows) % len(texts.mask)  # texts may be drawn twice
    wanted = continued(model.base, texts, Packing.of(own, 1), tokens, kept, 3)[kept.bool()]
    found = continued(model.base, texts, Packing.of(own, slots), tokens, kept, 3)[kept.bool()]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_those_of_rows_alone(kind, monkeypatch):
    model, inputs = suffix(kind).double(), batch(draw_rows([(5, 1), (2, 2), (6, 1)]))
    perturbation = perturb(model, rowwise=ParameterVector.of(model).names)
    method, found = Method(TappedLoss(), perturbation, OneSided(), Optimal(), 6, 0.05, 7), []
    chosen, cheapest = [], Packing.cheapest

    def watched(*args):
        chosen.append(cheapest(*args).slots)
        return cheapest(*args)

    monkeypatch.setattr(Packing, "cheapest", watched)
    # as if tokens cost nothing, so that as many rows as can be share a line
    monkeypatch.setattr(packing, "_TOKEN", 0)
    for packs in (None, False):
        model.packs = packs
        model.zero_grad()
        with torch.no_grad(), shared_texts(model, inputs, clean=True):
            estimate_gradient(model_forward(model), inputs, method, BatchPosition())
        found.append(model.prompt.weight.grad.clone())
    assert (max(chosen, default=1) > 1) == (kind != "windows")
    torch.testing.assert_close(
        found[0], found[1], rtol=1e-5, atol=1e-5 * float(found[1].abs().max())
    )


@pytest.mark.parametrize("odd", ["ignores", "refuses", "flash"])
@torch.no_grad()
def test_models_that_take_no_mask_of_ones_own_run_rows_alone(odd):
    model, inputs = suffix("llama"), batch(draw_rows([(5, 1), (2, 1)]))
    with model.cached_texts(inputs):
        texts = model.texts
    assert model.packs is True
    original = model.base.forward

    def forward(
        inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep
    ):
        if attention_mask.dim() == 4:
            if odd == "refuses":
                raise ValueError("a mask has two dimensions")
            attention_mask = None
        given = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
        }
        return original(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=use_cache, **given
        )

    if odd == "flash":
        model.base.config._attn_implementation = "flash_attention_2"
    else:
        model.base.forward = forward
    assert not may_be_packed(model.base, texts, model.prompt.weight)
