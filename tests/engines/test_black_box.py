"""Prompts of models that are only asked for outputs, in this process."""

import pytest
import torch

from hf_flops import (
    BlackBoxPromptModel,
    ConfigurationError,
    EngineError,
    FlopsTrainer,
    GeneratedMetric,
    NonFiniteError,
    ObjectiveError,
)
from hf_flops.engines import TorchEngine
from tests.helpers.black_boxes import (
    WORDS,
    Fails,
    arguments,
    batch,
    crash,
    prompted,
    trainer,
)
from tests.helpers.tiny import VOCABULARY, as_dataset, generator, tiny_model


@pytest.fixture(scope="module")
def language_model():
    return tiny_model("llama")


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_those_of_prompt_and_text(side, after, language_model):
    model, inputs = prompted(TorchEngine(language_model), language_model, after=after), batch()
    if side == "left":
        order = inputs["attention_mask"].argsort(dim=1, stable=True)
        inputs = {
            name: value.gather(1, order) if value.dim() == 2 else value
            for name, value in inputs.items()
        }
    outputs = model(**inputs)
    for row in range(8):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens = torch.cat(
            [text, torch.tensor([9, 8, 9])] if after else [torch.tensor([9, 8, 9]), text]
        )
        expected = language_model(input_ids=tokens[None]).logits[0, -1, WORDS]
        torch.testing.assert_close(outputs.logits[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
    )
    torch.testing.assert_close(model(**inputs, num_items_in_batch=16).loss, outputs.loss / 2)
    assert set(model.state_dict()) == {"prompt.weight", "label_words.tokens"}


@pytest.mark.parametrize(
    ("words", "tokens", "match"),
    [
        ([5, 5], 3, "two or more different tokens"),
        ([5], 3, "two or more"),
        (WORDS, 0, "num_virtual_tokens=0"),
        (WORDS, True, "num_virtual_tokens=True"),
        (
            [5, 999],
            3,
            rf"label_words=\[5, 999\] must be tokens, whole numbers from 0 to {VOCABULARY - 1}",
        ),
        ([5, -1], 3, r"label_words=\[5, -1\]"),
        ([5.0, 7.0], 3, r"label_words=\[5.0, 7.0\]"),
        (5, 3, r"label_words=5 "),
    ],
)
def test_prompts_that_cannot_work_are_refused(words, tokens, match, language_model):
    with pytest.raises(ConfigurationError, match=match):
        BlackBoxPromptModel(crash, language_model.get_input_embeddings().weight, words, tokens)


@pytest.mark.parametrize("tokens", [[999], [-1], [1.5]])
def test_a_prompt_starts_as_tokens_that_there_are(tokens, language_model):
    with pytest.raises(ConfigurationError, match=f"init_tokens=\\[{tokens[0]}"):
        BlackBoxPromptModel(crash, language_model.get_input_embeddings().weight, WORDS, 3, tokens)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 2], "labels hold 2, but label_words are of classes 0 to 1"),
        ([-1, 0], "labels hold -1"),
        ([0.0, 1.0], r"labels of torch.float32 in the shape \(2,\)"),
        ([True, False], "labels of torch.bool"),
        ([0, 1, 1], r"in the shape \(3,\) are not the classes of 2 rows"),
        ([[0, 1], [1, 0]], r"in the shape \(2, 2\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_asked(
    labels, match, language_model
):
    inputs = {**batch(2), "labels": torch.tensor(labels)}
    with pytest.raises(ConfigurationError, match=match):
        prompted(crash, language_model)(**inputs)


@torch.no_grad()
def test_labels_may_be_narrow_missing_or_probabilities(language_model):
    model, inputs = prompted(TorchEngine(language_model), language_model), batch(2)
    expected = model(**inputs).loss
    labels = [inputs["labels"].int(), torch.eye(2)[inputs["labels"]]]
    for given in labels:
        torch.testing.assert_close(model(**{**inputs, "labels": given}).loss, expected)
    assert model(**{**inputs, "labels": torch.tensor([0, -100])}).loss.isfinite()


@torch.no_grad()
def test_arrays_are_answers_and_nothing_is_none(language_model):
    plain = TorchEngine(language_model)
    outputs = prompted(lambda *rows: plain(*rows).numpy(), language_model)(**batch())
    torch.testing.assert_close(outputs.logits, prompted(plain, language_model)(**batch()).logits)
    with pytest.raises(EngineError, match=r"<lambda>.* answered with a NoneType, not with scores"):
        prompted(lambda *rows: None, language_model)(**batch())


def test_wrong_shapes_are_named(language_model, tmp_path):
    engine = Fails(None, lambda embeds, mask, tokens: torch.zeros(len(embeds), 3))
    with pytest.raises(EngineError, match=r"Fails.* answered with the shape \(\d+, 3\)"):
        trainer(engine, language_model, tmp_path).train()


def test_nan_from_some_rows_is_passed_over_and_from_all_is_an_error(language_model, tmp_path):
    def some(*rows):
        logits = TorchEngine(language_model)(*rows)
        logits[0] = float("nan")
        return logits

    plain = TorchEngine(language_model)
    run = trainer(
        Fails(plain, some, lambda call: run.state.global_step >= 2), language_model, tmp_path
    )
    run.train()
    assert sum(entry.get("dropped_rows", 0) for entry in run.state.log_history) > 0
    assert run.model.prompt.weight.isfinite().all()
    with pytest.raises(NonFiniteError):
        trainer(
            Fails(plain, lambda *rows: plain(*rows) * float("nan")),
            language_model,
            tmp_path,
        ).train()


def test_coarse_engines_keep_noise_per_row_if_they_say_so(language_model, tmp_path):
    calls = iter(range(10_000))

    def coarse(*rows):  # what rounds one way now may round the other way next time
        logits = TorchEngine(language_model)(*rows)
        return logits + 3e-3 * torch.randn(logits.shape, generator=generator(next(calls)))

    table = language_model.get_input_embeddings().weight
    for precision in (1e-4, 3e-2):
        run = trainer(coarse, language_model, tmp_path, max_steps=1)
        run.model.precision = BlackBoxPromptModel(
            coarse, table, WORDS, 3, precision=precision
        ).precision
        run.train()
        assert run.session.chosen.perturbation.shares_noise == (precision == 1e-4)


def test_noise_that_an_engine_rounds_away_is_refused(language_model, tmp_path):
    coarse = tiny_model("llama").bfloat16()
    for engine, scale in ((coarse, 1e-4), (language_model, 1e-3), (coarse, 0.3)):
        run = trainer(TorchEngine(engine), language_model, tmp_path, perturbation_scale=scale)
        run.model.precision = 3e-2
        if scale > 1e-4:
            run.train()
            assert run.state.global_step == 4
            continue
        with pytest.raises(ConfigurationError, match=r"=0.0001 is lost in the engine's rounding"):
            run.train()
        assert run.state.global_step == 0


def test_an_engine_that_ignores_its_prompt_is_refused(language_model, tmp_path):
    def deaf(embeds, mask, tokens):
        return torch.zeros(len(embeds), len(tokens))

    with pytest.raises((ConfigurationError, ObjectiveError)):
        trainer(deaf, language_model, tmp_path).train()


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
def test_generated_tokens_are_those_of_prompt_and_text(after, language_model):
    model, inputs = prompted(TorchEngine(language_model), language_model, after=after), batch(4)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**texts, max_new_tokens=3)
    for row in range(4):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        prompt = torch.tensor([9, 8, 9])
        tokens = torch.cat([text, prompt] if after else [prompt, text])[None]
        for _ in range(3):
            new = language_model(input_ids=tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, new[None, None]], 1)
        assert found[row] == tokens[0, -3:].tolist()
    with pytest.raises(ConfigurationError, match="num_beams=2"):
        model.generate(**texts, num_beams=2)
    with pytest.raises(ConfigurationError, match="scores tokens and generates none"):
        prompted(crash, language_model).generate(**texts)


class Digits:
    """Decodes tokens as numbers."""

    def batch_decode(self, rows, **options):
        return [" ".join(map(str, row)) for row in rows]


def reward_of(texts, inputs):
    """Return the share of even tokens."""
    return torch.tensor(
        [sum(int(word) % 2 == 0 for word in text.split()) / len(text.split()) for text in texts]
    )


def test_a_reward_of_generated_text_goes_up(language_model, tmp_path):
    table = language_model.get_input_embeddings().weight
    model = BlackBoxPromptModel(
        TorchEngine(language_model), table, num_virtual_tokens=3, init_tokens=[9, 8]
    )
    objective = GeneratedMetric(reward_of, Digits(), max_new_tokens=4)
    args = arguments(
        tmp_path, max_steps=30, queries_per_sample=16, perturbation_scale=0.5, learning_rate=0.2
    )
    data = as_dataset(batch())
    run = FlopsTrainer(model, args, train_dataset=data, objective=objective)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
