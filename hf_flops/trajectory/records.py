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
from ..base.state import State, number, raw_bytes, whole
from ..perturbations.replay import UpdateRecord
from .limits import check_chunks
from .rules import Description

_WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)


def pack(kind: str, says: State, tensors: Mapping[str, Tensor]) -> bytes:
    """Return a record's payload."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(plain, {"kind": kind, "json": json.dumps(says, separators=(",", ":"), default=str)})


def unpack(payload: bytes) -> tuple[str, State, dict[str, Tensor]]:
    """Return a record's kind, metadata and tensors."""
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    return metadata["kind"], json.loads(metadata["json"]), load(payload)


def fingerprint(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(raw_bytes(tensor))


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
        """Return the payload: 6 to 12 bytes per query, 4 per tensor, and about 600 more."""
        traces = self.traces
        says = {
            "seed": self.seed,
            "step": self.step,
            "groups": self.groups,
            "batches": [[len(t.rows), len(t.chunks), t.normalizer, t.factor] for t in traces],
            **({} if self.rules is None else {"rules": self.rules}),
        }
        tensors = {
            "fingerprints": torch.tensor(self.fingerprints, dtype=torch.int64).to(torch.int32)
        }
        if traces:
            tensors |= {
                "coefficients": torch.cat([t.coefficients for t in traces]),
                "positions": narrow(torch.cat([t.rows.owner + t.position for t in traces])),
                "queries": narrow(torch.cat([t.rows.query for t in traces])),
                "chunks": narrow(torch.tensor([length for t in traces for length in t.chunks])),
            }
            if self.shares_noise:
                firsts = [torch.tensor([0, *t.chunks[:-1]]).cumsum(0) for t in traces]
                groups = [t.rows.group[first] for t, first in zip(traces, firsts, strict=True)]
                tensors["groups"] = narrow(torch.cat(groups))
        return pack("step", says, tensors)

    @classmethod
    def unpack(cls, says: State, tensors: Mapping[str, Tensor], parameters: int = 0) -> StepRecord:
        """Return the record of a run of so many parameters from the results of `unpack`."""
        traces, row, chunk = [], 0, 0
        whole(says["seed"], -(2**63))
        whole(says["step"])
        for size, count, normalizer, factor in says["batches"]:
            number(factor, 0)
            number(normalizer, 1e-300)
            batch, chunks = slice(row, row + whole(size)), slice(chunk, chunk + whole(count))
            lengths = tensors["chunks"][chunks].long()
            check_chunks(lengths.tolist(), size, 1 if "groups" in tensors else parameters)
            groups = tensors["groups"][chunks].long() if "groups" in tensors else 0 * lengths
            rows = Rows(
                tensors["positions"][batch].long(),
                tensors["queries"][batch].long(),
                groups.repeat_interleave(lengths),
                torch.ones(size),
            )
            coefficients = tensors["coefficients"][batch]
            traces.append(UpdateRecord(rows, coefficients, lengths.tolist(), 0, factor, normalizer))
            row, chunk = batch.stop, chunks.stop
        return cls(
            says["seed"],
            says["step"],
            traces,
            says.get("rules"),
            says["groups"],
            [value % 2**32 for value in tensors["fingerprints"].tolist()],
            "groups" in tensors,
        )


def changes(before: Sequence[State], now: Sequence[State]) -> list[State]:
    """Return the optimizer's arguments that changed, by group; all where there were none."""
    if len(before) != len(now):
        return [dict(group) for group in now]
    return [
        {name: value for name, value in new.items() if name not in old or old[name] != value}
        for old, new in zip(before, now, strict=True)
    ]
