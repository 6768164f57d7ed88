"""Image tasks for the ViT recipe: new classes to adapt to, and a small ViT pre-trained on the other
classes.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Array2D, ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from hf_flops import ConfigurationError
from recipes.assets import appearing, cache_folder
from recipes.common import load_hub
from recipes.pretraining import PRETRAINING, pretrain

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.2
PRECOMPUTED_BYTES = 2**31
FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DATASETS = "'digits', 'fashion_mnist', 'auto' (the latter where installed) or a Hub id."
CLASS_NAMES = {"digits": list("0123456789"), "fashion_mnist": FASHION}
# Fashion-MNIST is interleaved so that each new class but the bag has a relative among the old ones.
OLD_CLASSES = {"digits": [0, 1, 2, 3, 4], "fashion_mnist": [0, 1, 4, 5, 7]}
SMALL_VIT = {"num_channels": 1, "num_hidden_layers": 4, "num_attention_heads": 4}
VITS = {
    "digits": {
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
    },
    "fashion_mnist": {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 64,
        "intermediate_size": 128,
    },
}


@dataclass(frozen=True)
class ImageTask:
    """A classification task with columns `image` and `label`, and the old classes' rows, if there
    are any.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    old: Dataset | None = None

    def __str__(self) -> str:
        return f"{len(self.train):,} images of {', '.join(self.class_names)}"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes to adapt to, by label."""
        return list(self.train.features["label"].names)


def load_images(name: str = "auto", seed: int = 0, *, every_class: bool = False) -> ImageTask:
    """Load "digits", "fashion_mnist" or a Hub image dataset; `seed` fixes the splits and nothing
    else.

    The embedded sets' rows of old classes, which the small ViT was pre-trained on, are apart unless
    `every_class`.

    Raises:
        FileNotFoundError: Fashion-MNIST is not installed.
        ConfigurationError: The name is no dataset that could be loaded and split, or its columns
            are not images and classes.
    """
    folder = Path(os.environ.get("HF_FLOPS_FASHION_MNIST", FASHION_MNIST_FOLDER))
    if name == "auto":
        name = "fashion_mnist" if folder.is_dir() else "digits"
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        pixels = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
        return _split_by_class(name, (pixels, labels), None, seed, every_class)
    if name == "fashion_mnist":
        kinds = ("images-idx3", "labels-idx1")
        train, test = (
            [_read_idx(folder / f"{part}-{kind}-ubyte.gz") for kind in kinds]
            for part in ("train", "t10k")
        )
        return _split_by_class(name, train, test, seed, every_class)
    return _load_hub(name, seed)


def few(task: ImageTask, per_class: int | None) -> ImageTask:
    """Keep the first training images of each class, 0 for all; by default 100 of Fashion-MNIST, and
    else all.
    """
    if per_class is None:
        per_class = {"fashion_mnist": 100}.get(task.name, 0)
    if not per_class:
        return task
    labels = np.asarray(task.train["label"])
    kept = np.concatenate(
        [np.flatnonzero(labels == c)[:per_class] for c in range(len(task.class_names))]
    )
    return replace(task, train=task.train.select(np.sort(kept)))


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes: the fourth byte counts the dimensions, which follow as
    big-endian int32.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST needs {path}, which does not exist: run `apt-get install "
            "dataset-fashion-mnist`, or name the folder of its four .gz files in "
            "HF_FLOPS_FASHION_MNIST."
        )
    content = gzip.decompress(path.read_bytes())
    dimensions = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions)


def _split_by_class(
    name: str,
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray] | None,
    seed: int,
    every_class: bool,
) -> ImageTask:
    """Split off the old classes; a part is its images (N, H, W) uint8 and labels (N,) integer."""
    old = [] if every_class else OLD_CLASSES[name]
    new = sorted({*range(len(CLASS_NAMES[name]))} - {*old})
    held_out = None if test is None else _select_classes(name, *test, new)
    splits = _split(_select_classes(name, *train, new), held_out, seed)
    return ImageTask(name, *splits, old=_select_classes(name, *train, old) if old else None)


def _select_classes(
    name: str, images: np.ndarray, labels: np.ndarray, classes: list[int]
) -> Dataset:
    """Make a dataset of some classes, relabelled from 0: images (N, H, W) uint8, labels (N,)
    integer.
    """
    rows, names = np.isin(labels, classes), [CLASS_NAMES[name][label] for label in classes]
    features = Features(image=Array2D(images.shape[1:], "uint8"), label=ClassLabel(names=names))
    columns = {"image": images[rows], "label": np.searchsorted(classes, labels[rows])}
    return Dataset.from_dict(columns, features=features).with_format("numpy")


def _split(train: Dataset, test: Dataset | None, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Take validation, and test where there is none, from the training rows."""
    if test is None:
        train, test = train.train_test_split(TEST_SHARE, seed=seed).values()
    train, validation = train.train_test_split(VALIDATION_SHARE, seed=seed).values()
    return train, validation, test


def _load_hub(name: str, seed: int) -> ImageTask:
    """Load a Hub dataset, whose image and class columns may have any name."""
    parts = load_hub(name, CLASS_NAMES)
    if "train" not in parts:
        raise ConfigurationError(
            f"{name!r} has no split 'train', but {', '.join(parts)}: choose a dataset to train on."
        )
    columns = {
        type(feature): column for column, feature in reversed(parts["train"].features.items())
    }
    if not {Image, ClassLabel} <= columns.keys():
        raise ConfigurationError(
            f"{name!r} has no column of images or of class labels: choose an image classification "
            "dataset."
        )
    if len(parts["train"]) < 8:
        raise ConfigurationError(
            f"{name!r} has {len(parts['train'])} images to train on: 8 or more can be split."
        )
    renamed = {columns[Image]: "image", columns[ClassLabel]: "label"}
    parts = parts.select_columns(list(renamed)).rename_columns(renamed)
    held_out = next(
        (parts[part] for part in ("test", "validation", "valid") if part in parts), None
    )
    return ImageTask(name, *_split(parts["train"], held_out, seed))


class PixelDataset(torch.utils.data.Dataset):
    """Rows of pixel_values (C, H, W) float32, labels () int64 and sample_id () int64, the row's
    index.
    """

    def __init__(
        self, dataset: Dataset, processor: Any, tensors: Sequence[torch.Tensor] | None = None
    ) -> None:
        self.dataset, self.processor, self.tensors = dataset, processor, tensors

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if self.tensors is None:
            pixel_values, labels = (
                part[0] for part in _preprocess(self.dataset[row : row + 1], self.processor)
            )
        else:
            pixel_values, labels = (part[row] for part in self.tensors)
        return {"pixel_values": pixel_values, "labels": labels, "sample_id": torch.tensor(row)}


def pixel_dataset(dataset: Dataset, processor: Any) -> PixelDataset:
    """Preprocess every image once, or whenever it is read where all of them would take more than 2
    GiB.
    """
    if len(dataset) * _preprocess(dataset[:1], processor)[0].nbytes > PRECOMPUTED_BYTES:
        return PixelDataset(dataset, processor)
    batches = [_preprocess(rows, processor) for rows in dataset.iter(batch_size=1024)]
    return PixelDataset(
        dataset, processor, [torch.cat(parts) for parts in zip(*batches, strict=True)]
    )


def pixel_parts(task: ImageTask, processor: Any) -> dict[str, PixelDataset]:
    """Preprocess the images of every part of a task."""
    return {
        part: pixel_dataset(getattr(task, part), processor)
        for part in ("train", "validation", "test")
    }


def _preprocess(rows: Mapping[str, Any], processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn images into pixel_values (n, C, H, W) float32, and classes into labels (n,) int64."""
    mode = "RGB" if len(processor.image_mean) == 3 else "L"
    pictures = (
        i if isinstance(i, PILImage.Image) else PILImage.fromarray(i.astype(np.uint8))
        for i in rows["image"]
    )
    pixel_values = processor([picture.convert(mode) for picture in pictures], return_tensors="pt")[
        "pixel_values"
    ]
    return pixel_values, torch.as_tensor(np.asarray(rows["label"]), dtype=torch.long)


def patch_order(height: int, width: int, size: int, seed: int = 0) -> torch.Tensor:
    """Return a random order (P,) int64 of the patches (size × size) of images.

    Raises:
        ConfigurationError: the images do not divide into such patches.
    """
    if height % size or width % size:
        raise ConfigurationError(
            f"--shuffle_patches needs images that divide into patches: {height} × {width} pixels "
            f"do not divide by {size}."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(height // size * (width // size), generator=generator)


def reorder_patches(pixels: torch.Tensor, size: int, order: torch.Tensor) -> torch.Tensor:
    """Put the patches (size × size) of images (N, C, H, W) in another order."""
    patches = F.unfold(pixels, size, stride=size)[:, :, order]
    return F.fold(patches, pixels.shape[-2:], size, stride=size)


class PatchShuffler:
    """An image processor that puts the patches of all images in one fixed random order.

    Raises:
        ConfigurationError: the model has no patches of one size.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor, self.size = processor, getattr(config, "patch_size", None)
        self.image_mean = processor.image_mean
        if not isinstance(self.size, int):
            raise ConfigurationError(
                f"--shuffle_patches needs a model with square patches, and a {config.model_type} "
                f"model's patch_size is {self.size}."
            )

    def __call__(self, images: Any, **options: Any) -> dict[str, torch.Tensor]:
        """Preprocess images to pixel_values (N, C, H, W) float32."""
        pixels = self.processor(images, **options)["pixel_values"]
        order = patch_order(*pixels.shape[-2:], self.size)
        return {"pixel_values": reorder_patches(pixels, self.size, order)}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into pixel_values (R, C, H, W) float32, labels (R,) int64 and sample_id (R,) where
    rows have it.
    """
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def pretrained_vit(
    task: ImageTask, cache_dir: str | os.PathLike | None = None, epochs: int | None = None
) -> str:
    """Return the folder of a small ViT pre-trained by backprop on the task's old classes, training
    it if not cached.

    Raises:
        ConfigurationError: The task has no old classes.
    """
    if task.old is None:
        raise ConfigurationError(
            f"{task.name!r} has no old classes to pre-train on: give the id of a pre-trained Hub "
            "model."
        )
    config = SMALL_VIT | VITS[task.name]
    settings = PRETRAINING[task.name] | ({} if epochs is None else {"epochs": epochs})
    key = json.dumps([OLD_CLASSES[task.name], config, settings], sort_keys=True)
    folder = Path(
        cache_dir or cache_folder(),
        f"vit-{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}",
    )
    if folder.is_dir():
        return str(folder)
    processor = transformers.ViTImageProcessorPil(
        size=config["image_size"], image_mean=[0.5], image_std=[0.5]
    )
    with appearing(folder) as target:
        model = pretrain(config, *pixel_dataset(task.old, processor).tensors, **settings)
        model.save_pretrained(target)
        processor.save_pretrained(target)
    return str(folder)


def load_vit(model_id: str, task: ImageTask) -> tuple[transformers.PreTrainedModel, Any]:
    """Load a pre-trained backbone under a zero head for the task's classes, and its image
    processor.
    """
    names = dict(enumerate(task.class_names))
    heads = {
        "id2label": names,
        "label2id": {name: label for label, name in names.items()},
        "ignore_mismatched_sizes": True,
    }
    verbosity = transformers.logging.get_verbosity()
    # the loading report presents the new head as a fault
    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(model_id, **heads)
        processor = transformers.AutoImageProcessor.from_pretrained(model_id)
    finally:
        transformers.logging.set_verbosity(verbosity)
    for parameter in model.classifier.parameters():
        torch.nn.init.zeros_(parameter)
    return model, processor


def check_lora_layers(model: transformers.PreTrainedModel, path: str) -> None:
    """Refuse a model that has no layers for the recipe's LoRA.

    Raises:
        ConfigurationError: it is such a model.
    """
    if not any(name.endswith((".q_proj", ".v_proj")) for name, _ in model.named_modules()):
        raise ConfigurationError(
            f"--model {path} is a {type(model).__name__}, without the attention layers q_proj and "
            "v_proj that LoRA is for: choose a vision transformer."
        )
