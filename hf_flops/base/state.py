"""The type of what checkpoints and logs hold."""

from __future__ import annotations

from typing import Any, TypeAlias

State: TypeAlias = dict[str, Any]
"""Plain values by name, which JSON can hold; the state of a part may hold tensors among them."""
