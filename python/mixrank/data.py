"""Images from folders, archives and named data sets, decoded and prepared as a model wants them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mixrank.errors import InputError
from mixrank.labels import read_labels
from mixrank.launch import usable_processors
from mixrank.prepare import Prepare

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_SCHEMES = ("torch", "hfds", "hfids", "tfds", "wds")
_FEW_IMAGES = 16  # fewer are decoded sooner than a worker starts


class Batch(NamedTuple):
    """Images ready for a model.

    Attributes:
        images: [B, C, H, W], floating point.
        labels: [B] int64, or None where the images have none.
        names: B names for messages: file names where there are files.
        numbers: B places in the source, from 0 on, images that do not decode included, views counted; None: as they
            come.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]
    numbers: list[int] | None = None


def as_batch(item: Any, index: int = 0) -> Batch:
    """Make a :class:`Batch` of what a data loader yields.

    Args:
        item: a Batch, a tensor [B, C, H, W], a tuple or list that starts with one (labels second, if they are whole
            numbers), or a dict with ``image``/``images``/``pixel_values`` and perhaps ``label``/``labels``.
        index: how many images came before; images without a name are called ``image {n}``.

    Raises:
        InputError: there is no floating-point tensor [B, C, H, W], or the labels are not one for each image.
    """
    if isinstance(item, Batch):
        return item
    images, labels = item, None
    if isinstance(item, dict):
        images = next((item[key] for key in ("image", "images", "pixel_values") if key in item), None)
        labels = next((item[key] for key in ("label", "labels") if key in item), None)
    elif isinstance(item, tuple | list) and item:
        images, labels = item[0], item[1] if len(item) > 1 else None
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a batch must hold floating-point images [B, C, H, W], but it held {found}")
    if isinstance(labels, list) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels)
    # Anything else in second place (masks, soft labels, metadata) is not a class index and no reason to stop.
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        labels = None
    elif len(labels) != len(images):
        raise InputError(f"a batch of {len(images)} images came with {len(labels)} labels")
    names = [f"image {index + number}" for number in range(len(images))]
    return Batch(images, None if labels is None else labels.long(), names)


def open_images(
    source: str | Path,
    preprocessing: dict,
    *,
    labels: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
    root: Path | str | None = None,
    split: str = "validation",
    augment: int = 0,
) -> ImageSource:
    """Find images; nothing is decoded yet.

    Args:
        source: a folder (searched with its subfolders), a ``.tar`` of images, or a name for
            ``timm.data.create_dataset``: ``"torch/cifar10"``, ``"hfds/..."``, ``"tfds/..."``, ``"wds/..."``.
            Where every image lies in a subfolder, and there are two or more, they are the classes in natural order.
        preprocessing: from :func:`mixrank.models.preprocessing`.
        labels: a CSV file with the columns ``file`` (name or path within the folder) and ``label`` (class index),
            exactly one row for each image; others are ignored. It replaces the labels of subfolders.
        limit: take this many images, a random subset (of an unbounded stream: the first ones).
        seed: of the random subset.
        strict: an image that does not decode is an InputError, not a skipped image.
        root: where a named data set lies.
        split: which part of a named data set.
        augment: how many random views follow each image: crops of 60 to 100 % of its area with slight changes of shape,
            half of them mirrored; by the seed the same in each pass.

    Raises:
        InputError: the source cannot be opened or has no image, the CSV file does not fit it, an argument is
            outside its range, or views are wanted of a stream.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, but it was {limit}")
    if augment < 0:
        raise InputError(f"augment must be at least 0, but it was {augment}")
    prepare = Prepare(preprocessing, augment, seed)
    dataset, named = _open(source, prepare.mode, root, split)
    if isinstance(dataset, IterableDataset):
        if augment:
            raise InputError(f"{source} is a stream, of which there are no further views: set augment to 0")
        if labels is not None:
            raise InputError(f"{source} is a stream without file names, so that labels from a file do not apply")
        count = limit or len(cast(Sized, dataset))  # timm's streams say how many they are
        return ImageSource(source, prepare, strict, stream=dataset, count=count, limit=limit)
    if len(dataset) == 0:
        raise InputError(f"images {source} has no image")
    names, targets, classes = _list(dataset, named)
    if labels is not None:
        targets, classes = read_labels(Path(labels), names, source), None
    indices = list(range(len(names)))
    if limit is not None and limit < len(names):
        indices = sorted(random.Random(seed).sample(indices, limit))
    names, targets = [names[i] for i in indices], None if targets is None else [targets[i] for i in indices]
    samples = DecodedImages(dataset, prepare, indices, names, targets, own_labels=named)
    return ImageSource(source, prepare, strict, samples=samples, count=len(indices), classes=classes)


def _open(source: str | Path, mode: str, root: Path | str | None, split: str) -> tuple[Any, bool]:
    """Open through timm; the second value says whether it is a named data set."""
    import timm.data

    path = Path(source)
    scheme, _, rest = str(source).partition("/")
    named = not path.exists() and scheme.lower() in _SCHEMES and bool(rest)
    options: dict[str, Any] = {}
    if named:
        if scheme.lower() == "torch" and root is None:
            raise InputError(f"{source} needs a root: the folder in which the data set lies")
        options = {"name": str(source), "root": None if root is None else str(root), "split": split}
    elif path.is_dir():
        options = {"name": "", "root": str(path), "search_split": False, "input_key": ";".join(_EXTENSIONS)}
    elif path.is_file() and path.suffix == ".tar":
        # No index cache, a pickle beside the archive; no open file either, whose position workers would share.
        options = {"name": "", "root": str(path), "cache_tarinfo": False, "cache_tarfiles": False}
    elif path.is_file():
        raise InputError(f"images {source} is a file, but it must be a folder, a .tar or a named data set")
    else:
        raise InputError(f"images {source} do not exist: give a folder, a .tar, or a name such as hfds/...")
    if not named or scheme.lower() != "torch":
        options["input_img_mode"] = mode
    try:
        # timm prints which package is missing; standard output belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            dataset = timm.data.create_dataset(**options)
    except Exception as error:  # each reader raises in its own way
        found = str(error).strip().splitlines()
        if not named and not isinstance(error, OSError | tarfile.TarError):
            raise InputError(f"images {source} has no image (a file that ends in one of {_EXTENSIONS})") from error
        raise InputError(f"images {source} cannot be opened: {found[0] if found else type(error).__name__}") from error
    return dataset, named


def _list(dataset: Any, named: bool) -> tuple[list[str], list[int] | None, list[str] | None]:
    """Names, labels and class names of a data set with an index, as far as folders give them."""
    count = len(dataset)
    if named:  # some readers fetch the image itself to know its name
        return [f"image {i}" for i in range(count)], None, None
    reader = dataset.reader
    names = [str(reader.filename(i)) for i in range(count)]
    classes: dict[str, int] = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {})
    if len(classes) < 2 or not all("/" in name or os.sep in name for name in names):
        return names, None, None
    targets = reader.targets if hasattr(reader, "targets") else [target for _, target in reader.samples]
    return names, [int(target) for target in targets], sorted(classes, key=classes.__getitem__)


class Decoded(NamedTuple):
    """One image, or the reason why there is none."""

    image: Tensor | None
    label: int | None
    name: str
    number: int
    reason: str = ""


def _sample(item: Any, prepare: Prepare, name: str, number: int, view: tuple[int, int] = (0, 0)) -> Decoded:
    """Decode and prepare a view of an image; ``item`` starts with image and label, or is the error of reading it."""
    label = None
    try:
        if isinstance(item, Exception):
            raise item
        image, label = item[:2]
        label = int(label) if hasattr(label, "__index__") and label >= 0 else None
        return Decoded(prepare(image, *view), label, name, number)
    except Exception as error:  # decoders meet broken bytes with nearly any exception
        text = str(error).strip().splitlines()
        return Decoded(None, label, name, number, text[0] if text else type(error).__name__)


def collate(samples: list[Decoded]) -> tuple[Batch | None, list[tuple[str, str]]]:
    """One batch of those that decoded, and name and reason of the others."""
    good = [sample for sample in samples if sample.image is not None]
    bad = [(sample.name, sample.reason) for sample in samples if sample.image is None]
    if not good:
        return None, bad
    labels = [sample.label for sample in good]
    indices = None if None in labels else torch.tensor(labels, dtype=torch.int64)
    names, numbers = [sample.name for sample in good], [sample.number for sample in good]
    images = [sample.image for sample in good if sample.image is not None]
    return Batch(torch.stack(images), indices, names, numbers), bad


class DecodedImages(Dataset[Decoded]):
    """Some images of a data set with an index, decoded when asked for."""

    def __init__(
        self,
        dataset: Any,
        prepare: Prepare,
        indices: list[int],
        names: list[str],
        labels: list[int] | None,
        own_labels: bool,
    ) -> None:
        # Not timm's data set itself, which replaces an image that does not decode by the next one.
        self.read = getattr(dataset, "reader", dataset)
        self.prepare, self.indices, self.names, self.labels = prepare, indices, names, labels
        self.labelled = labels is not None or (own_labels and self._get(0, 0).label is not None)

    def __len__(self) -> int:
        return len(self.indices) * self.prepare.views

    def __getitem__(self, number: int) -> Decoded:
        position, view = divmod(number, self.prepare.views)
        sample = self._get(number, position, view)
        if not self.labelled:
            return sample._replace(label=None)
        return sample if self.labels is None else sample._replace(label=self.labels[position])

    def prepared_by(self, prepare: Prepare) -> DecodedImages:
        """The same images prepared otherwise."""
        return DecodedImages(self.read, prepare, self.indices, self.names, self.labels, own_labels=self.labelled)

    def _get(self, number: int, position: int, view: int = 0) -> Decoded:
        try:
            item = self.read[self.indices[position]]
        except Exception as error:  # as for decoders: archives and data sets raise what they like
            item = error
        return _sample(item, self.prepare, self.names[position], number, (self.indices[position], view))


class ImageSource:
    """Images that can be gone through any number of times, in the same order.

    Attributes:
        names: the images' names, in order; empty for a stream.
        labelled: whether the images have labels; of a stream, which cannot be looked into, always True.
        classes: the names of the subfolders that the labels count, or None where the labels come from elsewhere.
        skipped: name and reason of each image that did not decode, filled while loading.
        samples: the images one by one; None of a stream.
    """

    def __init__(
        self,
        source: str | Path,
        prepare: Prepare,
        strict: bool,
        *,
        count: int,
        samples: DecodedImages | None = None,
        stream: IterableDataset | None = None,
        classes: list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.source, self.classes, self.names = source, classes, [] if samples is None else samples.names
        self._prepare, self._strict, self._count, self._limit = prepare, strict, count, limit
        self.samples = samples
        self._stream: Iterable[Any] = () if stream is None else stream
        self._skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """How many images and views there are before any is skipped; of a stream, as many as it says, or 0."""
        return self._count * self.views

    @property
    def views(self) -> int:
        """How many views of each image follow each other, the plain one first."""
        return self._prepare.views

    @property
    def skipped(self) -> list[str]:
        return [f"{name}: {reason}" for name, reason in self._skipped.items()]

    @property
    def labelled(self) -> bool:
        return self.samples is None or self.samples.labelled

    def batches(self, batch_size: int, workers: int | None = None, part: tuple[int, int] = (0, 1)) -> Batches:
        """Return the images in batches, as an iterable that can be gone through again.

        Args:
            batch_size: images in a batch, before those that do not decode are taken out.
            workers: processes that decode; None chooses, 0 decodes in this process.
            part: ``(i, n)``: every n-th batch from the i-th on, as :func:`mixrank.processes.place` divides them.

        Raises:
            InputError: an argument is outside its range; while iterating: no image decodes, or with ``strict`` one
                does not.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but it was {batch_size}")
        if workers is not None and workers < 0:
            raise InputError(f"workers must be at least 0, but it was {workers}")
        if not 0 <= part[0] < part[1]:
            raise InputError(f"part must be (i, n) with 0 <= i < n, but it was {part}")
        if part[1] > 1 and self.samples is None:
            raise InputError(f"{self.source} is a stream, which processes cannot share")
        if len(self) <= part[0] * batch_size and part[1] > 1:
            raise InputError(
                f"batch_size={batch_size} makes fewer batches of {len(self)} images than the {part[1]} processes that "
                "share them"
            )
        return Batches(self, batch_size, self._choose_workers(batch_size) if workers is None else workers, part)

    def _choose_workers(self, batch_size: int) -> int:
        workers = min(2, usable_processors())
        if self._count < _FEW_IMAGES:
            return 0
        shared = Path("/dev/shm")
        # Containers often give little of the memory through which workers send tensors; running out is a crash.
        needed = 2 * workers * batch_size * math.prod(self._prepare.size) * 4
        if shared.is_dir() and shutil.disk_usage(shared).free < 2 * needed:
            return 0
        return workers

    def _read(
        self, batch_size: int, workers: int, part: tuple[int, int]
    ) -> Iterator[tuple[Batch | None, list[tuple[str, str]]]]:
        if self.samples is not None:
            starts = range(part[0] * batch_size, len(self.samples), part[1] * batch_size)
            chosen = [list(range(start, min(start + batch_size, len(self.samples)))) for start in starts]
            # A generator of its own: otherwise each pass takes a number from the caller's random stream.
            generator = torch.Generator()
            yield from DataLoader(
                self.samples, batch_sampler=chosen, collate_fn=collate, num_workers=workers, generator=generator
            )
            return
        items = enumerate(itertools.islice(self._stream, self._limit))
        while some := list(itertools.islice(items, batch_size)):
            yield collate([_sample(item, self._prepare, f"image {number}", number) for number, item in some])


class Batches:
    """Batches of an :class:`ImageSource`; ``len()`` is the largest number there can be."""

    def __init__(self, source: ImageSource, batch_size: int, workers: int, part: tuple[int, int]) -> None:
        self.source, self.batch_size, self.workers, self.part = source, batch_size, workers, part

    def __len__(self) -> int:
        return len(range(self.part[0], -(-len(self.source) // self.batch_size), self.part[1]))

    @property
    def views(self) -> int:
        return self.source.views

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def skipped(self) -> list[str]:
        return self.source.skipped

    def __iter__(self) -> Iterator[Batch]:
        source, empty = self.source, True
        for batch, bad in source._read(self.batch_size, self.workers, self.part):
            if bad and source._strict:
                raise InputError(f"{source.source}: {bad[0][0]} does not decode: {bad[0][1]}")
            source._skipped |= dict(bad)
            if batch is not None:
                empty = False
                yield batch
        if empty:
            first = source.skipped[0] if source.skipped else "there is none"
            raise InputError(f"no image of {source.source} decodes ({first})")
