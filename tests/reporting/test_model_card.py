"""The model card, and the way to the Hub and back: the real client against a Hub on loopback."""

import ast
import re

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model

import hf_flops
from hf_flops import BlackBoxPromptModel, FlopsTrainer, FlopsTrainingArguments
from hf_flops.reporting.figures import PICTURES
from hf_flops.reporting.model_card import CITATION, TAGS, cost_table
from hf_flops.trainer.settings import changed_settings
from tests.helpers.hub import LocalHub
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as local:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "ENDPOINT", local.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            local.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", local.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield local
        huggingface_hub.close_session()


def trainer_of(tmp_path, **options):
    args = FlopsTrainingArguments(
        output_dir=str(tmp_path / "adapter"),
        per_device_train_batch_size=4,
        queries_per_sample=4,
        learning_rate=0.02,
        logging_steps=1,
        use_cpu=True,
        **{
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )
    base = tiny_model("vit")
    base.add_model_tags(["of-the-base"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(
            base, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        )
    dataset = [
        {**sample, "sample_id": i} for i, sample in enumerate(as_dataset(tiny_batch("vit", 8)))
    ]
    return FlopsTrainer(
        model, args, train_dataset=dataset, eval_dataset=as_dataset(tiny_batch("vit", 8))
    )


# of how the client itself uploads
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_to_the_hub_and_back(hub, tmp_path):
    options = {
        "push_to_hub": True,
        "hub_strategy": "checkpoint",
        "hub_token": hub.token,
        "hub_always_push": True,
    }
    trainer = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **options)
    trainer.train()
    trainer.push_to_hub(tags=["mine"])
    files = hub.repos["user/adapter"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", *PICTURES} <= set(
        files
    )
    assert "last-checkpoint/flops_state.json" in files
    assert hub.commits["user/adapter"][-1] == "End of training"

    inputs = tiny_batch("vit", 4, seed=1)
    reloaded = PeftModel.from_pretrained(tiny_model("vit"), "user/adapter").eval()
    with torch.no_grad():
        assert reloaded(**inputs).logits.equal(trainer.model.eval()(**inputs).logits)
        assert not reloaded(**inputs).logits.equal(tiny_model("vit")(**inputs).logits)

    card = ModelCard.load("user/adapter")
    assert {*TAGS, "mine", "of-the-base", "lora", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert CITATION in card.text
    assert cost_table(trainer.costs.so_far()) in card.text
    assert f"| rows through the model | {trainer.ledger.all_rows:,} (" in card.text
    assert all(
        f"]({name})" in card.text and files[name].startswith(b"\x89PNG") for name in PICTURES
    )
    assert hub.token not in files["README.md"].decode()


def test_the_settings_of_a_card_repeat_the_run(tmp_path):
    trainer = trainer_of(tmp_path, preset="mezo", pictures=False)
    trainer.create_model_card()
    text = (tmp_path / "adapter" / "README.md").read_text()
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "args = " in b)
    adapter, arguments = (statement.value for statement in ast.parse(code).body)
    config, given = (
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        for call in (adapter, arguments)
    )
    assert adapter.func.id == "LoraConfig"
    assert LoraConfig(**config).to_dict() == {
        **trainer.model.peft_config["default"].to_dict(),
        "auto_mapping": None,
        "base_model_name_or_path": None,
    }
    again = FlopsTrainingArguments(**{**given, "output_dir": str(tmp_path)}, use_cpu=True)
    assert changed_settings(again) == changed_settings(trainer.args)
    assert given == {
        "output_dir": str(tmp_path / "adapter"),
        "per_device_train_batch_size": 4,
        "queries_per_sample": 4,
        "learning_rate": 0.02,
        "max_steps": 2,
        "preset": "mezo",
        "lora_parts": "B",
    }


def test_a_card_names_what_a_finder_asks_for_and_its_lines_load_the_adapter(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, pictures=False)
    tiny_model("vit").save_pretrained(tmp_path / "base")
    trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "More information" not in text
    assert "from scratch" not in text
    named = trainer.model.named_parameters()  # A is held back
    size = sum(p.numel() for n, p in named if p.requires_grad and "lora_A" not in n)
    for shown in (str(tmp_path / "base"), f"LORA, {size:,} trained numbers", "8 samples"):
        assert shown in text
    assert f"`hf_flops` {hf_flops.__version__}" in text
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import" in b]
    assert len(code.splitlines()) == 5
    assert "num_labels=3" in code
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(code, loaded)
    inputs = tiny_batch("vit", 4, seed=1)
    with torch.no_grad():
        logits = loaded["model"](**inputs).logits
        assert logits.equal(trainer.model.eval()(**inputs).logits)


def test_a_model_without_a_configuration_gets_a_card(tmp_path):
    table = tiny_model("llama").get_input_embeddings().weight.detach()
    prompt = BlackBoxPromptModel(
        lambda embeds, mask, tokens: embeds.sum(1)[:, : len(tokens)],
        table,
        label_words=[5, 7],
        num_virtual_tokens=2,
    )
    args = FlopsTrainingArguments(str(tmp_path / "prompt"), use_cpu=True, report_to="none")
    texts = [{"input_ids": [3, 4 + i], "labels": i % 2} for i in range(4)]
    FlopsTrainer(prompt, args, train_dataset=texts).create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "prompt" / "README.md")
    assert {*TAGS, "mine"} <= set(card.data.tags)
    assert "BlackBoxPromptModel, 32 trained numbers in 1 tensors" in card.text
    assert "load_file('prompt/model.safetensors')" in card.text


def test_a_card_before_training_tells_no_costs(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.create_model_card(tags="mine")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "What it cost" not in text
    assert "- mine" in text
    trainer.create_model_card()  # anew, not twice
    assert (tmp_path / "adapter" / "README.md").read_text().count("## Citation") == 1


def test_costs_stand_still_after_the_run(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    costs = trainer.costs.so_far()
    assert costs == trainer.costs.so_far()
    assert costs["rows"] == trainer.ledger.all_rows == 2 * 4 * 4 + costs["check_rows"]
    assert costs["peak_memory"] > 2**20
    assert not list((tmp_path / "adapter").glob("*.png"))  # two entries make no curve
