"""What every inference engine must do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EngineContract:
    """Derive a class `Test...` that defines `make`; pytest then runs the contract.

    An engine maps `inputs_embeds` (R, T, D) float32 and `attention_mask` (R, T) int64, padded at
    the right, to the logits (R, V) of what follows each row's last real token.

    Example:
        >>> class TestSums(EngineContract):
        ...     def make(self):
        ...         return lambda embeds, mask: (embeds * mask[..., None]).sum(1).float(), 4, 4
        >>> TestSums().test_padding_does_not_matter()
    """

    tolerance = 1e-4  # of the largest logit

    def make(self) -> tuple[Callable[[Tensor, Tensor], Tensor], int, int]:
        """Return the engine, the width D of its embeddings, and the size V of its vocabulary."""
        raise NotImplementedError("Define make(self), which returns (engine, width, vocabulary).")

    def rows(self, width: int, columns: int = 5) -> tuple[Tensor, Tensor]:
        """Draw embeddings (3, T, D) of rows with 5, 2 and 3 real tokens, and their mask (3, T)."""
        embeds = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(columns) < torch.tensor([[5], [2], [3]])).long()
        return torch.nn.functional.pad(embeds, (0, 0, 0, columns - 5)), mask

    def test_a_row_of_logits_for_each_row(self) -> None:
        """Logits are (R, V), float32, finite, and the same when they are asked for again."""
        engine, width, vocabulary = self.make()
        logits = engine(*self.rows(width))
        assert logits.shape == (3, vocabulary), f"{tuple(logits.shape)}, not (3, {vocabulary})"
        assert logits.dtype == torch.float32, f"{logits.dtype}, not float32"
        assert bool(logits.isfinite().all()), "a logit is not finite"
        self.assert_close(engine(*self.rows(width)), logits, "the logits of a second call")

    def test_padding_does_not_matter(self) -> None:
        """More padding at the right, or other numbers in it, leave logits as they are."""
        engine, width, _ = self.make()
        wanted, (embeds, mask) = engine(*self.rows(width)), self.rows(width, columns=8)
        self.assert_close(engine(embeds, mask), wanted, "the logits of rows with more padding")
        filled = torch.where(mask[..., None].bool(), embeds, 3.0)
        self.assert_close(engine(filled, mask), wanted, "the logits of rows with other padding")

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """In any order, repeated, or alone, a row has the same logits."""
        engine, width, _ = self.make()
        embeds, mask = self.rows(width)
        wanted = engine(embeds, mask)
        for index in ([2, 0, 1], [0, 0, 1], [1]):
            self.assert_close(
                engine(embeds[index], mask[index]), wanted[index], f"the logits of rows {index}"
            )

    def assert_close(self, logits: Tensor, wanted: Tensor, what: str) -> None:
        """Compare logits (R, V)."""
        error = float((logits - wanted).abs().max())
        assert error <= self.tolerance * float(wanted.abs().max()), f"{what} differ by {error:.3g}"
