"""Contrastive losses: images and texts, each tower with rows of its own."""

from __future__ import annotations

from .loss import ContrastiveBatch, ContrastiveLoss
from .selection import start_session
from .session import ContrastiveSession

__all__ = [
    "ContrastiveBatch",
    "ContrastiveLoss",
    "ContrastiveSession",
    "start_session",
]
