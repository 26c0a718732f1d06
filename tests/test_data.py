import dataclasses
import hashlib
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.error
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samlib.config import RunConfig, UserError
from samlib.data import (
    Batches,
    Data,
    channel_statistics,
    flip_labels,
    load_data,
    load_source,
    resize,
    stratified_subset,
)

DIGITS = RunConfig(dataset="digits", batch_size=64)


def digits(**fields) -> Data:
    return load_data(DIGITS.model_copy(update=fields))


def made_up(n=21, channels=3, size=16, classes=4) -> Data:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, classes, (n,), generator=draw)
    clean = torch.zeros(n, dtype=torch.bool)
    mean, std = torch.linspace(100, 140, channels), torch.linspace(50, 70, channels)
    none, unlabelled = images[:0], labels[:0]
    return Data(images, labels, labels, clean, none, unlabelled, images, labels, list("abcd"), mean, std)


# Digits


def test_the_digits_split_is_what_it_was():
    source = load_source(DIGITS)
    assert source.images.shape == (1005, 1, 8, 8) and source.test_images.shape == (792, 1, 8, 8)
    digest = hashlib.sha256()
    for array in (source.images, source.labels, source.test_images, source.test_labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "c9841e29bd2c186f"


def test_the_digits_are_those_of_scikit_learn_split_class_by_class():
    from sklearn.datasets import load_digits

    source, bunch = load_source(DIGITS), load_digits()
    images = np.concatenate([source.images, source.test_images])[:, 0]
    labels = np.concatenate([source.labels, source.test_labels])
    theirs = zip(np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target, strict=True)
    assert sorted((x.tobytes(), y) for x, y in zip(images, labels, strict=True)) == sorted(
        (x.tobytes(), y) for x, y in theirs
    )
    assert np.bincount(source.labels).tolist() == [round(0.56 * n) for n in np.bincount(labels)]


# Subset and label noise


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 1.0])
def test_the_subset_has_its_share_of_each_class(fraction):
    labels = torch.from_numpy(load_source(DIGITS).labels)
    rows = stratified_subset(labels, fraction, seed=3)
    counts = torch.bincount(labels[rows], minlength=10).tolist()
    assert counts == [round(fraction * int((labels == k).sum())) for k in range(10)]
    assert len(rows.unique()) == len(rows) and torch.equal(rows, rows.sort().values)


def test_a_subset_without_a_class_is_refused():
    with pytest.raises(UserError, match="data_fraction: 0.001 of class 0 .* is none; raise it"):
        digits(data_fraction=0.001)


@pytest.mark.parametrize(
    "noise, n", [(0.0, 50), (0.1, 99), (0.2, 1000), (0.29, 100), (0.4, 7), (0.57, 100), (0.999, 10)]
)
def test_noise_flips_exactly_its_share_each_to_another_class_and_remembers_which(noise, n):
    labels = torch.arange(n) % 10
    noisy, flipped = flip_labels(labels, noise, 10, seed=1)
    assert int(flipped.sum()) == math.floor(round(noise * n, 6))
    assert torch.equal(noisy != labels, flipped)
    assert noisy.min() >= 0 and noisy.max() < 10


def test_noise_moves_to_every_other_class_with_equal_chances():
    noisy, flipped = flip_labels(torch.full((100_000,), 2), 0.9, 5, seed=0)
    counts = torch.bincount(noisy[flipped], minlength=5)
    assert counts[2] == 0
    expected, others = 90_000 / 4, counts[[0, 1, 3, 4]]
    chi_square = float(((others - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # the 0.1 % point with 3 degrees of freedom


def test_labels_of_one_class_cannot_be_flipped():
    with pytest.raises(UserError, match="noise_fraction"):
        flip_labels(torch.zeros(10, dtype=torch.int64), 0.5, 1, seed=0)


def test_the_data_remember_what_was_flipped():
    data = digits(noise_fraction=0.3, data_fraction=0.5)
    assert int(data.flipped.sum()) == math.floor(0.3 * len(data.images))
    assert torch.equal(data.labels != data.true_labels, data.flipped)
    assert torch.equal(data.test_labels, digits().test_labels)


def test_subset_and_noise_follow_from_the_data_seed_and_batches_from_the_seed():
    a, b = (digits(data_fraction=0.2, noise_fraction=0.2, seed=s, data_seed=5) for s in (0, 1))
    c = digits(data_fraction=0.2, noise_fraction=0.2, seed=5)
    for other in (b, c):
        assert torch.equal(a.images, other.images) and torch.equal(a.labels, other.labels)
    d = digits(data_fraction=0.2, noise_fraction=0.2, seed=0, data_seed=6)
    assert not torch.equal(a.images, d.images)
    plans = [Batches(a, DIGITS.model_copy(update={"seed": s})).epoch(0) for s in (0, 0, 1)]
    assert torch.equal(plans[0][0][0], plans[1][0][0]) and not torch.equal(plans[0][0][0], plans[2][0][0])


def test_the_subset_of_a_seed_is_the_same_with_and_without_noise():
    clean, noisy = digits(data_fraction=0.3), digits(data_fraction=0.3, noise_fraction=0.4)
    assert torch.equal(clean.images, noisy.images) and torch.equal(clean.labels, noisy.true_labels)


@pytest.mark.parametrize(
    "fields, digest",
    [({}, "0252f08ecfcdd722"), ({"noise_fraction": 0.3, "data_fraction": 0.2, "data_seed": 5}, "ac3652025f43acfc")],
)
def test_without_validation_the_data_are_those_of_the_first_published_runs(fields, digest):
    data, sha = digits(**fields), hashlib.sha256()
    for name in ("images", "labels", "true_labels", "flipped", "test_images", "test_labels"):
        sha.update(getattr(data, name).numpy().tobytes())
    assert sha.hexdigest()[:16] == digest
    assert data.validation_images.shape == (0, 1, 8, 8) and data.validation_labels.shape == (0,)


def images_of(*parts) -> list[bytes]:
    return sorted(image.numpy().tobytes() for part in parts for image in part)


def test_validation_is_its_share_of_each_class_of_the_subset_and_the_rest_is_trained_on():
    whole, part = digits(data_fraction=0.5), digits(data_fraction=0.5, validation_fraction=0.2)
    assert images_of(part.images, part.validation_images) == images_of(whole.images)
    held_out = torch.bincount(part.validation_labels, minlength=10)
    assert held_out.tolist() == [round(0.2 * n) for n in torch.bincount(whole.labels, minlength=10).tolist()]
    assert torch.equal(part.test_images, whole.test_images)


def test_validation_labels_are_as_noisy_as_those_trained_on():
    clean, noisy = (digits(validation_fraction=0.3, noise_fraction=noise) for noise in (0.0, 0.4))
    assert torch.equal(clean.validation_images, noisy.validation_images)
    n = len(noisy.validation_labels)
    assert int((noisy.validation_labels != clean.validation_labels).sum()) == math.floor(0.4 * n)
    assert int(noisy.flipped.sum()) == math.floor(0.4 * len(noisy.images))
    assert torch.equal(noisy.flipped, noisy.labels != clean.labels)


def test_validation_follows_from_the_data_seed_alone():
    fields = {"validation_fraction": 0.2, "noise_fraction": 0.2, "data_seed": 5}
    a, b = digits(**fields, seed=0), digits(**fields, seed=1, mix="sam", batch_size=32, augment=False)
    assert a.fingerprint == b.fingerprint
    assert images_of(a.validation_images) != images_of(digits(**fields | {"data_seed": 6}).validation_images)


@pytest.mark.parametrize(
    "share, words",
    [(0.001, "0.001 of class 0 .* is none; raise it"), (0.999, "no image of class 0 to train on; lower")],
)
def test_a_validation_share_that_leaves_a_class_without_images_is_refused(share, words):
    with pytest.raises(UserError, match=f"^validation_fraction: .*{words}"):
        digits(validation_fraction=share)


def test_the_fingerprint_changes_with_whatever_a_run_is_trained_and_tested_on():
    data = digits(validation_fraction=0.2, noise_fraction=0.2)
    assert data.fingerprint == digits(validation_fraction=0.2, noise_fraction=0.2).fingerprint
    assert len(data.fingerprint) == 64
    seen = {data.fingerprint}
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if isinstance(value, torch.Tensor):
            value = value.clone()
            value.view(-1)[-1] = not value.view(-1)[-1] if value.dtype == torch.bool else value.view(-1)[-1] + 1
        else:
            value = [*value[:-1], "another"]
        seen.add(dataclasses.replace(data, **{field.name: value}).fingerprint)
    square = data.images.permute(0, 1, 3, 2)
    for images in (square, square.to(memory_format=torch.channels_last)):  # the layout in memory is no part of it
        seen.add(dataclasses.replace(data, images=images).fingerprint)
    assert len(seen) == 2 + len(dataclasses.fields(data))


# Batches


def test_a_batch_follows_from_seed_epoch_and_step_alone():
    config = RunConfig(dataset="imagefolder", batch_size=8)
    torch.manual_seed(0)
    one = Batches(made_up(), config)
    history = [[one.assemble(*plan) for plan in one.epoch(e)] for e in range(4)]
    torch.manual_seed(99)
    torch.rand(7)
    x, y = (other := Batches(made_up(), config)).assemble(*other.epoch(3)[1])
    assert torch.equal(x, history[3][1][0]) and torch.equal(y, history[3][1][1])
    assert not torch.equal(history[0][0][0], history[1][0][0])


@pytest.mark.parametrize("n, batch", [(24, 8), (21, 8), (9, 32)])
def test_an_epoch_sees_every_image_exactly_once(n, batch):
    batches = Batches(made_up(n), RunConfig(dataset="imagefolder", batch_size=batch))
    for epoch in range(3):
        plan = batches.epoch(epoch)
        assert len(plan) == batches.steps == math.ceil(n / batch)
        assert sorted(torch.cat([index for index, *_ in plan]).tolist()) == list(range(n))


def test_a_last_batch_of_one_image_is_left_out_and_a_smaller_one_on_demand():
    def sizes(n, **fields):
        batches = Batches(made_up(n), RunConfig(dataset="imagefolder", batch_size=8, **fields))
        assert len(batches.epoch(0)) == batches.steps
        return [len(index) for index, *_ in batches.epoch(0)]

    assert sizes(17) == [8, 8] and sizes(18) == [8, 8, 2]
    assert sizes(18, drop_last=True) == [8, 8] and sizes(16, drop_last=True) == [8, 8]


def test_no_batch_at_all_is_refused():
    with pytest.raises(UserError, match="batch_size: 8 leaves no batch of 5 training images with drop_last"):
        Batches(made_up(5), RunConfig(dataset="imagefolder", batch_size=8, drop_last=True))
    with pytest.raises(UserError, match="batch_size: 8 leaves no batch of 1 training images; lower"):
        Batches(made_up(1), RunConfig(dataset="imagefolder", batch_size=8))


@pytest.mark.parametrize("dataset, channels, size, pad", [("imagefolder", 3, 32, 4), ("digits", 1, 8, 1)])
def test_crop_and_flip_are_those_of_a_loop_over_the_images(dataset, channels, size, pad):
    data = made_up(40, channels, size)
    batches = Batches(data, RunConfig(dataset=dataset, batch_size=40))
    plan = batches.epoch(2)[0]
    x, y = batches.assemble(*plan)
    assert x.dtype == torch.float32 and x.shape == (40, channels, size, size)
    for i, (index, down, right, mirrored) in enumerate(zip(*(t.tolist() for t in plan), strict=True)):
        padded = np.zeros((channels, size + 2 * pad, size + 2 * pad), dtype=np.float32)
        padded[:, pad : pad + size, pad : pad + size] = data.images[index].numpy()
        crop = padded[:, down : down + size, right : right + size]
        if mirrored:
            crop = crop[:, :, ::-1]
        expected = (crop - data.mean.numpy()[:, None, None]) / data.std.numpy()[:, None, None]
        assert np.array_equal(x[i].numpy(), expected) and y[i] == data.labels[index]
    _, down, right, mirrored = plan
    assert {0, 2 * pad} <= set(down.tolist()) and {0, 2 * pad} <= set(right.tolist())
    assert set(mirrored.tolist()) == ({0} if dataset == "digits" else {0, 1})  # a mirrored digit is no digit


def test_without_augmentation_a_batch_is_the_images_themselves():
    data = made_up()
    batches = Batches(data, RunConfig(dataset="imagefolder", batch_size=21, augment=False))
    plan = batches.epoch(0)[0]
    x, _ = batches.assemble(*plan)
    assert torch.equal(x, data.normalized(data.images[plan[0]]))


def test_the_images_are_normalized_by_the_whole_training_set():
    data, part = digits(), digits(data_fraction=0.1)
    x = data.normalized(data.images)
    assert x.mean().abs() < 1e-5 and abs(x.std() - 1) < 1e-5
    assert torch.equal(data.mean, part.mean) and torch.equal(data.std, part.std)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_channels_statistics_are_those_of_their_pixels(channels):
    images = made_up(7, channels, 5).images
    mean, std = channel_statistics(images)
    pixels = images.numpy().astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), pixels.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(std.numpy(), pixels.std((0, 2, 3), ddof=1), rtol=1e-7)
    flat = channel_statistics(torch.full((3, channels, 4, 4), 9, dtype=torch.uint8))
    assert flat[0].tolist() == [9.0] * channels and flat[1].min() > 0  # nothing is divided by zero


def test_resize_gives_the_size_asked_for_and_leaves_that_size_alone():
    images = made_up(5, 3, 16).images
    assert resize(images, None) is images and resize(images, 16) is images
    small = resize(images, 8)
    assert small.dtype == torch.uint8 and small.shape == (5, 3, 8, 8)
    assert (small.float().mean((0, 2, 3)) - images.float().mean((0, 2, 3))).abs().max() < 2
    flat = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    assert (resize(flat, 20) == 77).all()
    assert digits(image_size=16).images.shape[2:] == digits(image_size=16).test_images.shape[2:] == (16, 16)


# Image folders


def image(path, mode="RGB", size=(6, 6), value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Two classes, three training images and one test image each."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(3):
            image(tmp_path / f"train/{name}/{i}.png", value=10 * k + i)
        image(tmp_path / f"test/{name}/0.png", value=10 * k + 9)
    return tmp_path


def folder(root, **fields):
    return load_source(RunConfig(dataset="imagefolder", root=str(root), **fields))


def pixels(path):
    return np.asarray(Image.open(path)).transpose(2, 0, 1)


def test_an_image_folder_is_torchvisions_image_by_image(root):
    from samlib._torchvision import torchvision

    (root / "train/cat/notes.txt").write_text("not an image, and not read")
    image(root / "train/cat/old/tabby/9.JPG", value=20)  # nested, another suffix
    image(root / "train/cat/1.png", value=21, exif=Image.Exif())
    rotated = Image.Exif()
    rotated[274] = 6  # Orientation: to be turned by 90 degrees
    image(root / "train/Dog2/a.jpeg", value=22, exif=rotated)
    image(root / "train/dog/4.gif", value=23)  # torchvision reads no GIF
    source = folder(root)
    for part, images, labels in (
        ("train", source.images, source.labels),
        ("test", source.test_images, source.test_labels),
    ):
        theirs = torchvision.datasets.ImageFolder(root / part)
        names = [theirs.classes[k] for _, k in theirs]
        assert [source.classes[k] for k in labels] == names
        assert np.array_equal(images, np.stack([np.asarray(x).transpose(2, 0, 1) for x, _ in theirs]))
    assert source.classes == ["Dog2", "cat", "dog"] and source.images.dtype == np.uint8


def caches(root):
    return [path for path in root.iterdir() if path.suffix != ".lock" and path.name not in ("train", "test")]


def test_the_images_are_decoded_once_and_again_when_a_file_changes(root, monkeypatch):
    first = folder(root)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
        again = folder(root)
    for name, value in vars(first).items():
        assert np.array_equal(value, getattr(again, name))

    stat = (root / "train/dog/1.png").stat()
    image(root / "train/dog/1.png", value=77)
    os.utime(root / "train/dog/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some copying programs do
    assert np.array_equal(folder(root).images[4], pixels(root / "train/dog/1.png"))
    image(root / "train/dog/new.png", value=78)
    assert len(folder(root).images) == 7
    (root / "train/dog/new.png").unlink()
    assert len(folder(root).images) == 6
    (root / ".samlib-half.npz.1.tmp").touch()  # a killed process's
    (root / "test/cat/0.png").rename(root / "test/cat/1.png")
    folder(root)
    assert len(caches(root)) == 1  # stale ones are removed


def test_a_cache_hit_imports_neither_torchvision_nor_pillow(root):
    folder(root)
    code = (
        "import sys; from samlib.config import RunConfig; from samlib.data import load_data\n"
        f"assert len(load_data(RunConfig(dataset='imagefolder', root={str(root)!r})).images) == 6\n"
        "assert not {'torchvision', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "another file", "nothing"])
def test_a_damaged_cache_is_made_anew(root, damage):
    first = folder(root)
    (cache,) = caches(root)
    content = bytearray(cache.read_bytes())
    content[content.index(first.images.tobytes()) + 100] ^= 1
    cache.write_bytes(
        {"half of it": content[: len(content) // 2], "another file": b"x", "nothing": b""}.get(damage, content)
    )
    for _ in range(2):
        assert np.array_equal(folder(root).images, first.images)
    assert len(np.load(cache)["images"]) == 6


def read_in_another_process(root):
    return folder(root).images.tobytes()


def test_of_several_processes_one_decodes_and_all_read_the_same(root, monkeypatch):
    import samlib._torchvision  # noqa: F401  once, not in every process

    opened, intact = root / "opened", Image.open

    def counted(path):
        with opened.open("a") as file:
            file.write(f"{path}\n")
        return intact(path)

    monkeypatch.setattr(Image, "open", counted)
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        seen = set(pool.map(read_in_another_process, [root] * 8))
    assert len(opened.read_text().splitlines()) == 8  # six images to train on, two to test
    assert seen == {folder(root).images.tobytes()}


@contextmanager
def unprivileged():
    """As a user who may not write or read everything."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)


@pytest.fixture
def shared_root(root):
    """The folder where another user reaches it."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(root, Path(name) / "images"))
        for path in (copy, copy.parent):
            path.chmod(0o755)
        yield copy


def test_a_read_only_folder_is_decoded_anew_with_a_warning_and_its_cache_is_used(shared_root):
    import samlib._torchvision  # noqa: F401  another user might not reach the package

    shared_root.chmod(0o555)
    with unprivileged(), pytest.warns(UserWarning, match="not kept, every run decodes them anew: .*Permission denied"):
        assert len(folder(shared_root).images) == 6
    assert not caches(shared_root)
    shared_root.chmod(0o755)
    folder(shared_root)
    folder(shared_root)  # from the cache: what numpy imports on the way, another user might not reach either
    shared_root.chmod(0o555)
    with unprivileged(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folder(shared_root).images) == 6


def test_a_full_disk_keeps_nothing_and_the_images_are_read_all_the_same(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # the kernel refuses, as a full disk does
    try:
        with pytest.warns(UserWarning, match="not kept, every run decodes them anew"):
            source = folder(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(source.images) == 6 and not caches(root)


def test_gray_images_have_one_channel_and_among_colored_ones_three(root):
    for path in root.glob("t*/*/*.png"):
        image(path, "L")
    image(root / "train/dog/0.png", "1")
    assert folder(root).images.shape == (6, 1, 6, 6)
    image(root / "train/cat/0.png", "RGB")
    image(root / "train/cat/1.png", "P")
    image(root / "train/dog/2.png", "RGBA")
    source = folder(root)
    assert source.images.shape == (6, 3, 6, 6) and source.test_images.shape == (2, 3, 6, 6)
    assert (source.images[3] == source.images[3][:1]).all()


LEVELS = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)


def tiff_of_12_bits(path, levels):
    """A gray TIFF, six pixels wide: two levels to three bytes."""
    bits = "".join(f"{level >> 4:012b}" for level in levels.ravel())
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: 6, 257: 6, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 6, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)


DEEP = {
    "16-bit.png": lambda path: Image.fromarray(LEVELS).save(path),
    "16-bit.tif": lambda path: Image.fromarray(LEVELS).save(path),
    "16-bit.pgm": lambda path: path.write_bytes(b"P5 6 6 65535\n" + LEVELS.astype(">u2").tobytes()),
    "12-bit.pgm": lambda path: path.write_bytes(b"P5 6 6 4095\n" + (LEVELS >> 4).astype(">u2").tobytes()),
    "12-bit.tif": lambda path: tiff_of_12_bits(path, LEVELS),
    "16-bit-color.ppm": lambda path: path.write_bytes(
        b"P6 6 6 65535\n" + np.stack([LEVELS] * 3, -1).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled_by_their_depth(root, name):
    for path in root.glob("t*/*/*.png"):
        image(path, "RGB" if "color" in name else "L")
    DEEP[name](root / "train/cat" / name)
    source = folder(root)
    row = sorted(path.name for path in (root / "train/cat").iterdir()).index(name)
    exact = LEVELS / 257
    if "12-bit" in name:
        exact = (LEVELS >> 4) / 4095 * 255
    assert np.abs(source.images[row] - exact).max() <= (1 if "color" in name else 0.5 + 1e-3)
    assert source.images[row].min() == 0 and source.images[row].max() == 255


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_whose_white_is_not_known_are_refused_by_name(root, dtype):
    Image.fromarray(LEVELS.astype(dtype)).save(root / "train/cat/deep.tif")
    with pytest.raises(UserError, match=r"cat/deep.tif' .*floats or 32-bit integers: convert it to 8 or 16 bits"):
        folder(root)


def test_images_of_several_sizes_need_an_image_size(root):
    image(root / "test/dog/1.png", size=(9, 5))
    with pytest.raises(UserError, match=r"image_size: the images are of 2 sizes \(6x6, 9x5, ...\); set image_size"):
        folder(root)
    for _ in range(2):  # decoded, and from the cache
        assert folder(root, image_size=8).images.shape == (6, 3, 8, 8)
        assert folder(root, image_size=4).test_images.shape == (3, 3, 4, 4)
    assert len(caches(root)) == 2


def test_names_that_are_not_utf_8_are_names(root):
    name = os.fsdecode(b"caf\xe9")
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / name)
        (root / part / name / "0.png").rename(root / part / name / f"{name}.png")
    for _ in range(2):  # decoded, and from the cache
        source = folder(root)
        assert source.classes == [name, "dog"] and len(source.images) == 6
    load_data(RunConfig(dataset="imagefolder", root=str(root))).fingerprint.encode()
    (root / "train/dog" / f"{name}.png").write_text("")
    with pytest.raises(UserError, match=r"caf\\udce9.png' cannot be read as an image"):
        folder(root)


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def truncated_jpeg(root):
    image(root / "train/cat/x.jpg", size=(64, 64))
    truncate(root / "train/cat/x.jpg", 0.6)


def loop_of_two(root):
    (root / "train/cat/a").symlink_to(root / "train/dog")
    (root / "train/dog/b").symlink_to(root / "train/cat")


# What is done to an intact folder, and the words that name it.
NO_IMAGE = "cannot be read as an image"
BROKEN = {
    "no root": (shutil.rmtree, "train' is not a folder"),
    "a file as root": (lambda r: (shutil.rmtree(r), r.write_text("")), "train' is not a folder"),
    "no train": (lambda r: shutil.rmtree(r / "train"), "train' is not a folder"),
    "no test": (lambda r: shutil.rmtree(r / "test"), "test' is not a folder"),
    "no class": (lambda r: [shutil.rmtree(p) for p in (r / "train").iterdir()], "holds 0 class folders: at least 2"),
    "one class": (lambda r: shutil.rmtree(r / "train/dog"), "holds 1 class folders: at least 2"),
    "an empty class": (lambda r: (r / "train/emu").mkdir(), "train/emu' holds no image"),
    "a class of other files": (lambda r: [p.rename(f"{p}.txt") for p in (r / "train/cat").iterdir()], "cat' holds no"),
    "no test image": (lambda r: [p.unlink() for p in r.glob("test/*/*")], "test' holds no image"),
    "no test class": (lambda r: [shutil.rmtree(p) for p in r.glob("test/*")], "test' holds no image"),
    "a class in test alone": (lambda r: image(r / "test/emu/0.png"), "'emu', which train lacks"),
    "a text named .png": (lambda r: (r / "train/cat/0.png").write_text("text"), f"cat/0.png' {NO_IMAGE}"),
    "an empty file": (lambda r: (r / "train/cat/0.png").write_text(""), f"cat/0.png' {NO_IMAGE}"),
    "a truncated PNG": (lambda r: truncate(r / "test/dog/0.png", 0.5), f"dog/0.png' {NO_IMAGE}"),
    "a truncated JPEG": (truncated_jpeg, f"cat/x.jpg' {NO_IMAGE}"),
    "a page named .jpg": (lambda r: (r / "train/dog/a.jpg").write_text("<html>"), f"a.jpg' {NO_IMAGE}"),
    "a broken link": (lambda r: (r / "train/dog/a.png").symlink_to("nowhere"), "a.png' cannot be read (No such file"),
    "a link to itself": (lambda r: (r / "train/dog/a.png").symlink_to("a.png"), "a.png' cannot be read (Too many"),
    "a link to its folder": (lambda r: (r / "train/dog/up").symlink_to("."), "dog/up' is a link to a folder that it"),
    "a link far above": (lambda r: (r / "train/dog/up").symlink_to(r), "' is a link to a folder that it"),
    "two links": (loop_of_two, "' is a link to a folder that it"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_image_folder_is_refused_with_the_path_and_what_to_do(root, how):
    damage, words = BROKEN[how]
    damage(root)
    with pytest.raises(UserError) as refused:
        folder(root)
    text = str(refused.value)
    assert text.startswith("root: ") and words in text and "\n" not in text
    assert str(root) in text or "train lacks" in text
    assert not root.is_dir() or not caches(root)


def test_a_missing_folder_says_where_one_comes_from():
    with pytest.raises(
        UserError, match="git clone --depth 1 https://.*CIFAR-10-images data/cifar10-jpeg.*dataset=cifar10"
    ):
        folder("/nowhere/cifar10-jpeg")
    with pytest.raises(UserError, match="'/nowhere/train' is not a folder; give the folder that holds train/<class>/"):
        folder("/nowhere")


@pytest.mark.parametrize("which", ["train/cat/0.png", "train/cat", "train"])
def test_what_may_not_be_read_is_named(shared_root, which):
    import samlib._torchvision  # noqa: F401  another user might not reach the package

    (shared_root / which).chmod(0)
    with unprivileged(), pytest.raises(UserError, match=f"{which}' cannot be read .*Permission denied"):
        folder(shared_root)


# torchvision's datasets


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_dataset_neither_there_nor_downloadable_is_refused_with_what_to_do(dataset, offline, tmp_path):
    with pytest.raises(UserError) as refused:
        load_source(RunConfig(dataset=dataset, root=str(tmp_path / "data")))
    text = str(refused.value)
    assert text.startswith(f"dataset: {dataset} is not in root") and str(tmp_path) in text and "\n" not in text
    assert "put torchvision's" in text


@pytest.fixture
def cifar(tmp_path, monkeypatch, offline):
    """A CIFAR-10 of twelve images in torchvision's files, with their hashes."""
    from samlib._torchvision import torchvision

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    draw = np.random.default_rng(0)

    def write(name, content) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(n):
        return {"data": draw.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}

    train = batch(12)
    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [["data_batch_1", write("data_batch_1", train)]])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", write("test_batch", batch(10))]])
    names = {"label_names": [str(k) for k in range(10)]}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", names)}
    monkeypatch.setattr(cifar10, "meta", meta)
    return tmp_path, train


def test_cifar_is_read_from_the_root_when_it_is_there(cifar):
    root, train = cifar
    source = load_source(RunConfig(root=str(root)))
    assert source.images.shape == (12, 3, 32, 32) and source.test_images.shape == (10, 3, 32, 32)
    assert np.array_equal(source.images, train["data"].reshape(12, 3, 32, 32))
    assert source.labels.tolist() == train["labels"] and len(source.classes) == 10


def test_cifar_with_one_wrong_byte_is_not_used(cifar):
    root, _ = cifar
    path = root / "cifar-10-batches-py/data_batch_1"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="dataset: cifar10 is not in root"):
        load_source(RunConfig(root=str(root)))
