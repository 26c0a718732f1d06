"""Datasets as uint8 tensors on the training device, the subset and label noise of a run, and its seeded batches."""

import hashlib
import importlib.util
import math
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from samlib.config import RunConfig, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
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


def _torchvision(name: str, root: Path) -> Source:
    """CIFAR and Fashion-MNIST through torchvision, which checks their hashes; downloaded where the root lacks them."""
    from samlib._torchvision import torchvision

    dataset = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}[name]
    read = getattr(torchvision.datasets, dataset)
    parts = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            for train in (True, False):
                try:
                    parts.append(read(root, train=train, download=False))
                except RuntimeError:  # torchvision's word for "not there, or not intact"
                    parts.append(read(root, train=train, download=True))
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset: {name} is not in root {str(root)!r} and could not be downloaded ({reason}); put torchvision's "
            f"{dataset} files there, or read image files with dataset=imagefolder"
        ) from None

    def pixels(part) -> np.ndarray:  # (n, channels, height, width)
        array = np.asarray(part.data, dtype=np.uint8)
        return array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)

    labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    return Source(pixels(parts[0]), labels[0], pixels(parts[1]), labels[1], list(parts[0].classes))


def _image_folder(root: Path, size: int | None) -> Source:
    """root/train/<class>/* and root/test/<class>/*, decoded once into a cache that a changed file makes stale."""
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise UserError(
                f"root: {str(root / part)!r} is not a folder; imagefolder reads {root}/train/<class>/<image>"
            )
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"root: {str(root / 'train')!r} holds {len(classes)} class folders: at least 2 are needed")
    unknown = sorted(
        p.name for p in (root / "test").iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in classes
    )
    if unknown:
        raise UserError(f"root: test has the class {unknown[0]!r}, which train lacks; add it there or remove it")
    files: dict[str, list[Path]] = {}
    for part in ("train", "test"):
        for name in classes:
            folder = root / part / name
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            files[f"{part}/{name}"] = [p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
        if part == "train" and (empty := [name for name in classes if not files[f"train/{name}"]]):
            raise UserError(f"root: the class folder {str(root / 'train' / empty[0])!r} holds no image")
    if not any(files[f"test/{name}"] for name in classes):
        raise UserError(f"root: {str(root / 'test')!r} holds no image")

    listing = hashlib.sha256()
    for path in (p for paths in files.values() for p in paths):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"root: {str(path)!r} cannot be read ({error.strerror}); mend or remove it") from None
        listing.update(f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    key = listing.hexdigest()[:16]
    try:
        with FileLock(root / ".samlib.lock"):
            return _cached(root, files, classes, size, key)
    except OSError as error:  # read-only, or full
        warnings.warn(
            f"{root} cannot be written ({error.strerror}), so its images are decoded anew for every run", stacklevel=2
        )
        return Source(*_decode(files, classes, size)[0], classes)


def _cached(root: Path, files: dict[str, list[Path]], classes: list[str], size: int | None, key: str) -> Source:
    names = ("images", "labels", "test_images", "test_labels")
    for folder in (root / f".samlib-{key}", root / f".samlib-{key}-{size}"):
        if (folder / "complete").exists():
            try:
                return Source(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names), classes)
            except (OSError, ValueError, EOFError):  # damaged: made anew
                shutil.rmtree(folder)
    for old in root.glob(".samlib-*"):
        if old.is_dir() and not old.name.startswith(f".samlib-{key}"):
            shutil.rmtree(old)
    arrays, resized = _decode(files, classes, size)
    folder = root / (f".samlib-{key}-{size}" if resized else f".samlib-{key}")
    try:
        folder.mkdir(exist_ok=True)
        for name, array in zip(names, arrays, strict=True):
            np.save(folder / f"{name}.npy", array)
        (folder / "complete").touch()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Source(*arrays, classes)


def _decode(
    files: dict[str, list[Path]], classes: list[str], size: int | None
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], bool]:
    """Images and labels of both parts; and whether images of several sizes had to be resized to one."""
    from PIL import Image

    images: dict[str, list] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for folder, paths in files.items():
        part, name = folder.split("/", 1)
        for path in paths:
            try:
                with Image.open(path) as image:
                    images[part].append(image.copy() if image.mode == "L" else image.convert("RGB"))
            except Exception as error:  # a decoder raises whatever a broken file provokes
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(f"root: {str(path)!r} is not an intact image ({reason}); mend or remove it") from None
            labels[part].append(classes.index(name))
    everything = images["train"] + images["test"]
    sizes = {image.size for image in everything}
    if len(sizes) > 1 and size is None:
        (w, h), (w2, h2) = sorted(sizes)[:2]
        raise UserError(f"image_size: the images are of {len(sizes)} sizes ({w}x{h}, {w2}x{h2}, ...); set image_size")
    mode = "L" if all(image.mode == "L" for image in everything) else "RGB"

    def stack(part: str) -> np.ndarray:  # (n, channels, height, width)
        rows = []
        for image in images[part]:
            image = image.convert(mode)
            if len(sizes) > 1:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            rows.append(np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1))
        return np.stack(rows)

    arrays = (stack("train"), np.array(labels["train"]), stack("test"), np.array(labels["test"]))
    return arrays, len(sizes) > 1


def load_source(config: RunConfig) -> Source:
    """The dataset that a configuration names. Raises UserError, with what to do, where it cannot be read."""
    if config.dataset == "digits":
        return _digits()
    root = Path(config.root)
    if config.dataset == "imagefolder":
        try:
            return _image_folder(root, config.image_size)
        except OSError as error:
            raise UserError(f"root: {error.filename!r} cannot be read ({error.strerror}); mend or remove it") from None
    return _torchvision(config.dataset, root)


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices (m,) of round(fraction x size) random members of each class; raises where one would be empty."""
    draw = generator("subset", seed)
    chosen = []
    for k in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == k).flatten()
        count = round(fraction * len(members))
        if not count:
            raise UserError(f"data_fraction: {fraction:g} of class {k} ({len(members)} images) is none; raise it")
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
    pieces = [
        torch.nn.functional.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for piece in images.split(4096)
    ]
    return torch.cat(pieces)


@dataclass
class Data:
    """What one run sees, on its device: images uint8 (n, channels, height, width), labels int64 (n)."""

    images: Tensor
    labels: Tensor  # as trained on
    true_labels: Tensor
    flipped: Tensor  # bool (n): where the two differ
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Tensor  # (channels), of the whole training set, in 0..255
    std: Tensor
    channels_last: bool

    def normalized(self, images: Tensor) -> Tensor:
        """float32 images with the training set's mean 0 and standard deviation 1 a channel."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = images.to(torch.float32, memory_format=layout)
        return x.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])


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
    """Dataset, stratified subset, label noise and sizes as configured; they follow from the data seed alone."""
    source = load_source(config)
    labels = torch.from_numpy(np.array(source.labels))
    whole = torch.from_numpy(np.array(source.images))
    rows = stratified_subset(labels, config.data_fraction, config.subset_seed)
    mean, std = channel_statistics(whole[:: max(1, len(whole) // 10_000)])  # every fifth of CIFAR: known well enough
    noisy, flipped = flip_labels(labels[rows], config.noise_fraction, len(source.classes), config.subset_seed)
    images = resize(whole[rows], config.image_size)
    test = resize(torch.from_numpy(np.array(source.test_images)), config.image_size)
    tensors = (images, noisy, labels[rows], flipped, test, torch.from_numpy(np.array(source.test_labels)))
    return Data(
        *(t.to(device) for t in tensors),
        classes=source.classes,
        mean=mean.to(device),
        std=std.to(device),
        channels_last=images.shape[-1] >= 16,  # measured: a quarter faster at 16x16 on a CPU, slower at 8x8
    )


class Batches:
    """The training batches of a run: order and augmentation of a step follow from (seed, epoch, step) alone.

    `epoch(e)` draws an epoch's plan on the CPU; `assemble(*plan[step])` makes the batch on the device. A last batch of
    one image, which batch normalization cannot take, is left out, as is a smaller one where the configuration says so.
    """

    def __init__(self, data: Data, config: RunConfig) -> None:
        self.data, self.config = data, config
        self.n, _, self.height, self.width = data.images.shape
        self.pad = max(1, self.height // 8) if config.augment else 0  # 4 pixels at 32x32
        self.images = torch.nn.functional.pad(data.images, (self.pad,) * 4)
        device = data.images.device
        self._channel = torch.arange(data.images.shape[1], device=device)[None, :, None, None]
        self._row = torch.arange(self.height, device=device)
        self._column = torch.arange(self.width, device=device)
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
