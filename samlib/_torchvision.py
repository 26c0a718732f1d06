"""What is read through torchvision: its datasets, and folders of images. Importing it costs a second: only on demand.

It is imported also where its CUDA build stands beside torch's CPU build (torch ships no CPU torchvision).
"""

import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from samlib.config import UserError, first_line
from samlib.data import PARTS, Source

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    # The build registers fake implementations for two operators whose library it could not load: declare them first.
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision


def stored_dataset(name: str, root: Path) -> Source:
    """CIFAR and Fashion-MNIST through torchvision, which checks their hashes; downloaded where the root lacks them."""
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
        raise UserError(
            f"dataset: {name} is not in root {str(root)!r} and could not be downloaded ({first_line(error)}); put "
            f"torchvision's {dataset} files there, or read image files with dataset=imagefolder"
        ) from None

    def pixels(part) -> np.ndarray:  # (n, channels, height, width)
        array = np.asarray(part.data, dtype=np.uint8)
        return array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)

    labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    return Source(pixels(parts[0]), labels[0], pixels(parts[1]), labels[1], list(parts[0].classes))


def decoded_folder(root: Path, size: int | None) -> Source:
    """What torchvision's ImageFolder finds in root/train and root/test; images of several sizes are resized to one.

    As there: class folders in the order of their names, nested folders, file extensions. Images have one channel only
    if all of them are gray. Raises UserError that names the file or folder, and what to do.
    """
    classes, in_test = (sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir()) for part in PARTS)
    if len(classes) < 2:
        raise UserError(f"root: {str(root / 'train')!r} holds {len(classes)} class folders: at least 2 are needed")
    if unknown := [name for name in in_test if name not in classes]:
        raise UserError(f"root: test has the class {unknown[0]!r}, which train lacks; add it there or remove it")
    find, suffixes = torchvision.datasets.folder.make_dataset, torchvision.datasets.folder.IMG_EXTENSIONS
    index = {name: k for k, name in enumerate(classes)}
    files, test_files = (find(str(root / part), index, suffixes, allow_empty=True) for part in PARTS)
    labels, test_labels = (np.array([k for _, k in part], dtype=np.int64) for part in (files, test_files))
    empty = [root / "train" / name for name, k in index.items() if k not in labels]
    empty += [root / "test"] if not test_files else []
    if empty:
        raise UserError(f"root: {str(empty[0])!r} holds no image ({', '.join(suffixes)})")

    pictures = [_picture(path) for path, _ in files + test_files]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1 and size is None:
        (w, h), (w2, h2) = sorted(sizes)[:2]
        raise UserError(f"image_size: the images are of {len(sizes)} sizes ({w}x{h}, {w2}x{h2}, ...); set image_size")
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    shape = (size, size) if len(sizes) > 1 else pictures[0].size
    rows = [np.asarray(p.convert(mode).resize(shape, Image.Resampling.BILINEAR)) for p in pictures]
    images = np.stack(rows).reshape(len(rows), *shape[::-1], -1).transpose(0, 3, 1, 2)  # (n, channels, height, width)
    images, test_images = np.split(np.ascontiguousarray(images), [len(files)])
    return Source(images, labels, test_images, test_labels, classes)


def _picture(path: str) -> Image.Image:
    """The PIL image in mode L where it is gray, else RGB, never rotated by its EXIF data, as by torchvision's loader.

    16-bit gray levels are divided by 257; of 16-bit colors Pillow keeps the high byte. Gray images of more than 16 bits
    or of floats, whose black and white no file states, are refused.
    """
    try:
        with Image.open(path) as image:
            gray = Image.getmodebase(image.mode) == "L"
            if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
                return image.convert("L" if gray else "RGB")
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow scales PGM to 16 bits
                raise ValueError("its pixels are floats or 32-bit integers: convert it to 8 or 16 bits")
            bits = image.tag_v2[258][0] if image.format == "TIFF" else 16  # BitsPerSample: 12 is read as it is
            return Image.fromarray(np.round(np.asarray(image) * (255 / (2**bits - 1))).astype(np.uint8))
    except Exception as error:  # a decoder raises whatever a broken file provokes
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"root: {path!r} cannot be read as an image ({reason}); mend or remove it") from None
