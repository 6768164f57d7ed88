"""A trajectory log may come from a stranger: whatever it says, it is replayed or refused in a
sentence.
"""

import copy
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flops import FlopsTrainer, TrajectoryError
from hf_flops.trajectory.base import check_base
from hf_flops.trajectory.framing import Appender, read
from hf_flops.trajectory.records import pack, unpack
from hf_flops.trajectory.replay import Replay, replay
from hf_flops.trajectory.verify import verify
from tests.helpers.runs import adapted, data
from tests.helpers.tiny import training_arguments


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"per_device_train_batch_size": 4, "queries_per_sample": 4, "max_steps": 2}
    args = training_arguments(
        folder, trajectory_log=True, save_strategy="steps", save_steps=2, **options
    )
    FlopsTrainer(adapted(), args, train_dataset=data()).train()
    found = [(record.step, *unpack(record.payload)) for record in read(folder / "trajectory.log")]
    return found, folder / "checkpoint-2"


def forged(path, records):
    """Write a log whose checksums are right."""
    file = Appender(path)
    for step, kind, says, tensors in records:
        file.append(step, pack(kind, says, tensors))
    file.close()
    return path


def changed(records, kind, keys, value):
    records = copy.deepcopy(records)
    says = next(record[2] for record in records if record[1] == kind)
    for key in keys[:-1]:
        says = says[key]
    says[keys[-1]] = value
    return records


FORGERIES = [
    ("session", ("threads",), 10**6),
    ("session", ("threads",), "2"),
    ("session", ("optimizer", "class"), "torch.optim.lr_scheduler.LambdaLR"),
    ("session", ("optimizer", "class"), "torch.optim.optimizer.warnings.warn"),
    ("session", ("optimizer", "class"), ["torch.optim.adamw.AdamW"]),
    ("session", ("optimizer", "groups"), [["nobody"]]),
    ("session", ("max_grad_norm",), "much"),
    ("session", ("device",), "opengl"),
    ("start", ("tensors",), {}),
    ("start", ("trainable",), [["a"]]),
    ("start", ("adapter", "files"), {"weight": "nobody"}),
    ("step", ("batches",), [[10**9, 1, 1.0, 1.0]]),
    ("step", ("batches",), [[16, 1, 0.0, 1.0]]),
    ("step", ("batches",), [["16", 1, 1.0, 1.0]]),
    ("step", ("groups",), [{"lr": "fast"}, {"params": 3}]),
    ("step", ("rules",), [["rowwise", "cauchy", []]]),
    ("step", ("seed",), None),
]


@pytest.mark.parametrize(("kind", "keys", "value"), FORGERIES)
def test_a_forged_log_is_refused_in_a_sentence(kind, keys, value, records, tmp_path):
    threads = torch.get_num_threads()
    path = forged(tmp_path / "log", changed(records[0], kind, keys, value))
    with pytest.raises(TrajectoryError, match=r"is damaged or forged: .*\.|none that can be"):
        replay(path)
    assert torch.get_num_threads() == threads


def test_a_forged_log_asks_for_no_more_memory_than_a_run(records, tmp_path):
    forgery = copy.deepcopy(records[0])
    says = forgery[0][2]
    name = says["trainable"][0]
    says["tensors"][name][0] = [2**20, 2**20]
    says["zero"] = [*says["zero"], name]
    with pytest.raises(TrajectoryError, match="is no whole number from 0 to 2147483648"):
        replay(forged(tmp_path / "log", forgery))
    file = (tmp_path / "log").read_bytes()
    (tmp_path / "long").write_bytes(file[:8] + file[8:16])
    assert list(read(tmp_path / "long")) == []


def test_a_group_keeps_its_parameters(records, tmp_path):
    forgery = copy.deepcopy(records[0])
    for _, kind, says, _ in forgery:
        if kind == "step" and says["groups"]:
            says["groups"][0]["params"] = []
    assert replay(forged(tmp_path / "log", forgery)).step == 2


@pytest.mark.parametrize("kind", ["pipeline", "logging", "TrainingArguments", 3, None])
def test_only_a_model_is_called_as_a_base(kind, records):
    says = copy.deepcopy(records[0][0][2])
    says["base"]["class"] = kind
    with pytest.raises(TrajectoryError):
        check_base(says, "nowhere")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def paths(says, before=()):
    """Yield the path of every value of a nested state."""
    items = says.items() if isinstance(says, dict) else enumerate(says)
    for key, value in items:
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*before, key))


@settings(max_examples=80)
@given(choice=st.data(), value=anything)
def test_any_value_of_a_log_may_be_anything(records, tmp_path_factory, choice, value):
    found, checkpoint = records
    kind = choice.draw(st.sampled_from(["start", "session", "step"]))
    says = next(record[2] for record in found if record[1] == kind)
    keys = choice.draw(st.sampled_from(sorted(paths(says), key=str)))
    path = forged(tmp_path_factory.mktemp("log") / "log", changed(found, kind, keys, value))
    # nothing else comes out
    with suppress(TrajectoryError):
        log = Replay(path)
        for record in log.run():
            assert record.fingerprints
        log.save(path.parent / "adapter")
        verify(path, checkpoint)
