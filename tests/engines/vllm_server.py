"""Prompts, rewards and adapters on vLLM itself: run by scripts/test-vllm, which has vLLM.

Each test prints its figures.
"""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_flops import (
    BlackBoxLoraModel,
    BlackBoxPromptModel,
    ConfigurationError,
    EngineError,
    FlopsTrainer,
    SuffixPromptModel,
)
from hf_flops.engines import TorchEngine, VllmEngine
from hf_flops.testing import EngineContract
from recipes import runs, sums
from recipes.prompts import load_texts
from recipes.vllm_server import FLOAT32, LORA, VllmServer
from tests.helpers.black_boxes import arguments

MODEL = os.environ["HF_FLOPS_VLLM_MODEL"]
WORDS = (" terrible", " great")
TEXT_TOKENS = 32  # a block of vLLM's prefix cache


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm") / "server.log"


@pytest.fixture(scope="module")
def server(log):
    if url := os.environ.get("HF_FLOPS_VLLM_URL"):  # of a running server
        yield SimpleNamespace(url=url, key="secret")
        return
    with VllmServer(MODEL, log, options=f"{FLOAT32} {LORA} --max-lora-rank 1") as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()


@pytest.fixture(scope="module")
def words(tokenizer):
    return [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]


@pytest.fixture(scope="module")
def reviews(tokenizer):
    """Training and test texts with their classes."""
    task = load_texts("movies", validation=0, test=128)
    parts = (task.train[:512], task.test)
    return [
        [
            {
                "input_ids": tokenizer(text)["input_ids"][:TEXT_TOKENS],
                "labels": label,
                "sample_id": i,
            }
            for i, (text, label) in enumerate(part)
        ]
        for part in parts
    ]


def client(server, **options):
    options = {"api_key": server.key, "batch_rows": 64, "timeout": 300.0, **options}
    return VllmEngine(server.url, "small", **options)


def collate(samples):
    width = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        mask[row, : len(sample["input_ids"])] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("labels", "sample_id"):
        batch[name] = torch.tensor([sample[name] for sample in samples])
    return batch


def prompt_model(engine, language_model, tokenizer, words, **options):
    table = language_model.get_input_embeddings().weight
    start = tokenizer(" All in all, the movie was just", add_special_tokens=False)["input_ids"]
    options = {"num_virtual_tokens": 8, "init_tokens": start, "after": True, **options}
    return BlackBoxPromptModel(engine, table, words, **options)


@torch.no_grad()
def accuracy(model, rows):
    batch = collate(rows)
    del batch["sample_id"]
    return float((model(**batch).logits.argmax(1) == batch["labels"]).float().mean())


def train(model, folder, rows, callbacks=(), resume=None, **options):
    options = {
        "per_device_train_batch_size": 8,
        "queries_per_sample": 8,
        "rows_per_forward": 128,
        "learning_rate": 5e-3,
        "closed_form_head": "none",
        **options,
    }
    trainer = FlopsTrainer(
        model,
        arguments(folder, **options),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[*callbacks],
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    return trainer, time.perf_counter() - start


class TestVllmEngine(EngineContract):
    tolerance = 1e-3  # what else is in the batch changes a row a little

    @pytest.fixture(autouse=True)
    def _server(self, server, language_model):
        self.server, self.config = server, language_model.config

    def make(self):
        return client(self.server), self.config.hidden_size, self.config.vocab_size


@torch.no_grad()
def test_losses_are_those_of_transformers(server, language_model, tokenizer, words, reviews):
    batch = collate(reviews[1][:32])
    del batch["sample_id"]
    losses = [
        float(prompt_model(engine, language_model, tokenizer, words)(**batch).loss)
        for engine in (client(server), TorchEngine(language_model))
    ]
    print(f"loss of 32 texts: vLLM {losses[0]:.6f}, transformers {losses[1]:.6f}")
    assert abs(losses[0] - losses[1]) < 1e-3


def test_a_soft_prompt_learns_sentiment(
    server, language_model, tokenizer, words, reviews, tmp_path
):
    start = " All in all, the movie was just"
    models = {
        "vLLM": prompt_model(client(server), language_model, tokenizer, words),
        "in this process": SuffixPromptModel(
            language_model, 8, start, tokenizer, label_words=words
        ),
    }
    accuracies = {}
    options = {"max_steps": 12, "queries_per_sample": 20, "learning_rate": 1e-2}
    for name, model in models.items():
        before = accuracy(model, reviews[1])
        run, seconds = train(model, tmp_path, reviews[0], **options)
        after = accuracies[name] = accuracy(model, reviews[1])
        rows = run.ledger.all_rows
        print(
            f"{name}: accuracy {before:.1%} to {after:.1%} with {rows} rows in {seconds:.0f} s, "
            f"{rows / seconds:.1f} rows/s"
        )
        assert after > before + 0.05
    assert abs(accuracies["vLLM"] - accuracies["in this process"]) < 0.1


class Kills(TrainerCallback):
    """Kills a server after the third step."""

    def __init__(self, server):
        self.server = server

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.server.__exit__()


def test_a_killed_server_loses_nothing(
    server, log, language_model, tokenizer, words, reviews, tmp_path
):
    options = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5, "allocator": "uniform"}
    options |= {"save_strategy": "steps", "save_steps": 2, "queries_per_sample": 4}

    def prompt(engine, folder, **others):
        model = prompt_model(engine, language_model, tokenizer, words)
        train(model, tmp_path / folder, reviews[0], **options, **others)
        return model.prompt.weight.detach()

    wanted = prompt(client(server), "plain")
    with VllmServer(MODEL, log, options=FLOAT32) as running:
        killed = client(running, retries=1, back_off=0.1)
        with pytest.raises(EngineError, match=r"failed 2 times in a row.*resume from it"):
            prompt(killed, "killed", callbacks=[Kills(running)])
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    error = float((prompt(client(server), "killed", resume=True) - wanted).abs().max())
    print(f"resumed: the prompt differs by {error:.2g} from that of the run that was not killed")
    assert error < 1e-3


def test_a_server_in_bfloat16_is_refused(log, language_model, tokenizer, words, reviews, tmp_path):
    options = "--dtype bfloat16 --enforce-eager --max-logprobs -1"
    with VllmServer(MODEL, log, options=options) as running:
        model = prompt_model(client(running), language_model, tokenizer, words, precision=3e-2)
        with pytest.raises(ConfigurationError, match="--dtype float32") as caught:
            train(model, tmp_path, reviews[0], max_steps=1, perturbation_scale=1e-3)
    print(caught.value)


def sums_rows(tokenizer, ending=""):
    """Return training and test rows of sums, in an order by chance."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    texts = [sums.texts()[i] for i in order]
    rows = [
        {"input_ids": tokenizer(f"Q: What is {text}{ending}")["input_ids"], "labels": label}
        for text, label in texts
    ]
    rows = [{**row, "sample_id": i} for i, row in enumerate(rows)]
    return rows[:60], rows[60:]


def rewarded(model, tokenizer, rows, folder, **options):
    """Train for right sums; print and return the share of right ones before, after, and rewards."""
    args = arguments(folder, per_device_train_batch_size=8, rows_per_forward=128, **options)
    trainer = sums.SumsTrainer(
        model,
        args,
        tokenizer,
        train_dataset=rows[0],
        data_collator=collate,
        compute_metrics=runs.accuracy,
    )
    before = runs.tested(trainer, rows[1])
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = runs.tested(trainer, rows[1])
    curve = [-entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"{type(model).__name__}: right sums {before:.1%} to {after:.1%} with "
        f"{trainer.ledger.all_rows} rows in {seconds:.0f} s; rewards "
        f"{' '.join(f'{value:.2f}' for value in curve)}"
    )
    return before, after, curve


def test_a_reward_goes_up(server, language_model, tokenizer, tmp_path):
    start = tokenizer(sums.ENDING, add_special_tokens=False)["input_ids"]
    model = prompt_model(
        client(server),
        language_model,
        tokenizer,
        None,
        init_tokens=start,
        num_virtual_tokens=len(start),
    )
    scale, rate = sums.NOISE[0]
    options = {"max_steps": 12, "queries_per_sample": 12, "perturbation_scale": scale}
    rows = sums_rows(tokenizer)
    before, after, curve = rewarded(model, tokenizer, rows, tmp_path, learning_rate=rate, **options)
    assert after > before + 0.15
    assert sum(curve[6:]) > sum(curve[:6])  # eight sums a batch


@torch.no_grad()
def mean_loss(model, rows):
    batch = collate(rows)
    del batch["sample_id"]
    return float(torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"]))


def test_lora_learns_through_the_pool(server, language_model, tokenizer, words, reviews, tmp_path):
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=2,
        target_modules=["v_proj"],
        layers_to_transform=list(range(20, 30)),
    )
    engine = client(server, concurrency=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlackBoxLoraModel(engine, AutoConfig.from_pretrained(MODEL), lora, words)
    ending = tokenizer(" All in all, the movie was just", add_special_tokens=False)["input_ids"]
    rows, held_out = (
        [{**row, "input_ids": [*row["input_ids"], *ending]} for row in part] for part in reviews
    )
    before = mean_loss(model, held_out)
    options = {"perturbation": "shared", "max_steps": 16, "queries_per_sample": 12}
    options |= {"perturbation_scale": 1e-2, "learning_rate": 1e-2}
    trainer, seconds = train(model, tmp_path / "run", rows, **options)
    after = mean_loss(model, held_out)
    print(
        f"LoRA of {len(held_out)} held-out reviews: loss {before:.3f} to {after:.3f}, "
        f"{trainer.ledger.all_rows} rows, {seconds:.0f} s"
    )
    model.save_pretrained(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(language_model, tmp_path / "adapter").eval()
    batch = collate(rows[:4])
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"]).logits
        last = batch["attention_mask"].sum(1) - 1
        wanted = peft(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    peft.unload()
    torch.testing.assert_close(found, wanted[range(4), last][:, words], atol=1e-2, rtol=0)
    assert after < before - 0.02


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of vLLM
def test_in_process_is_as_fast_as_vllm(language_model, tokenizer, words, reviews, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # all of it is this process's time
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import vllm

    from hf_flops.engines import VllmInProcess

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32}
    options |= {"enable_prompt_embeds": True, "max_logprobs": -1, "logprobs_mode": "raw_logits"}
    llm = vllm.LLM(MODEL, **options)
    texts = [
        [token for review in reviews[0][i : i + 4] for token in review["input_ids"]][:40]
        for i in range(0, 48, 4)
    ]
    ids = torch.tensor(texts).repeat_interleave(8, 0)
    model = prompt_model(VllmInProcess(llm), language_model, tokenizer, words)
    embeds, mask = model._rows(ids, None)
    embeds[:, 40:] += 1e-2 * torch.randn(embeds[:, 40:].shape)  # as noise of a row's own
    params = vllm.SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=words)
    own = TorchEngine(language_model)
    ways = {
        "vLLM": lambda: llm.generate(
            [{"prompt_embeds": row} for row in embeds], params, use_tqdm=False
        ),
        "VllmInProcess": lambda: model.engine(embeds, mask, words),
        "transformers": lambda: own(embeds, mask, words),
    }
    seconds = {name: [] for name in ways}
    for turn in range(4):
        for name, way in ways.items():
            llm.reset_prefix_cache()
            start = time.process_time()
            scores = way()
            if turn:
                seconds[name].append(time.process_time() - start)
    rates = {name: len(ids) / min(times) for name, times in seconds.items()}
    each = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    print(f"rows of 40 tokens and a prompt of 8 per second of one core: {each}")
    torch.testing.assert_close(model.engine(embeds, mask, words), scores, atol=1e-3, rtol=0)
    assert rates["VllmInProcess"] >= 0.9 * rates["vLLM"]
