"""A run that is interrupted and resumed is the uninterrupted one."""

import pytest

from hf_flops import FlopsTrainer
from tests.helpers.runs import adapted, data, entropy, flat, logged, short


@pytest.mark.parametrize("objective", [None, entropy])
@pytest.mark.parametrize("preset", ["flops", "flops-authors"])
def test_a_resumed_run_is_the_uninterrupted_one(preset, objective, tmp_path):
    def build(**options):
        common = {
            "preset": preset,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "max_steps": 7,
        }
        args = short(tmp_path, optim="adamw_torch", learning_rate=0.01, **common, **options)
        rows = [{**row, "sample_id": i} for i, row in enumerate(data(samples=16))]
        return FlopsTrainer(adapted(), args, train_dataset=rows, objective=objective)

    whole = build(save_strategy="steps", save_steps=5)
    whole.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert whole.state.epoch == 1.75
    assert resumed.session.allocator.state_dict() == whole.session.allocator.state_dict()
    assert flat(resumed).equal(flat(whole))
    assert logged(resumed, "rows") == logged(whole, "rows")
    assert resumed.ledger.sample_queries == whole.ledger.sample_queries
    assert logged(resumed, "loss")[-1] == logged(whole, "loss")[-1]
