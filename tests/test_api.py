"""The public API is frozen: names, and what parameters are called.

`python -m tests.test_api` writes the record anew.
"""

import inspect
from pathlib import Path

import hf_flops

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("public_api.txt")


def described():
    """Yield one line for each public name, and for the public methods that a class of ours adds."""
    for name in hf_flops.__all__:
        value = getattr(hf_flops, name)
        yield name + _signature(value)
        if inspect.isclass(value) and not issubclass(value, Exception):
            own = {
                key: member
                for key, member in vars(value).items()
                if callable(member) and not key.startswith("_")
            }
            yield from (f"{name}.{key}{_signature(own[key])}" for key in sorted(own))


def _signature(value):
    if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
        return ""
    names = inspect.signature(value).parameters
    fields = getattr(value, "__dataclass_fields__", {})
    if fields and "output_dir" in fields:  # the stock arguments are not ours to freeze
        ours = hf_flops.FlopsArgumentsMixin.__dataclass_fields__
        names = [name for name in names if name in ours]
    return f"({', '.join(names)})"


def test_names_and_parameters_are_those_of_the_record():
    assert list(described()) == RECORD.read_text().splitlines(), (
        "on purpose? then: python -m tests.test_api, and the changelog"
    )


def test_types_are_shipped():
    assert (ROOT / "hf_flops" / "py.typed").is_file()
    rules = [
        path.read_text() for path in (ROOT / "pyproject.toml", ROOT / "setup.py") if path.is_file()
    ]
    assert any("py.typed" in rule for rule in rules)


if __name__ == "__main__":
    RECORD.write_text("\n".join(described()) + "\n")
