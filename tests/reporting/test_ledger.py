"""What the ledger of a run remembers is bounded, and checks are charged once."""

import torch

from hf_flops import StepResult
from hf_flops.reporting import ledger as module
from hf_flops.reporting.ledger import Ledger


def recorded(ledger, *ids):
    count = len(ids)
    one = torch.ones(count, dtype=torch.int64)
    ledger.record(StepResult(torch.tensor(1.0), count, one, one.float(), {}), ids, ids)


def test_the_queries_of_the_samples_that_were_seen_last_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_SAMPLES", 3)
    ledger = Ledger()
    for sample in (1, 2, 3, 1, 4, 5):
        recorded(ledger, sample)
    assert ledger.sample_queries == {1: [2, 2], 4: [1, 1], 5: [1, 1]}
    again = Ledger()
    again.load_state_dict(ledger.state_dict())
    recorded(again, 6)
    assert list(again.sample_queries) == [4, 5, 6]


def test_checks_of_the_same_tensors_are_charged_once():
    ledger = Ledger()

    def checked(tensors):
        before = ledger.all_rows, ledger.tokens
        ledger.all_rows, ledger.tokens = before[0] + 7, before[1] + 70
        ledger.charge_checks(before, lambda: tensors)

    checked("A")
    recorded(ledger, 1)
    state = ledger.state_dict()
    ledger = Ledger()
    ledger.load_state_dict(state)
    checked("A")
    assert (ledger.all_rows, ledger.tokens, ledger.repeated_rows) == (7, 70, 7)
    recorded(ledger, 1)
    checked("A")  # in the middle of a life, as in a run that nobody interrupted
    checked("B")
    assert (ledger.all_rows, ledger.tokens, ledger.repeated_rows) == (21, 210, 7)
