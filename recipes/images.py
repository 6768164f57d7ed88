"""Image tasks for the ViT recipe: new classes to adapt to, and a small ViT pre-trained on the other classes."""

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Array2D, ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.2
PRECOMPUTE_BYTES = 2**31

CLASS_NAMES = {
    "digits": [str(digit) for digit in range(10)],
    "fashion_mnist": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
}
# Fashion-MNIST is interleaved so that each new class but the bag has a relative among the old ones.
OLD_CLASSES = {"digits": [0, 1, 2, 3, 4], "fashion_mnist": [0, 1, 4, 5, 7]}

PRETRAINING: dict[str, dict[str, Any]] = {
    "digits": {
        "vit": {
            "image_size": 8,
            "patch_size": 2,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
        "epochs": 60,
        "batch_size": 64,
        "learning_rate": 3e-3,
    },
    "fashion_mnist": {
        "vit": {
            "image_size": 28,
            "patch_size": 4,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        "epochs": 5,
        "batch_size": 128,
        "learning_rate": 2e-3,
    },
}


@dataclass(frozen=True)
class ImageTask:
    """A classification task with columns `image` and `label`, and the old classes that precede it, if any."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    old: Dataset | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes to adapt to, by label."""
        return list(self.train.features["label"].names)


def load_images(name: str = "auto", seed: int = 0) -> ImageTask:
    """Load "digits", "fashion_mnist" or a Hub image dataset; `seed` fixes the splits and nothing else.

    Raises:
        FileNotFoundError: Fashion-MNIST is not installed.
        ValueError: The name is no dataset that could be loaded, or its columns are not images and classes.
    """
    folder = Path(os.environ.get("HF_FLOPS_FASHION_MNIST", FASHION_MNIST_FOLDER))
    if name == "auto":
        name = "fashion_mnist" if folder.is_dir() else "digits"
    if name == "digits":
        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)
        return _split_by_class(name, (images, digits.target), None, seed)
    if name == "fashion_mnist":
        return _split_by_class(name, _read_fashion_mnist(folder, "train"), _read_fashion_mnist(folder, "t10k"), seed)
    return _load_hub(name, seed)


def _read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one part, "train" or "t10k": images (N, 28, 28) uint8 and labels (N,) uint8."""
    paths = [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"Fashion-MNIST needs {missing[0]}, which does not exist: run `apt-get install dataset-fashion-mnist`, "
            "or name the folder of its four .gz files in HF_FLOPS_FASHION_MNIST."
        )
    images, labels = (_read_idx(path) for path in paths)
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes: the fourth byte counts the dimensions, which follow as big-endian int32."""
    content = gzip.decompress(path.read_bytes())
    dimensions = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions)


def _split_by_class(
    name: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray] | None, seed: int
) -> ImageTask:
    """Keep the old classes' training images (N, H, W) for pre-training and split those of the new classes."""
    old = OLD_CLASSES[name]
    new = [label for label in range(len(CLASS_NAMES[name])) if label not in old]
    new_test = None if test is None else _select_classes(name, *test, new)
    splits = _split(_select_classes(name, *train, new), new_test, seed)
    return ImageTask(name, *splits, old=_select_classes(name, *train, old))


def _select_classes(name: str, images: np.ndarray, labels: np.ndarray, classes: list[int]) -> Dataset:
    """Make a dataset of some classes, relabelled from 0: images (N, H, W) uint8, labels (N,) integer."""
    rows = np.isin(labels, classes)
    features = Features(
        image=Array2D(images.shape[1:], "uint8"), label=ClassLabel(names=[CLASS_NAMES[name][c] for c in classes])
    )
    columns = {"image": images[rows], "label": np.searchsorted(classes, labels[rows])}
    return Dataset.from_dict(columns, features=features).with_format("numpy")


def _split(train: Dataset, test: Dataset | None, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Take validation, and test where there is none, from the training rows, each class in proportion."""
    if test is None:
        parts = train.train_test_split(TEST_SHARE, seed=seed, stratify_by_column="label")
        train, test = parts["train"], parts["test"]
    parts = train.train_test_split(VALIDATION_SHARE, seed=seed, stratify_by_column="label")
    return parts["train"], parts["test"], test


def _load_hub(name: str, seed: int) -> ImageTask:
    """Load a Hub dataset, whose image and class columns may have any name."""
    try:
        parts = load_dataset(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is neither 'digits' nor 'fashion_mnist', and as a Hub dataset it failed to load ({error}): "
            "check the id and the connection."
        ) from error
    columns = {}
    for column, feature in parts["train"].features.items():
        kind = {Image: "image", ClassLabel: "label"}.get(type(feature))
        if kind and kind not in columns.values():
            columns[column] = kind
    if len(columns) < 2:
        raise ValueError(
            f"{name!r} has the columns {parts['train'].features}, but an Image and a ClassLabel column are needed: "
            "choose an image classification dataset."
        )
    parts = parts.select_columns(list(columns)).rename_columns(columns)
    held_out = next((parts[part] for part in ("test", "validation", "valid") if part in parts), None)
    return ImageTask(name, *_split(parts["train"], held_out, seed))


class PixelDataset(torch.utils.data.Dataset):
    """Rows of preprocessed images: pixel_values (N, C, H, W) float32 and labels (N,) int64."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[row], "labels": self.labels[row]}


def pixel_dataset(dataset: Dataset, processor: Any) -> PixelDataset:
    """Preprocess every image once."""
    batches = [_preprocess(batch, processor) for batch in dataset.iter(batch_size=1024)]
    pixel_values, labels = zip(*batches, strict=True)
    return PixelDataset(torch.cat(pixel_values), torch.cat(labels))


def _preprocess(rows: Mapping[str, Any], processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn images into pixel_values (n, C, H, W) float32, and classes into labels (n,) int64."""
    mode = "RGB" if len(processor.image_mean) == 3 else "L"
    images = [
        image if isinstance(image, PILImage.Image) else PILImage.fromarray(np.asarray(image, np.uint8))
        for image in rows["image"]
    ]
    pixel_values = processor([image.convert(mode) for image in images], return_tensors="pt")["pixel_values"]
    return pixel_values, torch.as_tensor(np.asarray(rows["label"]), dtype=torch.long)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into pixel_values (R, C, H, W) float32 and labels (R,) int64."""
    return {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}


def pretrained_vit(task: ImageTask, cache_dir: str | os.PathLike | None = None, epochs: int | None = None) -> str:
    """Return the folder of a small ViT pre-trained by backprop on the task's old classes, training it if not cached.

    Raises:
        ValueError: The task has no old classes.
    """
    if task.old is None:
        raise ValueError(f"{task.name!r} has no old classes to pre-train on: give the id of a pre-trained Hub model.")
    settings = PRETRAINING[task.name] | ({} if epochs is None else {"epochs": epochs})
    size = settings["vit"]["image_size"]
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, do_resize=False, image_mean=[0.5], image_std=[0.5]
    )
    old = pixel_dataset(task.old, processor)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    key.update(old.pixel_values.numpy().tobytes() + old.labels.numpy().tobytes())
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_flops"
    cache = Path(cache_dir or os.environ.get("HF_FLOPS_CACHE") or default)
    folder = cache / f"vit-{task.name}-{key.hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            model = _pretrain(old, task.old.features["label"].names, settings)
            model.save_pretrained(Path(scratch) / "vit")
            processor.save_pretrained(Path(scratch) / "vit")
            os.rename(Path(scratch) / "vit", folder)
    return str(folder)


def _pretrain(old: PixelDataset, names: list[str], settings: Mapping[str, Any]) -> ViTForImageClassification:
    """Train a ViT from scratch with AdamW and a one-cycle schedule on jittered images."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from the global generator
        torch.default_generator.manual_seed(0)
        config = ViTConfig(num_channels=1, id2label=dict(enumerate(names)), **settings["vit"])
        model = ViTForImageClassification(config).train()
    batch, rate = settings["batch_size"], settings["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = settings["epochs"] * (len(old) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(settings["epochs"]), desc="pre-training on the old classes, once"):
        for rows in torch.randperm(len(old), generator=generator)[: len(old) // batch * batch].split(batch):
            images = _jitter(old.pixel_values[rows], generator)
            model(pixel_values=images, labels=old.labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def _jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 10 %, stretch by up to 20 % and rotate by up to 0.2 rad each of images (n, C, H, W) float32."""
    shift, scale, angle = torch.empty(3, len(images), 2).uniform_(-1, 1, generator=generator)
    angle = 0.2 * angle[:, 0]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    maps = torch.cat([turn * (1 + 0.2 * scale)[:, None], 0.2 * shift[..., None]], 2)
    # grid_sample pads with zero, and the background is -1.
    return F.grid_sample(images + 1, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False) - 1


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the loading report, which would present the new head as a fault."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_vit(model_id: str, task: ImageTask) -> tuple[PreTrainedModel, Any]:
    """Load a pre-trained backbone under a fresh zero head for the task's classes, and its image processor."""
    names = dict(enumerate(task.class_names))
    with _quiet_transformers():
        config = AutoConfig.from_pretrained(
            model_id, id2label=names, label2id={name: label for label, name in names.items()}
        )
        model = AutoModelForImageClassification.from_pretrained(
            model_id, config=config, ignore_mismatched_sizes=True
        )
        processor = AutoImageProcessor.from_pretrained(model_id)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    return model, processor
