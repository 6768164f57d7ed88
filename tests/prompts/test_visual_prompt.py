"""Visual prompts: borders and tokens, on any vision model."""

import pytest
import torch

from hf_flops import (
    ConfigurationError,
    FlopsTrainer,
    FlopsTrainingArguments,
    ObjectiveError,
    VisualPrompt,
)
from tests.helpers.pairs import as_pairs, collate, pair_batch, pair_model
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model

CASES = [(model, kind) for model in ("vit", "clip", "siglip") for kind in ("border", "tokens")]


def prompted(name, kind, size=1):
    if name == "vit":
        return VisualPrompt(tiny_model("vit"), kind, size)
    model = pair_model(name).requires_grad_(False)
    model.vision_model = VisualPrompt(model.vision_model, kind, size)
    return model


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_prompts_are_trained_with_noise_per_row(name, kind, tmp_path, caplog):
    model = prompted(name, kind)
    data, options = as_dataset(tiny_batch("vit", 8)), {}
    if name != "vit":
        data, options = as_pairs(pair_batch(8)), {"data_collator": collate}
    args = FlopsTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        queries_per_sample=6,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        perturbation="rowwise",  # an error where the rule were wrong
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FlopsTrainer(model=model, args=args, train_dataset=data, **options).train()
    moved = [
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert [name.rpartition("prompt.")[2] for name in moved] == ["weight"]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_border_changes_the_outermost_pixels_only():
    model = VisualPrompt(tiny_model("vit"), "border", 2)
    images = tiny_batch("vit")["pixel_values"]
    assert torch.equal(model(images).logits, model.vision_model(images).logits)  # it starts at zero
    torch.nn.init.constant_(model.prompt.weight, 3.0)
    received = []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs["pixel_values"]), with_kwargs=True
    )
    model(images)
    change = received[0] - images
    assert torch.equal(change[:, :, 2:-2, 2:-2], torch.zeros(4, 3, 4, 4))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:-2, 2:-2] = True
    torch.testing.assert_close(change[:, :, ~inside], torch.full((4, 3, 48), 3.0))


def test_tokens_are_added_and_nothing_is_left_behind():
    model = VisualPrompt(tiny_model("vit"), "tokens", 3)
    images = tiny_batch("vit")["pixel_values"]
    plain, out = (
        part(images, output_hidden_states=True).hidden_states[0]
        for part in (model.vision_model, model)
    )
    torch.testing.assert_close(out[:, :-3], plain)
    torch.testing.assert_close(out[:, -3:], model.prompt.weight.expand(4, -1, -1))


def test_bad_prompts_are_one_clear_sentence():
    vit = tiny_model("vit")
    with pytest.raises(ConfigurationError, match="kind='frame'"):
        VisualPrompt(vit, "frame")
    with pytest.raises(ConfigurationError, match="covers an image of 8 x 8"):
        VisualPrompt(vit, "border", 4)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"Linear has no config.image_size"):
        VisualPrompt(model)
    model.config = vit.config
    with pytest.raises(ConfigurationError, match="has no module called embeddings"):
        VisualPrompt(model, "tokens")
    with pytest.raises(ObjectiveError, match="for images of"):
        VisualPrompt(vit, "border", 1)(torch.zeros(1, 3, 16, 16))
