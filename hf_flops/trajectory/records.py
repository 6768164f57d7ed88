"""The records of a trajectory log: safetensors with JSON metadata; no code in them is executed.

The first record describes the start of the run; then there is one for each session (a start or a
resume) and one for each optimizer step.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..base.rows import Rows
from ..base.state import State
from ..perturbations.replay import UpdateRecord
from .rules import Description

_WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)


def pack(kind: str, says: State, tensors: Mapping[str, Tensor]) -> bytes:
    """Return a record's payload."""
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(whole, {"kind": kind, "json": json.dumps(says, separators=(",", ":"), default=str)})


def unpack(payload: bytes) -> tuple[str, State, dict[str, Tensor]]:
    """Return a record's kind, metadata and tensors."""
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    return metadata["kind"], json.loads(metadata["json"]), load(payload)


def fingerprint(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def narrow(values: Tensor) -> Tensor:
    """Return non-negative integers in the smallest dtype that fits."""
    most = int(values.max()) if len(values) else 0
    return values.to(next(kind for kind in _WHOLE if most <= torch.iinfo(kind).max))


@dataclass
class StepRecord:
    """An optimizer step.

    Attributes:
        seed: of the noise.
        step: optimizer steps done before it.
        traces: of its batches; empty if its gradients were dropped.
        rules: of the perturbation, if they changed; see `Description`.
        groups: changes of the optimizer's arguments, by group; all arguments in a session's first
            step.
        fingerprints: (P,) of the trainable tensors after it.
        shares_noise: whether rows of a chunk share noise, so that their group matters.
    """

    seed: int
    step: int
    traces: list[UpdateRecord]
    rules: Description | None
    groups: list[State]
    fingerprints: list[int]
    shares_noise: bool = field(default=True)

    def pack(self) -> bytes:
        """Return the record's payload: 6 to 12 bytes per query, 4 per tensor, and about 600 for the
        rest.
        """
        traces = self.traces
        says: State = {"seed": self.seed, "step": self.step, "groups": self.groups}
        says["batches"] = [[len(t.rows), len(t.chunks), t.normalizer, t.factor] for t in traces]
        if self.rules is not None:
            says["rules"] = self.rules
        tensors = {
            "fingerprints": torch.tensor(self.fingerprints, dtype=torch.int64).to(torch.int32)
        }
        if traces:
            firsts = [torch.tensor([0, *t.chunks[:-1]]).cumsum(0) for t in traces]
            tensors["coefficients"] = torch.cat([t.coefficients for t in traces])
            tensors["positions"] = narrow(torch.cat([t.rows.owner + t.position for t in traces]))
            tensors["queries"] = narrow(torch.cat([t.rows.query for t in traces]))
            tensors["chunks"] = narrow(
                torch.tensor([length for t in traces for length in t.chunks])
            )
            if self.shares_noise:
                groups = [t.rows.group[first] for t, first in zip(traces, firsts, strict=True)]
                tensors["groups"] = narrow(torch.cat(groups))
        return pack("step", says, tensors)

    @classmethod
    def unpack(cls, says: State, tensors: Mapping[str, Tensor]) -> StepRecord:
        """Return the record from the results of `unpack`."""
        prints = [value % 2**32 for value in tensors["fingerprints"].tolist()]
        sizes = [size for size, _, _, _ in says["batches"]]
        cut = (
            [list(tensors[name].split(sizes)) for name in ("positions", "queries", "coefficients")]
            if sizes
            else [[]] * 3
        )
        traces, chunks = [], tensors["chunks"].tolist() if sizes else []
        groups = tensors.get("groups", torch.zeros(len(chunks))).long()
        for (_, count, normalizer, factor), positions, queries, coefficients in zip(
            says["batches"], *cut, strict=True
        ):
            lengths, chunks = chunks[:count], chunks[count:]
            own, groups = groups[:count].repeat_interleave(torch.tensor(lengths)), groups[count:]
            rows = Rows(positions.long(), queries.long(), own, torch.ones(len(positions)))
            traces.append(UpdateRecord(rows, coefficients, lengths, 0, factor, normalizer))
        return cls(
            says["seed"],
            says["step"],
            traces,
            says.get("rules"),
            says["groups"],
            prints,
            "groups" in tensors,
        )


def changes(before: Sequence[State], now: Sequence[State]) -> list[State]:
    """Return by group which of the optimizer's arguments are not what they were; everything where
    nothing was before.
    """
    if len(before) != len(now):
        return [dict(group) for group in now]
    return [
        {name: value for name, value in new.items() if name not in old or old[name] != value}
        for old, new in zip(before, now, strict=True)
    ]
