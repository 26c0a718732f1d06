"""The first document's job as its kind of code does it: PIL transforms in two loader workers, a test every epoch."""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import samlib.data
from benchmarks.measure import seconds
from benchmarks.reference_sam import LoopSAM
from samlib._torchvision import torchvision
from samlib.config import RunConfig
from samlib.data import stratified_subset

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(Dataset):
    """As torchvision's CIFAR10: arrays in memory, each item a PIL image through the transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform) -> None:
        self.images, self.labels, self.transform = images.transpose(0, 2, 3, 1), labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(np.ascontiguousarray(self.images[index]))), int(self.labels[index])


class FirstDocument:
    """Trains torchvision's ResNet-18 on a share of CIFAR-10, in the document's settings."""

    def __init__(self, images: dict, data_fraction: float, mix: str, tested: int = 10_000) -> None:
        transforms = torchvision.transforms
        source = samlib.data.load_source(RunConfig(**images))
        rows = stratified_subset(torch.from_numpy(np.array(source.labels)), data_fraction, seed=42).numpy()
        plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
        train = Images(source.images[rows], source.labels[rows], transforms.Compose(augmented))
        test = Images(source.test_images[:tested], source.test_labels[:tested], transforms.Compose(plain))
        self.train = DataLoader(train, batch_size=128, shuffle=True, num_workers=2)
        self.test = DataLoader(test, batch_size=128, shuffle=False, num_workers=2)
        self.model = torchvision.models.resnet18(num_classes=10)
        sgd = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.sam = mix == "sam"
        if self.sam:
            self.optimizer = LoopSAM(self.model.parameters(), rho=0.05, **sgd)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), **sgd)

    def epoch(self) -> float:
        """One epoch and the evaluation after it; returns the test accuracy, a fraction."""
        self.model.train()
        running = 0.0
        for x, y in self.train:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(x), y)
            loss.backward()
            if self.sam:
                self.optimizer.first_step()
                cross_entropy(self.model(x), y).backward()
                self.optimizer.second_step()
            else:
                self.optimizer.step()
            running += loss.item()
        self.model.eval()
        right = total = 0
        with torch.no_grad():
            for x, y in self.test:
                right += (self.model(x).argmax(1) == y).sum().item()
                total += len(y)
        return right / total

    def seconds_per_epoch(self, epochs: int) -> float:
        return seconds(lambda: [self.epoch() for _ in range(epochs)]) / epochs
