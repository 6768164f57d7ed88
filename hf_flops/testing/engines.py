"""What every inference engine must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class EngineContract:
    """Derive a class `Test...` that defines `make`; pytest then runs the contract.

    An engine maps `inputs_embeds` (R, T, D) float32, `attention_mask` (R, T) int64, padded at the
    right, and C tokens to the scores (R, C) of these tokens after each row's last real token:
    logits, up to a constant for each row.

    Examples:
        >>> class TestSums(EngineContract):
        ...     def make(self):
        ...         def engine(embeds, mask, tokens):
        ...             return (embeds * mask[..., None]).sum(1)[:, tokens]
        ...         return engine, 4, 4
        >>> TestSums().test_padding_does_not_matter()
    """

    tolerance = 1e-4  # of the largest difference of scores
    tokens = (2, 0, 3)

    def make(self) -> tuple[Callable[[Tensor, Tensor, Sequence[int]], Tensor], int, int]:
        """Return the engine, the width D of its embeddings, and the size V of its vocabulary."""
        raise NotImplementedError("Define make(self), which returns (engine, width, vocabulary).")

    def rows(self, width: int, columns: int = 5) -> tuple[Tensor, Tensor]:
        """Draw embeddings (3, T, D) of rows with 5, 2 and 3 real tokens, and their mask (3, T)."""
        embeds = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(columns) < torch.tensor([[5], [2], [3]])).long()
        return torch.nn.functional.pad(embeds, (0, 0, 0, columns - 5)), mask

    def test_a_row_of_scores_for_each_row(self) -> None:
        """Scores are (R, C), float32, finite, and the same when they are asked for again."""
        engine, width, _ = self.make()
        scores = engine(*self.rows(width), self.tokens)
        assert scores.shape == (3, 3), f"{tuple(scores.shape)}, not (3, 3)"
        assert scores.dtype == torch.float32, f"{scores.dtype}, not float32"
        assert bool(scores.isfinite().all()), "a score is not finite"
        self.assert_close(
            engine(*self.rows(width), self.tokens), scores, "the scores of a second call"
        )

    def test_scores_are_those_of_the_tokens(self) -> None:
        """A token's score does not depend on which others are asked for, or in which order."""
        engine, width, vocabulary = self.make()
        rows = self.rows(width)
        wanted = engine(*rows, self.tokens)
        others = [self.tokens[2], self.tokens[0]]
        self.assert_close(engine(*rows, others), wanted[:, [2, 0]], f"the scores of {others}")
        last = engine(*rows, [vocabulary - 1, self.tokens[0]])
        assert last.shape == (3, 2), f"{tuple(last.shape)}, not (3, 2)"

    def test_padding_does_not_matter(self) -> None:
        """More padding at the right, or other numbers in it, leave scores as they are."""
        engine, width, _ = self.make()
        wanted = engine(*self.rows(width), self.tokens)
        embeds, mask = self.rows(width, columns=8)
        more = engine(embeds, mask, self.tokens)
        self.assert_close(more, wanted, "the scores of rows with more padding")
        filled = torch.where(mask[..., None].bool(), embeds, 3.0)
        other = engine(filled, mask, self.tokens)
        self.assert_close(other, wanted, "the scores of rows with other padding")

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """In any order, repeated, or alone, a row has the same scores."""
        engine, width, _ = self.make()
        embeds, mask = self.rows(width)
        wanted = engine(embeds, mask, self.tokens)
        for index in ([2, 0, 1], [0, 0, 1], [1]):
            found = engine(embeds[index], mask[index], self.tokens)
            self.assert_close(found, wanted[index], f"the scores of rows {index}")

    def assert_close(self, scores: Tensor, wanted: Tensor, what: str) -> None:
        """Compare scores (R, C), up to a constant for each row."""
        scores, wanted = (values - values[:, :1] for values in (scores, wanted))
        error = float((scores - wanted).abs().max())
        assert error <= self.tolerance * float(wanted.abs().max()), f"{what} differ by {error:.3g}"
