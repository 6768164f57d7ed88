"""Several processes: the same estimate whatever their number, even shares, and bytes that do not grow with the adapter."""

import copy

import pytest
import torch
from torch import nn

from hf_flops import CallableObjective, ConfigurationError, Method, NonFiniteError, Place, estimate_gradient
from hf_flops.allocators import ALLOCATORS
from hf_flops.control_variates import LogitJacobian
from hf_flops.estimators import ESTIMATORS
from hf_flops.exchange import REDUCE, Exchange
from hf_flops.heads import find_head
from hf_flops.independence import choose_reuse
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.padding import Feed
from hf_flops.perturbations import NoiseKeys, ParameterVector, perturb
from hf_flops.regenerate import regenerate
from hf_flops.rows import expand
from hf_flops.share import Share
from tests.ranks import played
from tests.tiny import model_forward, tiny_batch, tiny_model

WORLDS = (3,)
MODELS = {kind: tiny_model(kind).double() for kind in ("vit", "llama")}  # not in a thread: the generator is global


@torch.no_grad()
def estimates(share, reduce, *, kind="vit", samples=5, steps=2, noise="rowwise", spoil=None, batches=1, head=False, **options):
    """Run some steps on a model of its own; returns gradients, losses, rows, and bytes sent."""
    model = copy.deepcopy(MODELS[kind])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [n for n, _ in model.named_parameters() if "classifier" in n or "layers.1.attention" in n or "layers.1.self_attn" in n]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(kind, samples).items()}
    forward, objective = model_forward(model), options.pop("objective", None) or TappedLoss(logits=True)
    head = find_head(model, objective, forward, batch) if head else None
    moved = [name for name in names if head is None or name not in head.vector.names]
    perturbation = perturb(model, **{noise: moved})
    reuse, reason = choose_reuse(model, objective, forward, batch, perturbation)
    assert reason is None
    if spoil is not None:
        objective = spoil(objective)
    method = Method(
        objective=objective,
        perturbation=perturbation,
        estimator=ESTIMATORS[options.pop("estimator", "one_sided")](),
        allocator=ALLOCATORS[options.pop("allocator", "optimal")](),
        queries_per_sample=options.pop("queries", 5),
        scale=1e-3,
        rows_per_forward=4,
        reuse=reuse,
        head=head,
        exchange=Exchange(share, reduce),
        **{name: make() for name, make in options.items()},
    )
    found, results = [], []
    for step in range(steps):
        model.zero_grad()
        for number in range(batches):
            place = Place(seed=3, step=step, position=number * samples)
            results.append(estimate_gradient(forward, batch, method, place, 1.0, last=number == batches - 1))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    return torch.stack(found), results, method


def same(found, wanted):
    gradients, results, _ = found
    torch.testing.assert_close(gradients, wanted[0], rtol=1e-5, atol=1e-6)
    for own, other in zip(results, wanted[1], strict=True):
        assert own.counts.equal(other.counts)
        assert own.rows == other.rows
        torch.testing.assert_close(own.loss, other.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.mean_squares, other.mean_squares, equal_nan=True)
        for name, value in own.metrics.items():
            assert value == pytest.approx(other.metrics[name], rel=1e-3, abs=1e-6), name


def compare(reduce, **options):
    alone = estimates(Share(), reduce, **options)
    for world in WORLDS:
        for found in played(world, lambda share: estimates(share, reduce, **options)):
            same(found, alone)
    return alone


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("noise", ["rowwise", "shared"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimate_does_not_depend_on_the_number_of_processes(estimator, noise, reduce):
    compare(reduce, estimator=estimator, noise=noise)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_allocators_decide_alike_in_all_processes(allocator, reduce):
    compare(reduce, allocator=allocator, steps=3)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("options", [{"kind": "llama"}, {"head": True}, {"samples": 1}, {"allocator": "uniform", "estimator": "antithetic", "queries": 4}])
def test_other_methods_are_shared_too(options, reduce):
    compare(reduce, **options)


def test_control_variates_and_noise_on_outputs_are_summed():
    compare("gradient", control=LogitJacobian, steps=3)
    compare("gradient", control=LogitJacobian, head=True, steps=3)
    compare("gradient", noise="activation")


@pytest.mark.parametrize("reduce", REDUCE)
def test_a_loss_of_the_whole_batch_is_shared_query_by_query(reduce):
    compare(reduce, objective=BatchLoss(), noise="shared", allocator="uniform")
