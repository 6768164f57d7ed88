"""The guard against noise undoes what a far too large rate does, and leaves a good run alone."""

import pytest
import torch
from torch import nn

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.estimators import OneSided
from hf_flops.perturbations import ParameterVector
from hf_flops.trainer.noise_guard import NoiseGuard
from tests.estimators.test_closed_form_head import adapted
from tests.helpers.tiny import as_dataset, generator, tiny_batch


class Solver:
    """What the guard reads of a solver."""

    samples, seen, objective = 4, 0, 1.0


def observed(losses, clean=1):
    """Show a guard the losses of steps with two samples each, the first of them clean; the one
    parameter is the number of the step. Return the guard and the parameter after each step.
    """
    guard, solver, weight = NoiseGuard(lambda: None), Solver(), nn.Parameter(torch.zeros(()))
    vector, found = ParameterVector([("weight", weight)]), []
    for step, loss in enumerate(losses):
        with torch.no_grad():
            weight.fill_(step)
        solver.objective, solver.seen = loss, solver.seen + 2
        guard.observe(solver, vector, clean=step < clean)
        found.append(weight.item())
    return guard, found


def test_a_falling_loss_is_left_alone():
    guard, found = observed([1.0, 1.1, 1.2, 0.9, 0.9, 0.95, 0.95])
    assert found == list(range(7))
    assert guard.multiplier == 1
    assert guard.lowest == pytest.approx(0.9)


def test_a_rising_loss_brings_the_best_parameters_back_and_halves_the_rate():
    guard, found = observed([1.0, 0.8, 0.8, 0.9, 0.9, 3.0, 3.0])
    assert found == [0, 1, 2, 3, 2, 5, 2]  # the parameters of step 2 had 0.8
    assert guard.multiplier == 0.25


def test_the_first_round_may_cost_more():
    assert observed([1.0, 1.2, 1.2])[0].multiplier == 1
    guard, found = observed([1.0, 1.3, 1.3])
    assert guard.multiplier == 0.5
    assert found[-1] == 0


def test_a_state_restores_the_guard():
    guard, _ = observed([1.0, 0.8, 0.8, 0.9])
    again = NoiseGuard(lambda: None)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()


class RandomSign(OneSided):
    """Deltas whose signs say nothing."""

    def __init__(self):
        self.generator = generator(5)

    def deltas(self, losses, clean, scale):
        found = super().deltas(losses, clean, scale)
        return found * (torch.randint(0, 2, found.shape, generator=self.generator) * 2 - 1)


def trained(folder, estimator, rate):
    inputs = tiny_batch("bert", samples=16)
    data = [{**sample, "sample_id": i} for i, sample in enumerate(as_dataset(inputs))]
    args = FlopsTrainingArguments(
        output_dir=str(folder),
        max_steps=60,
        per_device_train_batch_size=8,
        queries_per_sample=4,
        control_variate="none",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=rate,
    )
    trainer = FlopsTrainer(model=adapted(), args=args, train_dataset=data, estimator=estimator)
    trainer.train()
    return trainer


def test_without_a_signal_a_run_ends_near_where_it_began(tmp_path, caplog):
    trainer = trained(tmp_path, RandomSign(), rate=1.0)
    losses = [e["solved_head_loss"] for e in trainer.state.log_history if "solved_head_loss" in e]
    assert trainer.noise_guard.multiplier < 0.1
    assert "Training has raised the loss" in caplog.text
    logged = [e for e in trainer.state.log_history if "learning_rate" in e][-1]
    assert logged["learning_rate"] == pytest.approx(logged["learning_rate_multiplier"])
    assert trainer.noise_guard.lowest <= 1.01 * losses[2]


def test_with_a_signal_it_is_not_needed(tmp_path):
    trainer = trained(tmp_path, None, rate=1e-3)
    assert trainer.noise_guard.multiplier == 1
