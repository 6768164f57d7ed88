"""Feeds damaged and forged checkpoints, trajectory logs and recipe files to what reads them.

Each must be read or refused by an error of the library: no other exception, no hang (60 seconds an
example), no growth of memory.

    python scripts/fuzz.py trajectory --seconds 600
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hf_flops import FlopsArgumentsMixin
from hf_flops.errors import FlopsError
from hf_flops.trainer.checkpoint_state import STATE_FILE, TENSOR_FILE, load_state
from hf_flops.trainer.checkpoints import chosen_checkpoint
from hf_flops.trainer.integrity import MANIFEST, STATE, seal
from hf_flops.trajectory.framing import Appender, read
from hf_flops.trajectory.records import pack, unpack
from hf_flops.trajectory.replay import Replay
from recipes import vit
from tests.helpers.worker import build

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["__tensor__", "inf", "torch.optim.adamw.AdamW", "auto", "1e400"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3)


def paths(value: Any, before: tuple = ()) -> list[tuple]:
    """Return the path of every value of a nested state."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(*before, key) for key, _ in items[:50]]
    for key, inner in items[:50]:
        if isinstance(inner, (dict, list)):
            found += paths(inner, (*before, key))
    return found


def changed(state: Any, choice: Any) -> Any:
    """Return a state in which a value is another one, or gone."""
    state = copy.deepcopy(state)
    for _ in range(choice.draw(st.integers(1, 2))):
        *keys, last = choice.draw(st.sampled_from(paths(state)))
        inner = state
        for key in keys:
            inner = inner[key]
        if choice.draw(st.integers(0, 4)) == 0:
            del inner[last]
        else:
            inner[last] = choice.draw(ANYTHING)
        if not state:
            break
    return state


def flipped(content: bytes, flips: list[tuple[float, int]]) -> bytes:
    """Return bytes with some of them changed."""
    result = bytearray(content)
    for place, bits in flips:
        result[int(place * len(result))] ^= bits
    return bytes(result)


def of_checkpoint(scratch: Path) -> Callable[[Any], None]:
    """Return what resumes from a changed checkpoint, whose manifest a forger has adapted."""
    options = {"samples": 4, "size": 14, "max_steps": 3, "allocator": "optimal"}
    options |= {"rows_per_forward": "auto", "output_dir": str(scratch / "run")}
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate_search": True}
    build(options).train()
    source, folder = scratch / "run" / "checkpoint-2", scratch / "forged"
    trainer = build({**options, "save_strategy": "no", "output_dir": str(scratch / "again")})
    trainer.train(str(source))
    state = json.loads((source / STATE_FILE).read_text())

    def example(choice: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        kind = choice.draw(st.sampled_from(["value", "value", "bytes", "sealed bytes"]))
        if kind == "value":
            (folder / STATE_FILE).write_text(json.dumps(changed(state, choice)))
        else:
            names = [STATE_FILE, TENSOR_FILE, STATE, MANIFEST, "adapter_model.safetensors"]
            path = folder / choice.draw(st.sampled_from(names))
            path.write_bytes(flipped(path.read_bytes(), choice.draw(FLIPS)))
        if kind != "bytes":
            seal(folder)
        trainer._begin()
        checkpoint = chosen_checkpoint(str(folder), str(scratch), trainer.group)
        load_state(checkpoint, trainer._parts())
        for part in trainer._parts().values():
            part.state_dict()
        if choice.draw(st.integers(0, 9)) == 0:
            trainer.train(str(folder))

    return example


def of_log(scratch: Path) -> Callable[[Any], None]:
    """Return what replays a changed trajectory log with right checksums."""
    options = {"samples": 4, "size": 14, "max_steps": 2, "trajectory_log": True}
    build({**options, "output_dir": str(scratch / "run")}).train()
    records = list(read(scratch / "run" / "trajectory.log"))
    path = scratch / "forged.log"

    def example(choice: Any) -> None:
        forged = choice.draw(st.integers(0, len(records) - 1))
        file = Appender(path)
        for number, record in enumerate(records):
            payload = record.payload
            if number == forged and choice.draw(st.booleans()):
                kind, says, tensors = unpack(payload)
                payload = pack(kind, changed(says, choice), tensors)
            elif number == forged:
                payload = flipped(payload, choice.draw(FLIPS))
            file.append(record.step, payload)
        file.close()
        log = Replay(path)
        for _ in log.run():
            pass
        log.save(scratch / "adapter")

    return example


def of_recipe(scratch: Path) -> Callable[[Any], None]:
    """Return what reads a recipe's options from a YAML file."""
    path, written = scratch / "recipe.yaml", (ROOT / "recipes" / "vit.yaml").read_text()
    names = sorted({*yaml.safe_load(written), *FlopsArgumentsMixin.__dataclass_fields__})
    names += ["seed", "optim", "max_steps", "report_to", "fsdp", "lr_scheduler_kwargs", "x"]
    pairs = st.dictionaries(st.sampled_from(names), ANYTHING, max_size=4)

    def example(choice: Any) -> None:
        kind = choice.draw(st.sampled_from(["options", "text", "bytes"]))
        if kind == "options":
            path.write_text(yaml.safe_dump({"use_cpu": True, **choice.draw(pairs)}))
        elif kind == "text":
            path.write_text(choice.draw(st.text(max_size=60)), encoding="utf-8")
        else:
            path.write_bytes(flipped(written.encode(), choice.draw(FLIPS)))
        with suppress(SystemExit):  # argparse has said why
            vit.parse([str(path)])

    return example


TARGETS = {"state": of_checkpoint, "trajectory": of_log, "recipe": of_recipe}


class HungError(BaseException):
    """An example takes too long; no handler of exceptions may take this for one."""


def hung(*_: object) -> None:
    """End an example that takes too long."""
    raise HungError("an example has taken 60 seconds")


def fuzz(name: str, seconds: float) -> None:
    """Run examples of a target for some time, and print what they came to."""
    counts, start = {"examples": 0, "refused": 0}, time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="hf_flops_fuzz_"))
    process, first = psutil.Process(), 0.0
    signal.signal(signal.SIGALRM, hung)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        example = TARGETS[name](scratch)
        while time.monotonic() - start < seconds:
            checks = [
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.large_base_example,
            ]

            @seed(random.randrange(2**32))
            @settings(max_examples=50, deadline=None, database=None, suppress_health_check=checks)
            @given(choice=st.data())
            def batch(choice: Any) -> None:
                signal.alarm(60)
                counts["examples"] += 1
                try:
                    example(choice)
                except FlopsError:
                    counts["refused"] += 1
                finally:
                    signal.alarm(0)

            batch()
            first = first or process.memory_info().rss / 2**20
    last = process.memory_info().rss / 2**20
    shutil.rmtree(scratch)
    print(
        f"{name}: {counts['examples']} examples in {time.monotonic() - start:.0f} s, "
        f"{counts['refused']} refused in a sentence, the others read; memory {first:.0f} MiB after "
        f"the first 50, {last:.0f} MiB at the end"
    )


def main() -> None:
    """Fuzz one target, or all one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600)
    chosen = parser.parse_args()
    for name in [chosen.target] if chosen.target else TARGETS:
        fuzz(name, chosen.seconds)


if __name__ == "__main__":
    main()
