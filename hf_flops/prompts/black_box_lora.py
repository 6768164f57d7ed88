"""LoRA for a model that runs elsewhere: candidates are adapters of an engine's pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from ..engines.base import Prompt, finite
from .black_box import LabelWords, sampling

WEIGHTS_FILE = "adapter_model.safetensors"
_MEMORY = Path("/dev/shm")


class AdapterEngine(Protocol):
    """An engine with a pool of LoRA adapters, folders in PEFT's format."""

    def loaded(self, folders: Sequence[Path]) -> AbstractContextManager[list[str]]:
        """Load adapters inside a context, which gives their names."""

    def scores(
        self, prompts: Sequence[Prompt], token_ids: Sequence[int], adapters: Sequence[str]
    ) -> Tensor:
        """Return scores (R, C) of tokens after R prompts, each with an adapter."""

    def continued(
        self, prompts: Sequence[Prompt], options: dict[str, Any], adapters: Sequence[str]
    ) -> list[list[int]]:
        """Return the tokens that continue R prompts, each with an adapter."""


class BlackBoxLoraModel(nn.Module):
    """A LoRA adapter of a model that an engine runs; this process never loads the model's weights.

    All `lora_A` are one table with one row, and so are all `lora_B`, so that every query has an
    adapter of its own. Adapters are written to a folder in memory, loaded by the engine, asked, and
    removed; rows with equal adapters share one.

    Args:
        engine: vLLM with a pool of adapters; see `AdapterEngine`.
        config: the model's configuration.
        lora: rank, alpha and target modules. vLLM knows no DoRA and no `modules_to_save`.
        label_words: the token of each of C classes; None to train for a reward of generated texts.
        pool: adapters that are loaded at a time.
        precision: relative error of losses due to the engine's rounding.
        folder: where adapters are written, which the engine must see; default: memory, else the
            folder for temporary files.

    Examples:
        >>> from peft import LoraConfig
        >>> from transformers import LlamaConfig
        >>> from hf_flops import BlackBoxLoraModel
        >>> config = LlamaConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1)
        >>> lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        >>> model = BlackBoxLoraModel(None, config, lora, label_words=[3, 7])
        >>> sum(parameter.numel() for parameter in model.parameters())
        512
    """

    accepts_loss_kwargs = True  # Trainer's name for `num_items_in_batch`
    config = None  # Trainer's card asks for it
    measures_noise = True  # whether epsilon survives the engine's rounding

    def __init__(
        self,
        engine: AdapterEngine,
        config: PreTrainedConfig,
        lora: LoraConfig,
        label_words: Sequence[int] | None = None,
        pool: int = 32,
        precision: float = 1e-4,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.pool, self.precision = engine, pool, precision
        self.folder = folder or (_MEMORY if _MEMORY.is_dir() else None)
        self.label_words = LabelWords(label_words, config.get_text_config().vocab_size)
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), deepcopy(lora))
        self.lora = model.peft_config["default"]
        self.lora.inference_mode = True
        shapes = {name: t.shape for name, t in get_peft_model_state_dict(model).items()}
        self.shapes = {
            part: {name: shape for name, shape in shapes.items() if f".{part}." in name}
            for part in ("lora_A", "lora_B")
        }
        sizes = {part: sum(map(math.prod, own.values())) for part, own in self.shapes.items()}
        tables = {part: torch.zeros(1, size) for part, size in sizes.items()}
        for tensor in self._tensors("lora_A", tables["lora_A"][0]).values():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))  # as PEFT does
        self.adapter: Any = nn.ModuleDict(
            {part: nn.Embedding.from_pretrained(t, freeze=False) for part, t in tables.items()}
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Run texts (R, T), padded on either side; labels are (R,) classes, and logits (R, C).

        Raises:
            ConfigurationError: the labels are not classes.
            EngineError: the engine failed.
        """
        labels = self.label_words.classes(labels, len(input_ids))
        tokens = self.label_words.tokens.tolist()

        def ask(rows: list[Prompt], names: list[str]) -> Tensor:
            return self.engine.scores(rows, tokens, names)

        unknown = torch.full((len(tokens),), torch.nan)
        answer = self._asked(input_ids, attention_mask, ask, unknown)
        return self.label_words.outputs(
            self.engine, torch.stack(answer), labels, len(input_ids), num_items_in_batch
        )

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> list[list[int]]:
        """Return the tokens that the engine generates after each row; options are those that
        `generate` of transformers has for sampling.
        """
        given = sampling(**options)

        def ask(rows: list[Prompt], names: list[str]) -> list[list[int]]:
            return self.engine.continued(rows, given, names)

        return self._asked(input_ids, attention_mask, ask, [])

    def _asked(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        ask: Callable[[list[Prompt], list[str]], Iterable[Any]],
        unknown: Any,
    ) -> list[Any]:
        """Return the answer to each row, asked with its adapter; rows with one adapter share it.

        The answer of adapters that are not finite is `unknown`: vLLM would keep their keys and
        values, which make other rows NaN later.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
        # a row of the batch looks up the table's only row, to which noise is added for each
        index = torch.zeros_like(input_ids[:, :1])
        values = {part: table(index)[:, 0].cpu() for part, table in self.adapter.items()}
        rows, answers = dict[tuple[bytes, ...], list[int]](), dict[int, Any]()
        for row in range(len(prompts)):
            own = [part[row] for part in values.values()]
            if not all(map(finite, own)):
                answers[row] = unknown
                continue
            rows.setdefault(tuple(part.numpy().tobytes() for part in own), []).append(row)
        groups = list(rows.values())
        for start in range(0, len(groups), self.pool):
            part = groups[start : start + self.pool]
            adapters = [{name: value[own[0]] for name, value in values.items()} for own in part]
            with self._loaded(adapters) as names:
                order = [row for own in part for row in own]
                each = [name for own, name in zip(part, names, strict=True) for _ in own]
                found = ask([prompts[row] for row in order], each)
                answers |= zip(order, found, strict=True)
        return [answers[row] for row in range(len(prompts))]

    def save_pretrained(self, save_directory: str | Path, **options: object) -> None:
        """Write the adapter in PEFT's format."""
        del options
        self._write(Path(save_directory), {p: t.weight[0] for p, t in self.adapter.items()})

    @torch.no_grad()
    def load_adapter(self, folder: str | Path) -> None:
        """Take the weights of an adapter in PEFT's format, of the same shapes."""
        found = load_file(Path(folder, WEIGHTS_FILE))
        for part, table in self.adapter.items():
            table.weight[0] = torch.cat([found[name].flatten() for name in self.shapes[part]])

    @contextmanager
    def _loaded(self, adapters: Sequence[dict[str, Tensor]]) -> Iterator[list[str]]:
        """Have adapters in the engine's pool inside the context, which gives their names."""
        with TemporaryDirectory(dir=self.folder, prefix="hf-flops-") as folder:
            folders = [Path(folder, str(i)) for i in range(len(adapters))]
            for path, adapter in zip(folders, adapters, strict=True):
                self._write(path, adapter)
            with self.engine.loaded(folders) as names:
                yield names

    def _write(self, folder: Path, adapter: dict[str, Tensor]) -> None:
        self.lora.save_pretrained(str(folder))
        tensors = dict[str, Tensor]()
        for part, values in adapter.items():
            tensors |= self._tensors(part, values.detach().cpu())
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS_FILE)

    def _tensors(self, part: str, values: Tensor) -> dict[str, Tensor]:
        """Return views of flat values by name."""
        shapes = self.shapes[part]
        parts = values.split([math.prod(shape) for shape in shapes.values()])
        return {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
