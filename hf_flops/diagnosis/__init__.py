"""What training would do with a model, a method and data, found by a short trial on a copy."""

from __future__ import annotations

from .diagnosis import Diagnosis, doctor

__all__ = [
    "Diagnosis",
    "doctor",
]
