"""One gradient estimate without a backward pass: the file to read first.

    clean pass       unperturbed ("clean") losses, features, the closed-form head's inputs:
                     core/clean_forward.py
    counts           the allocator's queries per sample, from clean features only: allocators/
    rows             one row per query, divided among processes: base/rows.py,
                     distributed/exchange.py
    for each chunk   draw noise, evaluate, transform losses to deltas, accumulate: core/rounds.py,
                     core/queries.py, estimators/delta_chain.py
    complete         add back what the control variate subtracted; redistribute the weight of rows
                     without a finite loss
    apply            sum over processes, add to `.grad`, with the head's exact gradient

To follow a delta, read two more files: `core/queries.py` runs its row, and
`estimators/delta_chain.py` transforms it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocators import SampleFeatures
from ..base.batch import Inputs
from ..base.rows import BatchPosition, Rows
from ..base.transfer import to_host
from ..distributed.noise_sum import NoiseSum
from ..errors import NonFiniteError
from ..estimators import (
    Chain,
    Clipping,
    DeltaTransform,
    FiniteDifference,
    HeadSolver,
    LeaveOneOut,
    Residual,
)
from ..objectives import Forward
from ..perturbations.replay import UpdateRecord
from .chunking import ChunkPlanner
from .clean_forward import CleanPass, clean_pass
from .diagnostics import gain_metrics, mean_squares, summarise
from .method import Method, StepResult
from .queries import QueryResults
from .rounds import all_queries, queries_of


def estimate_gradient(
    forward: Forward,
    inputs: Inputs,
    method: Method,
    place: BatchPosition,
    elements: float | None = None,
    batches: float = 1,
    *,
    last: bool = True,
) -> StepResult:
    """Add an estimate of the loss's gradient to the `.grad` of the perturbed parameters.

    The loss is `(1/N) sum_i s_i`, s_i a sample's loss sum; the estimate is
    `(1/N) sum_i (1/n_i) sum_k delta_ik z_ik`, unbiased for any counts n_i that are fixed before the
    noise. Random counts, which may be 0, have their mean in the place of n_i in the weight.

    Args:
        forward: runs the model, in evaluation mode, and returns its loss and outputs.
        inputs: a batch of B samples.
        method: how the gradient is estimated.
        place: position of the batch in the run; with the seed it determines the noise.
        elements: N, the number of loss elements that the optimizer step averages over.
        batches: number of batches that the step averages over, if `elements` is None: N is then
            this number times the batch's own number of loss elements.
        last: whether the batch is the last of its optimizer step. Processes that sum gradients wait
            for it: before that, `.grad` is unchanged and the metrics of the sum are missing.

    Raises:
        ConfigurationError: `queries_per_sample` is too small for one query per sample.
        NonFiniteError: no perturbed row has a finite loss; gradients are unchanged.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops import BatchPosition, Method, estimate_gradient
        >>> from hf_flops.allocators import Uniform
        >>> from hf_flops.estimators import Antithetic
        >>> from hf_flops.objectives import CallableObjective
        >>> from hf_flops.perturbations import perturb
        >>> model = nn.Linear(3, 1)
        >>> objective = CallableObjective(lambda outputs, inputs: outputs.squeeze(1))
        >>> perturbation = perturb(model, rowwise=["weight", "bias"])
        >>> method = Method(
        ...     objective, perturbation, Antithetic(), Uniform(), 20000, 0.01, rows_per_forward=1000
        ... )
        >>> forward = lambda inputs: (None, model(inputs["x"]))
        >>> inputs = {"x": torch.tensor([[1.0, 2.0, 3.0]])}
        >>> result = estimate_gradient(forward, inputs, method, BatchPosition(seed=0))
        >>> model.weight.grad.round()
        tensor([[1., 2., 3.]])
        >>> result.counts
        tensor([10000])

    References:
        Ren et al. (2025), FLOPS, arXiv 2410.05966, section 3.
    """
    with torch.no_grad(), method.reuse.recording(forward) as recording:
        return estimate_from(
            clean_pass(recording, inputs, method, place), elements, batches, last=last
        )


def estimate_from(
    clean: CleanPass, elements: float | None = None, batches: float = 1, *, last: bool = True
) -> StepResult:
    """Run the queries and add the estimate to the gradients; for the arguments see
    `estimate_gradient`.
    """
    method = clean.method
    if method.solver is not None:
        keep_samples(clean, method.solver)
    if method.clean_only:
        return primed(clean, elements, batches)
    features, chain = clean.features(), transforms(clean)
    sums = method.exchange.noise_sum(method.perturbation, clean.place)
    results = all_queries(clean, chain, sums, features)
    lengths = results.elements(clean.units) if features.lengths is None else features.lengths
    factor, replayed = complete(clean, chain, sums, results, lengths)
    # If no element counts (every label is ignored), the update is zero.
    normalizer = (float(lengths.sum()) * batches if elements is None else elements) or 1.0
    signals = apply(clean, chain, sums.update * factor / normalizer, normalizer, last=last)
    trace = method.exchange.trace(sums.parts, clean.place, factor, normalizer)
    result = report(
        clean,
        features,
        results,
        signals,
        normalizer,
        *sums.shared_facts(method.exchange.group, replayed),
        trace,
        float(lengths.sum()),
    )
    method.allocator.update(features, result.counts, result.mean_squares)
    return result


def keep_samples(clean: CleanPass, solver: HeadSolver) -> None:
    """Keep what the head's solver needs of a batch."""
    assert clean.found is not None
    assert clean.found.host is not None
    assert clean.found.host_features is not None
    solver.add(clean.found.host_features, clean.found.host, clean.place.ids)


def primed(clean: CleanPass, elements: float | None, batches: float) -> StepResult:
    """Return the result of a batch without queries: only its clean rows have run. The gradients
    are 0.
    """
    assert clean.method.head is not None
    for vector in (clean.method.perturbation.vector, clean.method.head.vector):
        vector.add_to_gradients(torch.zeros(vector.size, device=vector.device))
    features = clean.features()
    sums, counts = features.losses, features.lengths
    assert counts is not None
    normalizer = (float(counts.sum()) * batches if elements is None else elements) or 1.0
    loss = sums[sums.isfinite()].sum() / normalizer
    queries = torch.zeros(clean.units, dtype=torch.int64)
    unknown = torch.full((clean.units,), torch.nan)
    dropped = {"dropped_rows": float((~sums.isfinite()).sum())}
    return StepResult(loss.float(), clean.samples, queries, unknown, dropped)


def transforms(clean: CleanPass) -> Chain:
    """Return the chain of transforms from losses to deltas: see `estimators/delta_chain.py`."""
    method, losses = clean.method, clean.losses
    difference = method.estimator, None if losses is None else losses.sums, method.scale
    chain: list[DeltaTransform] = [FiniteDifference(*difference)]
    if method.control is not None and losses is not None and method.allocator.weighted:
        vector, size = method.perturbation.vector, getattr(method.perturbation, "rowwise_size", 0)
        reference = None if method.solver is None else method.solver.features
        prediction = method.control.start(
            losses, size, vector.device, clean.place.step, clean.head_features, reference
        )
        if prediction is not None:
            chain.append(
                Residual(
                    method.control, prediction, method.perturbation, method.estimator, method.scale
                )
            )
    if method.centred:
        chain.append(LeaveOneOut(clean.units))
    if method.delta_clip is not None:
        chain.append(Clipping(method.delta_clip))
    return Chain(chain)


def complete(
    clean: CleanPass, chain: Chain, sums: NoiseSum, results: QueryResults, lengths: Tensor
) -> tuple[float, int]:
    """Add the terms that need all rows: the mean that the control variate subtracted, corrections
    from other rows' deltas, and the weight of rows without a finite loss.

    Returns:
        A factor that replaces samples without any finite row, from the loss elements `lengths` (B,)
        of all samples; and the number of rows that were run again.
    """
    method, rows, deltas, replayed = clean.method, results.rows, results.deltas, 0
    finite = deltas.isfinite()
    if not bool(finite.any()):
        raise NonFiniteError(
            f"All {len(rows)} perturbed rows of optimizer step {clean.place.step} have a "
            f"non-finite loss: lower perturbation_scale (now {method.scale:g}) or the learning "
            "rate, and look at the batch for NaN."
        )
    # A sample without queries is not a dropped one: its share of the mean is added back.
    kept = torch.bincount(rows.owner[~finite], minlength=clean.units) == 0
    kept |= torch.bincount(rows.owner[finite], minlength=clean.units) > 0
    if method.exchange.group.rank == 0:
        for mean in chain.means(kept.float()):
            sums.add_back(mean)
    whole = bool(finite.all())
    lacking = torch.zeros(len(rows)) if whole else rows.lacking(deltas, clean.units)
    coefficients = torch.where(finite, deltas * rows.weight, 0.0) + lacking
    corrections = lacking + torch.where(finite, (deltas - results.measured) * rows.weight, 0.0)

    def again(rows: Rows, coefficients: Tensor) -> None:
        nonlocal replayed
        replayed = queries_of(clean).sum_again(
            rows, coefficients, sums, ChunkPlanner(clean.planner.size)
        )

    sums.complete(rows, coefficients, torch.where(results.mine, corrections, 0.0), again)
    factor = 1.0 if whole else float(lengths.sum() / (lengths[kept].sum() or 1.0))
    return factor, replayed


def apply(
    clean: CleanPass, chain: Chain, update: Tensor, normalizer: float, *, last: bool
) -> tuple[float, float] | None:
    """Add the update (d,) and the head's exact gradient to `.grad`.

    Returns:
        Their squared norms, or None if only their sum over several batches is known, now or later.
    """
    method, head, exact, found = clean.method, clean.method.head, torch.zeros(1), clean.found
    if head is not None and found is not None:
        exact = head.gradient(found.head_inputs, found.own, found.losses) / normalizer
    put_off = method.exchange.pending
    reduced = method.exchange.reduce([update, exact, *chain.statistics()], last=last)
    if reduced is None:
        return None
    update, exact, *statistics = reduced
    method.perturbation.vector.add_to_gradients(update)
    if head is not None:
        head.vector.add_to_gradients(exact)
    squares = update.double().square().sum(), exact.square().sum()
    short = [i for i, each in enumerate(statistics) if each.dim() == 1]  # are read with them
    estimated, solved, *host = to_host(*squares, *(statistics[i] for i in short))
    for i, each in zip(short, host, strict=True):
        statistics[i] = each
    chain.finish(iter(statistics))
    return None if put_off else (float(estimated), float(solved))


def report(
    clean: CleanPass,
    features: SampleFeatures,
    results: QueryResults,
    signals: tuple[float, float] | None,
    normalizer: float,
    dimension: int,
    replayed: int,
    trace: UpdateRecord | None,
    elements: float,
) -> StepResult:
    """Return the result of the step: loss, cost, counts and metrics."""
    method, rows, units = clean.method, results.rows, clean.units
    counts, squares = results.counts(units), mean_squares(rows, results.deltas, units)
    facts = method.perturbation.shares_noise, dimension
    metrics = summarise(
        signals, squares / normalizer**2, counts, rows, results.deltas / normalizer, *facts
    )
    metrics |= gain_metrics(method.allocator, features)
    used = (len(rows) + replayed) * len(method.estimator.signs) * (clean.samples // units)
    used += clean.samples * method.needs_clean
    losses = results.losses(units) / counts if clean.losses is None else clean.losses.sums
    total = torch.where(losses.isfinite(), losses, 0.0).sum() / normalizer
    return StepResult(total.float(), used, counts, squares, metrics, trace, elements)
