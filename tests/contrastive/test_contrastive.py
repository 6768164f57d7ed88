"""Contrastive losses: against autograd, against evaluating the whole batch again, and in
training.
"""

import copy
from functools import wraps

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, default_data_collator

from hf_flops import ConfigurationError, ContrastiveLoss, FlopsTrainer, ObjectiveError
from hf_flops.autotune.protocol import Averaging, Batch
from hf_flops.base.rows import BatchPosition
from hf_flops.contrastive import ContrastiveBatch, ContrastiveSession
from hf_flops.contrastive.dual_encoder import with_plain_flag
from tests.helpers.pairs import KINDS, LORA, as_pairs, collate, pair_batch, pair_model
from tests.helpers.tiny import generator, training_arguments

SIZE = st.integers(1, 5)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def contrastive_batch(kind, texts, images, labels=None, scale=5.0, bias=-1.0):
    terms = ContrastiveLoss(kind).terms(
        len(texts), len(images), labels, sigmoid=False, given=labels is not None
    )
    return ContrastiveBatch(texts, images, terms, scale, bias)


@given(
    texts=SIZE,
    images=SIZE,
    paired=st.booleans(),
    kind=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
)
def test_one_embedding_replaced_is_the_whole_batch_evaluated_again(
    texts, images, paired, kind, seed
):
    texts = images if paired else texts
    labels = None if paired else torch.randint(texts, (images,), generator=generator(seed))
    given_ = {"text": randn(texts, 4, seed=seed), "image": randn(images, 4, seed=seed + 1)}
    batch = contrastive_batch(kind, given_["text"], given_["image"], labels)
    for side, count in (("text", texts), ("image", images)):
        owner = torch.randint(count, (6,), generator=generator(seed))
        rows = 3 * randn(6, 4, seed=seed + 2)
        found = batch.replaced(side, owner, rows)
        start = batch.clean(side)
        assert float(start.sums.sum() / start.counts.sum()) == pytest.approx(batch.loss)
        for row, (own, value) in enumerate(zip(owner.tolist(), rows, strict=True)):
            moved = {name: values.clone() for name, values in given_.items()}
            moved[side][own] = value
            again = contrastive_batch(kind, moved["text"], moved["image"], labels).loss
            change = float(found.sums[row] - start.sums[own]) / count
            assert change == pytest.approx(again - batch.loss, abs=1e-5 * abs(batch.loss) + 1e-12)


@given(
    texts=SIZE,
    images=SIZE,
    paired=st.booleans(),
    kind=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
)
def test_slopes_are_those_of_autograd(texts, images, paired, kind, seed):
    texts = images if paired else texts
    labels = None if paired else torch.randint(texts, (images,), generator=generator(seed))
    leaves = [
        randn(texts, 4, seed=seed),
        randn(images, 4, seed=seed + 1),
        torch.tensor(1.5),
        torch.tensor(-1.0),
    ]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    class Outputs:
        text_embeds, image_embeds = leaves[:2]

    given_ = {} if labels is None else {"labels": labels}
    loss = ContrastiveLoss(kind).loss(Outputs, given_, *leaves[2:])
    wanted = torch.autograd.grad(loss, leaves)
    batch = contrastive_batch(kind, *leaves[:2], labels, float(leaves[2].detach().exp()))
    assert batch.loss == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(batch.clean("text").slopes / texts, wanted[0])
    torch.testing.assert_close(batch.clean("image").slopes / images, wanted[1])
    assert batch.slope_of_scale == pytest.approx(float(wanted[2]), abs=1e-9)
    assert batch.slope_of_bias == pytest.approx(float(wanted[3]), abs=1e-9)


def adapted(kind, projections=True, towers=("vision_model", "text_model")):
    """Put LoRA on both towers and train projections, scale and bias, off their starting values."""
    model = pair_model(kind)
    names = "|".join(LORA[kind])
    save = ["visual_projection", "text_projection"] if projections and kind != "siglip" else None
    config = LoraConfig(
        r=1, target_modules=rf".*({'|'.join(towers)}).*\.({names})", modules_to_save=save
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, config).eval()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(index))
    return model


def arguments(folder, **options):
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "queries_per_sample": 8,
        "learning_rate": 1e-2,
    } | options
    return training_arguments(folder, **options)


def alignment(model, folder, contrast=None, **options):
    args = arguments(folder, **options)
    made = ContrastiveSession(args, model, contrast, lambda forward: forward)

    def forward(inputs):
        outputs = model(**inputs)
        return outputs.loss, outputs

    return made, forward


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backprop(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    return wanted


@pytest.mark.parametrize(
    ("kind", "estimator", "draws"),
    [("clip", "one_sided", 3000), ("siglip", "antithetic", 800), ("dual", "one_sided", 1200)],
)
def test_the_estimate_is_the_gradient_in_the_mean(kind, estimator, draws, tmp_path):
    model, batch = adapted(kind), pair_batch(4)
    base = model.get_base_model()
    for name in ("logit_scale", "logit_bias"):
        if hasattr(base, name):
            getattr(base, name).requires_grad_(True)
    wanted = backprop(model, batch)
    # so many queries of each image and each text, in one step
    made, forward = alignment(model, tmp_path, estimator=estimator, rows_per_forward=2048)
    with torch.no_grad():
        made.prepare(Batch(batch, forward))
        made.args.queries_per_sample = 2 + 2 * draws * len(made.estimator.signs)
        made.estimate(Batch(batch, forward), BatchPosition(), Averaging())
    found = gradients(model)
    assert found.keys() == wanted.keys()
    noisy = {
        name for tower in made.towers.values() for name in tower.method.perturbation.vector.names
    }
    exact = found.keys() - noisy
    assert len(exact) == {"clip": 3, "siglip": 2, "dual": 3}[kind]
    for name in exact:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    for side, tower in made.towers.items():
        own = tower.method.perturbation.vector.names
        a, b = (torch.cat([part[name].flatten() for name in own]) for part in (found, wanted))
        assert float(torch.cosine_similarity(a, b, dim=0)) >= 0.9, side
        assert 0.8 < float(a.norm() / b.norm()) < 1.25


def test_a_frozen_tower_runs_its_batch_once_whatever_the_queries(tmp_path):
    for queries in (4, 16):
        model, batch = adapted("clip", projections=False, towers=("vision_model",)), pair_batch(4)
        made, forward = alignment(model, tmp_path, perturbation_scale=1e-3)  # no look at epsilon
        rows = {"vision_model": 0, "text_model": 0}
        with torch.no_grad():
            made.prepare(Batch(batch, forward))
            for name in rows:

                def count(module, args, kwargs, name=name, rows=rows):
                    rows[name] += len(
                        kwargs["pixel_values" if name == "vision_model" else "input_ids"]
                    )

                getattr(model.get_base_model(), name).register_forward_pre_hook(
                    count, with_kwargs=True
                )
            made.args.queries_per_sample = queries
            result = made.estimate(Batch(batch, forward), BatchPosition(), Averaging())
        assert rows == {"text_model": 4, "vision_model": 4 * (queries - 1)}
        assert result.rows == 4 * queries == sum(rows.values())


@pytest.mark.parametrize(
    ("kind", "preset"), [*((kind, "flops") for kind in KINDS), ("clip", "mezo")]
)
def test_training_lowers_the_loss_and_never_calls_backward(kind, preset, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    data = as_pairs(pair_batch(8))
    save = None if kind == "siglip" else ["visual_projection", "text_projection"]
    config = LoraConfig(r=1, target_modules=LORA[kind], modules_to_save=save)
    steps, rate = (8, 3e-2) if preset == "flops" else (30, 1e-2)
    args = arguments(
        tmp_path, max_steps=steps, preset=preset, learning_rate=rate, per_device_train_batch_size=8
    )
    model = pair_model(kind)
    before = copy.deepcopy(model.state_dict())
    trainer = FlopsTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        peft_config=config,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    assert trainer.ledger.rows <= steps * 8 * 8
    frozen = {
        name: p
        for name, p in model.named_parameters()
        if "lora" not in name and "modules_to_save" not in name
    }
    for name, parameter in frozen.items():
        original = name.replace("base_layer.", "").replace("original_module.", "")
        assert torch.equal(parameter, before[original])
    assert not any(
        module._forward_hooks or "forward" in vars(module) for module in trainer.model.modules()
    )


def test_a_tower_that_a_callback_freezes_stays(tmp_path):
    seen = []

    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            mine = [
                value
                for name, value in model.named_parameters()
                if "text_model" in name and "lora" in name
            ]
            seen.append(torch.cat([value.detach().flatten() for value in mine]))
            for value in mine:
                value.requires_grad_(False)

    args = arguments(tmp_path, queries_per_sample=4)
    model, data = adapted("clip"), as_pairs(pair_batch(8))
    FlopsTrainer(
        model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[Freeze()]
    ).train()
    assert len(seen[0]) > 0
    assert seen[0].equal(seen[1])


def test_projections_alone_get_the_gradient_of_backprop(tmp_path):
    model, batch = pair_model("dual"), pair_batch(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_projection.weight"))
    wanted = backprop(model, batch)
    made, forward = alignment(model, tmp_path)
    with torch.no_grad():
        made.prepare(Batch(batch, forward))
        made.args.queries_per_sample = 8
        result = made.estimate(Batch(batch, forward), BatchPosition(), Averaging())
    assert result.rows == 8  # each image and each text once
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_a_step_that_is_refused_leaves_gradients_switched_on(tmp_path):
    args = arguments(tmp_path, queries_per_sample="auto")
    run = FlopsTrainer(
        adapted("clip"), args, train_dataset=as_pairs(pair_batch()), data_collator=collate
    )
    with pytest.raises(ConfigurationError, match="queries_per_sample='auto'"):
        run.training_step(run.model, collate(as_pairs(pair_batch())))
    assert torch.is_grad_enabled()


def test_labels_classify_images_among_any_number_of_texts(tmp_path):
    model = adapted("clip")
    batch = {**pair_batch(4, texts=3), "labels": torch.tensor([2, 0, 1, 1])}
    model.zero_grad()
    plain = {name: value for name, value in batch.items() if name not in ("labels", "return_loss")}
    torch.nn.functional.cross_entropy(model(**plain).logits_per_image, batch["labels"]).backward()
    wanted = gradients(model)
    model.zero_grad()
    made, forward = alignment(model, tmp_path, rows_per_forward=2048)
    with torch.no_grad():
        made.prepare(Batch(batch, forward))
        made.args.queries_per_sample = 3000
        result = made.estimate(Batch(batch, forward), BatchPosition(), Averaging())
    assert result.rows <= 12000
    found = gradients(model)
    a, b = (torch.cat([part[name].flatten() for name in wanted]) for part in (found, wanted))
    assert float(torch.cosine_similarity(a, b, dim=0)) >= 0.9


def test_equal_texts_are_said_or_taken_for_one(tmp_path, caplog):
    batch = pair_batch(4)
    batch["input_ids"][3] = batch["input_ids"][1]
    model = adapted("clip")
    made, forward = alignment(model, tmp_path)
    with torch.no_grad():
        made.prepare(Batch(batch, forward))
    assert "1 of the 4 texts of a batch equal an earlier one" in caplog.text
    made, forward = alignment(model, tmp_path, ContrastiveLoss(same_texts="positives"))
    parts, labels = made.split(batch)
    assert len(parts["text"]["input_ids"]) == 3
    assert labels[1] == labels[3]
    assert torch.equal(parts["text"]["input_ids"][labels], batch["input_ids"])


def fails(model, batch, folder, error, text, **options):
    data = as_pairs(pair_batch(4))
    args = arguments(folder, max_steps=1, **options)
    trainer = FlopsTrainer(
        model=model, args=args, train_dataset=data, data_collator=lambda rows: dict(batch)
    )
    with pytest.raises(error, match=text):
        trainer.train()


@pytest.mark.parametrize("preset", ["flops", "mezo"])
def test_bad_batches_are_one_clear_sentence(preset, tmp_path):
    model, batch = adapted("clip"), pair_batch(4)
    silent = {name: value for name, value in batch.items() if name != "return_loss"}
    fails(model, silent, tmp_path, ObjectiveError, "no return_loss=True", preset=preset)
    unpaired = {**batch, **{name: batch[name][:3] for name in ("input_ids", "attention_mask")}}
    fails(
        model,
        unpaired,
        tmp_path,
        ObjectiveError,
        "4 images and 3 texts: pair them one to one",
        preset=preset,
    )


def test_other_bad_input_is_one_clear_sentence(tmp_path):
    model, batch = adapted("clip"), pair_batch(4)
    images = {name: value for name, value in batch.items() if name != "pixel_values"}
    made, forward = alignment(model, tmp_path)
    with pytest.raises(ObjectiveError, match="The batch has no images: its keys are"):
        made.prepare(Batch(images, forward))
    labelled = {**batch, "labels": torch.tensor([0, 1, 2, 9])}
    fails(model, labelled, tmp_path, ObjectiveError, "labels from 0 to 9 do not number 4 texts")
    fails(
        model,
        batch,
        tmp_path,
        ConfigurationError,
        "too few for 4 images and 4 texts",
        queries_per_sample=3,
    )
    fails(
        model,
        batch,
        tmp_path,
        ConfigurationError,
        "'auto' does not support rows",
        queries_per_sample="auto",
    )
    with pytest.raises(ConfigurationError, match="kind='cosine'"):
        ContrastiveLoss("cosine")
    with pytest.raises(ConfigurationError, match="same_texts='same'"):
        ContrastiveLoss(same_texts="same")


def test_a_flag_of_each_sample_is_taken_for_one():
    """The stock collator makes a tensor of the samples' `return_loss`."""
    rows = [{**row, "return_loss": True} for row in as_pairs(pair_batch(2))]
    assert with_plain_flag(default_data_collator(rows))["return_loss"] is True


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    data = as_pairs(pair_batch(8))

    def train(folder, **resume):
        args = arguments(folder, max_steps=4, rows_per_forward=64)
        args.save_strategy, args.save_steps = "steps", 2
        trainer = FlopsTrainer(
            model=adapted("dual"), args=args, train_dataset=data, data_collator=collate
        )
        trainer.train(**resume)
        return trainer

    whole = train(tmp_path / "a")
    resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.ledger.rows == whole.ledger.rows
    parts = (dict(trainer.model.named_parameters()) for trainer in (whole, resumed))
    for one, other in zip(*(part.values() for part in parts), strict=True):
        assert torch.equal(one, other)


def test_a_model_with_another_loss_falls_back_to_the_batch_as_a_whole(
    tmp_path, monkeypatch, caplog
):
    model = adapted("clip")
    base, original = model.get_base_model(), type(model.get_base_model()).forward

    @wraps(original)  # the trainer reads its signature
    def forward(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.loss = outputs.loss + outputs.image_embeds.square().mean()
        return outputs

    monkeypatch.setattr(type(base), "forward", forward)
    args = arguments(tmp_path, max_steps=1)
    trainer = FlopsTrainer(
        model=model, args=args, train_dataset=as_pairs(pair_batch(4)), data_collator=collate
    )
    trainer.train()
    assert (
        "The loss of CLIPModel is not a contrastive loss of its embeddings' cosines." in caplog.text
    )
    assert len(trainer.ledger.last_step.counts) == 1
