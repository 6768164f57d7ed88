"""What an allocator remembers of its samples is bounded, and forgetting takes constant time."""

import json
import time

import torch

from hf_flops.allocators import history
from hf_flops.allocators.history import History


def visit(memory, ids, block=500):
    """Return the seconds of the processor that visits of these samples take."""
    begin = time.process_time()
    for start in range(0, len(ids), block):
        some = ids[start : start + block]
        errors = torch.ones(len(some), dtype=torch.float64)
        memory.update(some, errors, errors, 1.0, 0.95)
    return time.process_time() - begin


def test_forgetting_takes_no_longer_than_remembering():
    memory = History()
    first = visit(memory, range(64_000))
    visit(memory, range(64_000, history._MOST))
    later = visit(memory, range(10**6, 10**6 + 64_000))
    assert later < 5 * first
    past = [sample for sample, *_ in memory.state_dict()["past"]]
    assert len(past) == history._MOST
    assert past[0] == 64_000
    assert past[-1] == 10**6 + 64_000 - 1


def test_the_sample_that_was_visited_last_is_forgotten_last(monkeypatch):
    monkeypatch.setattr(history, "_MOST", 3)
    memory = History()
    visit(memory, [1, 2, 3, 1, 4], block=1)
    again = History()
    again.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    visit(again, [5], block=1)
    assert [sample for sample, *_ in again.state_dict()["past"]] == [1, 4, 5]
