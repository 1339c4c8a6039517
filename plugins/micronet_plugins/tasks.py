"""The tasks of the challenge that classify images, and one on scikit-learn's digits that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from micronet_eval.task import DataMissing, Split, Task

HERE = Path("data")
ELSEWHERE = ", or name another folder than data by --data or MICRONET_DATA"
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits(root: Path | None, split: Split) -> Dataset[Any]:
    """1,797 images of 8x8, inside scikit-learn's wheel. Every fourth, from the fourth on, is for testing: 449."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # 17 grey levels, 0 ... 1
    labels = torch.from_numpy(data.target).to(torch.int64)
    is_test = torch.arange(len(labels)) % 4 == 3
    chosen = is_test if split == "test" else ~is_test
    return TensorDataset(images[chosen], labels[chosen])


def cifar100(root: Path | None, split: Split) -> Dataset[Any]:
    """CIFAR-100 in the folder `cifar-100-python` under `root`, as its authors distribute it; checksums are checked."""
    folder = (root or HERE) / "cifar-100-python"
    how = "unpack cifar-100-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there"
    missing = DataMissing(f"CIFAR-100 not found in {folder}, or damaged; {how}{ELSEWHERE}")
    if not folder.is_dir():
        raise missing  # before torchvision is imported, which takes as long as torch
    from torchvision import transforms
    from torchvision.datasets import CIFAR100

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD)])
    try:
        return CIFAR100(str(folder.parent), train=split == "train", transform=transform)
    except RuntimeError:
        raise missing from None


def imagenet(root: Path | None, split: Split) -> Dataset[Any]:
    """ImageNet's `train` and `val` under `root`/imagenet, one folder a class; 224x224 from the centre of 256."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    folder = (root or HERE) / "imagenet" / ("train" if split == "train" else "val")
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    try:
        return ImageFolder(str(folder), transform)
    except OSError:
        how = "put the images there, one folder a class"
        raise DataMissing(f"ImageNet not found in {folder}; {how}{ELSEWHERE}") from None


TASKS = (
    Task(
        name="cifar100",
        description="CIFAR-100, 100 classes of 3x32x32 images (MicroNet Challenge 2019)",
        baseline="WideResNet-28-10",
        storage=36.5e6,
        math=10.49e9,
        metric="top-1",
        threshold=0.80,
        input_shape=(3, 32, 32),
        dataset=cifar100,
    ),
    Task(
        name="imagenet",
        description="ImageNet, 1,000 classes of 3x224x224 images (MicroNet Challenge 2019)",
        baseline="MobileNetV2 x1.4",
        storage=6.9e6,
        math=1170e6,
        metric="top-1",
        threshold=0.75,
        input_shape=(3, 224, 224),
        dataset=imagenet,
    ),
    # The baseline's numbers are the program's own count of the network, dense and at 32 bits; a test recounts them.
    Task(
        name="digits",
        description="scikit-learn's digits, 10 classes of 1x8x8 images; 1,348 for training, 449 for testing",
        baseline="WideResNet-16-2",
        storage=690_922,
        math=12_630_528,
        metric="top-1",
        threshold=0.97,
        input_shape=(1, 8, 8),
        dataset=digits,
    ),
)
