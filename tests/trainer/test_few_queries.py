"""Two rows per sample: samples without queries in accumulation, the ledger, the pictures and a
resumed run.
"""

import torch

from hf_flops import FlopsTrainer
from hf_flops.allocators import OptimalWithZeros
from tests.helpers.runs import adapted, data, flat
from tests.helpers.tiny import training_arguments
from tests.trajectory.test_trajectory import Steep


def build(folder, allocator, **options):
    defaults = {
        "allocator": "optimal_with_zeros",
        "queries_per_sample": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.01,
    }
    rows = [{**row, "sample_id": i} for i, row in enumerate(data(samples=16))]
    args = training_arguments(folder, **{**defaults, **options})
    return FlopsTrainer(adapted(), args, train_dataset=rows, allocator=allocator)


def test_samples_without_queries_are_in_the_ledger_and_the_log(tmp_path):
    trainer = build(tmp_path, Steep(), pictures=True)
    trainer.train()
    steps, queries = zip(*trainer.ledger.sample_queries.values(), strict=True)
    assert set(steps) == {2}  # two epochs
    assert sum(queries) == 4 * 8
    assert min(queries) < max(queries)
    assert trainer.ledger.rows == 2 * 4 * 8
    for entry in trainer.state.log_history[:4]:
        assert entry["dropped_rows"] == 0
        assert entry["predicted_gain"] > 1.5
        assert 0 < entry["allocation_entropy"] < 1
    assert (tmp_path / "queries.png").is_file()


def test_a_resumed_run_draws_the_same_counts(tmp_path):
    def run(folder, resume=None, **options):
        trainer = build(folder, OptimalWithZeros(least_gain=1.0), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path, save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "again", str(tmp_path / "checkpoint-2"))
    assert resumed.session.allocator.state_dict() == whole.session.allocator.state_dict()
    assert flat(resumed).equal(flat(whole))
    assert resumed.ledger.sample_queries == whole.ledger.sample_queries
    assert not torch.equal(flat(whole), torch.zeros_like(flat(whole)))
