"""What every way for noise to enter a model must do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..perturbations import NoiseKeys, Perturbation, displaced

Losses = Callable[[], Tensor]


class PerturbationContract:
    """Derive a class `Test...` that defines `make`; pytest then runs the contract.

    Examples:
        >>> from hf_flops.perturbations import ParameterVector, SharedNoise
        >>> class TestShared(PerturbationContract):
        ...     def make(self):
        ...         model, x = nn.Linear(2, 2).double(), torch.ones(3, 2).double()
        ...         noise = SharedNoise(ParameterVector.of(model), "gaussian")
        ...         return noise, model, lambda: model(x).square().sum(1)
        >>> TestShared().test_noise_is_a_change_of_the_parameters()
    """

    draws = 1000  # for the mean of the estimate

    def make(self) -> tuple[Perturbation, nn.Module, Losses]:
        """Return the perturbation, the model in float64, and what computes R rows' losses (R,)."""
        raise NotImplementedError("Define make(self), which returns (perturbation, model, losses).")

    def keys(self, rows: int, step: int = 0) -> NoiseKeys:
        """Return the keys of the noise of a chunk of rows."""
        return NoiseKeys.of(
            0, step, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), group=0
        )

    @torch.no_grad()
    def test_the_model_is_bit_for_bit_what_it_was(self) -> None:
        """After the context, and after an exception inside it: parameters, hooks and attributes."""
        perturbation, model, losses = self.make()
        before, clean = self.picture(model), losses()
        noise = perturbation.draw(self.keys(len(clean)))
        with perturbation.applied(noise, 0.1):
            moved = losses()
        assert not torch.equal(moved, clean), "the noise changes nothing"
        try:
            with perturbation.applied(noise, 0.1):
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert self.picture(model) == before, "something is left on the model"
        assert torch.equal(losses(), clean), "the losses are not what they were"

    @torch.no_grad()
    def test_noise_is_a_function_of_its_keys(self) -> None:
        """Keys fix the noise, other keys draw other noise, and the global generator is not used."""
        perturbation, _, losses = self.make()
        rows, state, by_step = len(losses()), torch.get_rng_state(), []
        for step in (0, 0, 1):
            with perturbation.applied(perturbation.draw(self.keys(rows, step)), 0.1):
                by_step.append(losses())
        assert torch.equal(by_step[0], by_step[1]), "the same keys gave other noise"
        assert not torch.equal(by_step[0], by_step[2]), "other keys gave the same noise"
        assert torch.equal(state, torch.get_rng_state()), "the global generator has moved"

    @torch.no_grad()
    def test_noise_is_a_change_of_the_parameters(self) -> None:
        """A row under its noise loses what it does when the parameters are moved by that noise."""
        perturbation, _, losses = self.make()
        if perturbation.replays:  # noise on outputs: see the mean
            return
        rows = len(losses())
        noise = perturbation.draw(self.keys(rows))
        with perturbation.applied(noise, 0.25):
            noisy = losses()
        for row, unit in enumerate(torch.eye(rows)):
            with displaced(perturbation.vector, 0.25 * perturbation.weighted_noise(noise, unit)):
                torch.testing.assert_close(noisy[row], losses()[row], rtol=1e-6, atol=1e-9)

    def test_the_mean_of_the_estimate_is_the_gradient(self) -> None:
        """The sum of delta times noise averages to autograd's gradient of the summed losses."""
        perturbation, _, losses = self.make()
        wanted = torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(losses().sum(), perturbation.vector.parameters)
            ]
        )
        with torch.no_grad():
            estimates = torch.stack(
                [self.estimate(perturbation, losses, step) for step in range(self.draws)]
            ).double()
        error = estimates.std(0) / self.draws**0.5 + 1e-12
        worst = float(((estimates.mean(0) - wanted) / error).abs().max())
        assert worst < 5, f"the mean is {worst:.1f} standard errors from the gradient"

    def estimate(self, perturbation: Perturbation, losses: Losses, step: int) -> Tensor:
        """Return (d,) the estimate of one draw, by central differences."""
        scale, rows = 1e-4, len(losses())
        noise = perturbation.draw(self.keys(rows, step))
        results = []
        for sign in (1, -1):
            with perturbation.applied(noise, sign * scale):
                results.append(losses())
        deltas = (results[0] - results[1]) / (2 * scale)
        if perturbation.shares_noise:  # one noise for all rows: the estimate is of their sum
            deltas = torch.full_like(deltas, float(deltas.sum()) / rows)
        return perturbation.weighted_noise(noise, deltas.float())

    def picture(self, model: nn.Module) -> list[object]:
        """Return what must not change on a model."""
        parts: list[object] = [(name, value.tolist()) for name, value in model.state_dict().items()]
        for name, module in model.named_modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            parts.append((name, hooks, sorted(vars(module))))
        return parts
