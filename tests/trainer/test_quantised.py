"""Quantised bases train with forward passes, and neither training nor saving changes them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_flops import FlopsTrainer
from hf_flops.trainer.preparation import evaluation_mode
from hf_flops.trainer.quantised import keep_unpacked
from tests.helpers.runs import adapted
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model, training_arguments
from tests.trainer.test_precision import CONFIGS, arguments


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        return F.linear(x, weight.to(x.dtype) * scale, bias)

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("there is no backward pass")


class Int8Linear(nn.Linear):
    """A linear layer with a weight of whole numbers, one scale per output, and no backward pass."""

    @classmethod
    def of(cls, linear):
        module = cls(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        module.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        module.register_buffer("scale", scale)
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return module

    def forward(self, x):
        return NoBackward.apply(x, self.weight, self.scale, self.bias)


def quantised(kind):
    """Build a tiny model that calls itself quantised, by a method that cannot train."""
    model = tiny_model(kind)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in ("classifier", "lm_head"):
                setattr(parent, name, Int8Linear.of(child))
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=False, quantization_config=SimpleNamespace(quant_method="int8")
    )
    return model


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("vit", "lora"), ("llama", "lora"), ("llama", "ln_tuning"), ("llama", "prompt")],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of norms
def test_quantised_bases_that_backprop_refuses_train(kind, adapter, tmp_path):
    data = as_dataset(tiny_batch(kind, 8))
    model = get_peft_model(quantised(kind), CONFIGS[adapter](kind))
    with pytest.raises(AssertionError, match="no backward"):
        model(**tiny_batch(kind, 4)).loss.backward()
    trainer = FlopsTrainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data)
    assert not getattr(trainer.model, "_hf_peft_config_loaded", False)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05


def test_a_quantised_base_takes_an_adapter_from_the_trainer(tmp_path):
    trainer = FlopsTrainer(
        quantised("vit"),
        arguments(tmp_path, max_steps=1),
        train_dataset=as_dataset(tiny_batch("vit", 8)),
        peft_config=CONFIGS["lora"]("vit"),
    )
    trainer.train()
    assert trainer.ledger.rows == 64


# --- layers of bitsandbytes, without it ---


class Packing(nn.Linear):
    """What bitsandbytes' 4-bit layers do on processors with bfloat16 products: the first forward in
    evaluation mode packs them for good, and `state_dict` unpacks all but the order of the scales.
    """

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, False)
        self.support_avx512bf16_for_cpu = True
        blocks = plain.weight.detach().view(plain.out_features, 2, -1)
        scales = blocks.abs().amax(2) / 7
        self.weight = nn.Parameter((blocks / scales[..., None]).round(), False)
        self.weight.quant_state = SimpleNamespace(
            absmax=scales.flatten(), packing_format_for_cpu=False
        )

    def _save_to_state_dict(self, *args):
        self.weight.quant_state.packing_format_for_cpu = False
        super()._save_to_state_dict(*args)

    def forward(self, x):
        state, kind = self.weight.quant_state, x.dtype
        packs = self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        if packs and not state.packing_format_for_cpu:
            state.absmax = state.absmax.reshape(-1, 2).T.bfloat16()
            state.packing_format_for_cpu = True
        if state.packing_format_for_cpu:
            scales, kind = state.absmax.T, torch.bfloat16
        else:
            scales = state.absmax.reshape(-1, 2)
        weight = (self.weight * scales[..., None]).flatten(1)
        return F.linear(x.to(kind), weight.to(kind)).to(x.dtype)


class Rounding(nn.Linear):
    """What bitsandbytes' 8-bit layers do on CPUs: in evaluation mode they round activations."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, False)
        self.weight = nn.Parameter(plain.weight.detach(), False)
        self.state = SimpleNamespace(has_fp16_weights=False)

    def forward(self, x):
        return super().forward(x if self.training else (16 * x).round() / 16)


def replaced(layer, **sizes):
    """Build a tiny Llama with layers of another kind."""
    model = tiny_model("llama", **sizes)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, layer(child))
    return model


@torch.no_grad()
def loss(model):
    return float(model(**tiny_batch("llama", 4)).loss)


def test_layers_that_were_packed_by_an_evaluation_are_unpacked():
    model = replaced(Packing).train()
    exact = loss(model)
    packed = loss(model.eval())
    damaged = replaced(Packing).eval()
    assert loss(damaged) == packed
    damaged.state_dict()
    assert abs(loss(damaged) - packed) > 0.1  # the stand-in does what it should
    keep_unpacked(model)
    model.state_dict()
    assert loss(model.eval()) == loss(model.train())
    assert loss(model) == pytest.approx(exact, abs=0.02)


def test_layers_that_round_in_evaluation_mode_only_stay_in_training_mode():
    model = adapted("llama", replaced(Rounding), dropout=0.5)
    exact = loss(adapted("llama", dropout=0.5).eval())
    assert loss(model.eval()) != exact
    for training in (False, True):
        model.train(training)
        with evaluation_mode(model):
            assert loss(model) == exact
        assert {module.training for module in model.modules()} == {training}


def unchanged(model, fresh, folder):
    """Train a few steps by default, and assert that nothing but the adapter is new."""
    data = as_dataset(tiny_batch("llama", 8))
    args = training_arguments(
        folder, max_steps=2, per_device_train_batch_size=4, learning_rate=0.01
    )
    trainer = FlopsTrainer(adapted("llama", model), args, train_dataset=data, eval_dataset=data)
    trainer.evaluate()
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    trainer.save_model(folder)
    assert trainer.evaluate()["eval_loss"] == found
    assert trainer.session.tuning.scale <= 1e-3  # no rounding was seen
    loaded = PeftModel.from_pretrained(fresh, folder, is_trainable=True)
    again = FlopsTrainer(loaded, args, train_dataset=data, eval_dataset=data)
    assert again.evaluate()["eval_loss"] == found


@pytest.mark.parametrize("layer", [Packing, Rounding])
def test_a_run_leaves_the_base_as_it_was(layer, tmp_path, caplog):
    unchanged(replaced(layer), replaced(layer), tmp_path)
    assert not caplog.records


# --- the libraries, where they are installed ---


def four_bits(double):
    def layer(plain):
        import bitsandbytes

        own = bitsandbytes.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=False,
            quant_type="nf4",
            compress_statistics=double,
        )
        own.load_state_dict(plain.state_dict())
        return own.to("cpu")

    return replaced(layer, **SIZES)


def eight_bits():
    def layer(plain):
        import bitsandbytes

        own = bitsandbytes.nn.Linear8bitLt(
            plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        own.load_state_dict(plain.state_dict())
        return own.to("cpu")

    return replaced(layer, **SIZES)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model("llama", **SIZES)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def quanto():
    from optimum.quanto import freeze, qint4, quantize

    model = tiny_model("llama", **SIZES)
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    return model


SIZES = {"hidden_size": 128, "intermediate_size": 128}
LIBRARIES = {
    "nf4": ("bitsandbytes", partial(four_bits, double=False)),
    "nf4, double": ("bitsandbytes", partial(four_bits, double=True)),
    "int8": ("bitsandbytes", eight_bits),
    "torchao": ("torchao", torchao),
    "quanto": ("optimum.quanto", quanto),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_leaves_a_librarys_base_as_it_was(name, tmp_path):
    package, build = LIBRARIES[name]
    pytest.importorskip(package)
    unchanged(build(), build(), tmp_path)
