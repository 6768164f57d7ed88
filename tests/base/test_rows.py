import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops import ObjectiveError
from hf_flops.base.batch import batch_size, misaligned, take
from hf_flops.base.rows import expand

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(torch.tensor)


@given(COUNTS, st.floats(0.5, 100))
def test_every_query_has_one_row_and_each_sample_the_weight_of_its_loss(counts, normalizer):
    rows = expand(counts, normalizer)
    pairs = list(zip(rows.owner.tolist(), rows.query.tolist(), strict=True))
    assert sorted(pairs) == [(i, k) for i, n in enumerate(counts.tolist()) for k in range(n)]
    totals = torch.zeros(len(counts)).index_add_(0, rows.owner, rows.weight)
    torch.testing.assert_close(totals, torch.full((len(counts),), 1 / normalizer))


@given(COUNTS)
def test_unweighted_rows_weigh_the_same(counts):
    rows = expand(counts, 1.0, weighted=False)
    torch.testing.assert_close(rows.weight, torch.full((len(rows),), len(counts) / len(rows)))


@given(COUNTS, st.booleans())
def test_stretches_keep_groups_apart(counts, within_groups):
    rows = expand(counts, 1.0)
    pieces = torch.arange(len(rows)).split(rows.stretches(within_groups=within_groups))
    assert sum(map(len, pieces)) == len(rows)
    assert len(pieces) == (int(counts.max()) if within_groups else 1)
    assert all(len(rows[piece].group.unique()) == 1 for piece in pieces if within_groups)


def test_take_repeats_tensors_and_lists_and_passes_scalars():
    inputs = {
        "pixel_values": torch.arange(6).view(3, 2),
        "names": ["a", "b", "c"],
        "flag": True,
        "zero": torch.tensor(1.5),
    }
    taken = take(inputs, torch.tensor([2, 0, 2]))
    assert taken["pixel_values"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert taken["names"] == ["c", "a", "c"]
    assert taken["flag"] is True
    assert taken["zero"] is inputs["zero"]


def test_batch_size_is_read_off_the_labels_and_odd_inputs_are_named():
    inputs = {"patches": torch.zeros(10, 4), "labels": torch.zeros(3), "tuple": (1, 2)}
    assert batch_size(inputs) == 3
    assert misaligned(inputs) == ["patches", "tuple"]


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ObjectiveError, match=r"keys are \['text'\]"):
        batch_size({"text": ["a"]})


def test_a_sample_may_have_no_rows_and_others_the_weight_of_their_expected_count():
    counts, expected = torch.tensor([0, 2, 0, 1]), torch.tensor([0.5, 1.6, 0.3, 0.6])
    rows = expand(counts, 4.0, share=counts / expected)
    assert rows.owner.tolist() == [1, 3, 1]
    torch.testing.assert_close(rows.weight, 1 / (4 * expected[rows.owner]))
