"""Batches of Qwen-VL: the patches of all images one after the other."""

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hf_flops import FlopsTrainer
from hf_flops.base.batch import take
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import SharedNoise
from hf_flops.trainer.layout import Layout, with_own_patches
from tests.helpers.tiny import training_arguments

IMAGE, LENGTH = 5, 9
# the sizes of each sample's images, in patches; four patches are a token
SIZES = [[(4, 4)], [(2, 4), (2, 2)], [], [(2, 2)]]


def model():
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        },
    }
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 1,
        "patch_size": 2,
        "temporal_patch_size": 1,
        "in_channels": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
        return Qwen2VLForConditionalGeneration(config).eval()


def sample(number):
    random = torch.Generator().manual_seed(number)
    grids = torch.tensor([(1, *size) for size in SIZES[number]], dtype=torch.int64).reshape(-1, 3)
    kinds = torch.zeros(LENGTH, dtype=torch.int64)
    start = 1
    for grid in grids:  # a word between two images
        kinds[start : start + int(grid.prod()) // 4] = 1
        start += int(grid.prod()) // 4 + 1
    words = torch.randint(6, 40, (LENGTH,), generator=random)
    tokens = torch.where(kinds == 1, IMAGE, words)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": kinds,
        "labels": torch.where(kinds == 1, -100, tokens),
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 4, generator=random),
        "image_grid_thw": grids,
    }


def collate(samples):
    patches = {"pixel_values", "image_grid_thw"}
    return {
        name: (torch.cat if name in patches else torch.stack)([each[name] for each in samples])
        for name in samples[0]
    }


@torch.no_grad()
def test_rows_have_the_images_of_their_samples():
    batch, network, layout = collate([sample(i) for i in range(4)]), model(), Layout()
    inputs = with_own_patches(batch)
    assert [len(each) for each in inputs["pixel_values"]] == [16, 12, 0, 4]
    for name, value in layout.restored(inputs).items():
        assert torch.equal(value, batch[name])

    def forward(rows):
        outputs = network(**layout.restored(rows), use_cache=False)
        return outputs.loss, outputs

    owner = [3, 1, 1, 2, 0]
    losses = TappedLoss()(forward, take(inputs, torch.tensor(owner)))
    for row, number in enumerate(owner):
        alone = {name: value for name, value in collate([sample(number)]).items() if len(value)}
        wanted = network(**alone, use_cache=False).loss
        torch.testing.assert_close(losses.sums[row] / losses.counts[row], wanted)


def test_patches_that_do_not_fit_the_tokens_stay_as_they_are():
    batch = collate([sample(i) for i in range(4)])
    wrong = {**batch, "mm_token_type_ids": batch["mm_token_type_ids"].roll(1, 0)}
    assert with_own_patches(wrong) is wrong
    words = {name: batch[name] for name in ("input_ids", "labels")}
    assert with_own_patches(words) is words


@pytest.mark.filterwarnings("ignore")
def test_it_trains_with_noise_per_row(tmp_path, caplog):
    args = training_arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        queries_per_sample=4,
        remove_unused_columns=False,
        lora_parts="auto",
    )
    trainer = FlopsTrainer(
        model(),
        args,
        train_dataset=[sample(i) for i in range(4)],
        data_collator=collate,
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    chosen = trainer.session.chosen
    assert isinstance(chosen.objective, TappedLoss)
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)
    assert caplog.text.count("different numbers of image patches") == 1
    assert all(
        float(p.detach().abs().sum()) > 0
        for name, p in trainer.model.named_parameters()
        if "lora_B" in name
    )
