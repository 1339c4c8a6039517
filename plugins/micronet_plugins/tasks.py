"""The tasks of the challenge that classify images, and two whose data everybody can have: digits, Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from micronet_eval.errors import InputError
from micronet_eval.task import DataMissing, Split, Task

HERE = Path("data")
ELSEWHERE = ", or name another folder than data by --data or MICRONET_DATA"
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FASHION_FOLDERS = (Path("FashionMNIST/raw"), Path())  # torchvision's folder under a root, or the root itself
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = {  # sha256 of what is inside the files: they are packed anew wherever they are published
    "train": (
        ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
}


def digits(root: Path | None, split: Split) -> Dataset[Any]:
    """1,797 images of 8x8, inside scikit-learn's wheel. Every fourth, from the fourth on, is for testing: 449."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # 17 grey levels, 0 ... 1
    labels = torch.from_numpy(data.target).to(torch.int64)
    is_test = torch.arange(len(labels)) % 4 == 3
    chosen = is_test if split == "test" else ~is_test
    return TensorDataset(images[chosen], labels[chosen])


def fashion_mnist(root: Path | None, split: Split) -> Dataset[Any]:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60,000 and 10,000 images of 28x28, 256 grey levels, 0 ... 1.

    The four IDX files, packed by gzip or not, as Debian's package dataset-fashion-mnist installs them, or under `root`
    as torchvision downloads them; checksums are checked.
    """
    folders = [(root or HERE) / folder for folder in FASHION_FOLDERS]
    folders = [FASHION_SYSTEM, *folders] if root is None else [*folders, FASHION_SYSTEM]
    how = f"install Debian's package dataset-fashion-mnist, or put the four files of Fashion-MNIST there{ELSEWHERE}"
    for folder in folders:
        paths = [_packed_or_not(folder / name) for name, _ in FASHION_FILES[split]]
        if all(paths):
            break
    else:
        raise DataMissing(f"Fashion-MNIST not found in {', '.join(map(str, folders))}; {how}")
    tensors = []
    for path, (_, checksum) in zip(paths, FASHION_FILES[split], strict=True):
        assert path is not None
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error) as error:
            raise DataMissing(f"{path} cannot be read ({error}); {how}") from None
        if hashlib.sha256(content).hexdigest() != checksum:
            raise DataMissing(f"{path} is damaged: its checksum is another than Fashion-MNIST's; {how}")
        tensors.append(idx(content))
    images, labels = tensors
    return TensorDataset(images.unsqueeze(1).float() / 255, labels.to(torch.int64))


def _packed_or_not(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def idx(content: bytes) -> torch.Tensor:
    """The uint8 tensor in a file of MNIST's format IDX: two zeros, type 8, dimensions, sizes as big-endian int32."""
    dimensions = content[3]
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).reshape(sizes)


def cifar100(root: Path | None, split: Split) -> Dataset[Any]:
    """CIFAR-100 in the folder `cifar-100-python` under `root`, as its authors distribute it; checksums are checked."""
    root = root or HERE
    folder, archive = root / "cifar-100-python", root / "cifar-100-python.tar.gz"
    how = f"unpack {archive.name} of https://www.cs.toronto.edu/~kriz/cifar.html there{ELSEWHERE}"
    if not folder.is_dir() and not archive.is_file():  # before torchvision is imported, which takes as long as torch
        raise DataMissing(f"CIFAR-100 not found in {folder}; {how}")
    from torchvision.datasets import CIFAR100

    if not folder.is_dir():
        state = (
            "is not unpacked yet" if _md5(archive) == CIFAR100.tgz_md5 else "is damaged: get it again, and unpack it"
        )
        raise DataMissing(f"CIFAR-100 not found in {folder}; {archive} {state}")
    for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])):
        if not (folder / name).is_file():
            raise DataMissing(f"CIFAR-100 not found in {folder}: it has no file {name}; {how}")
        if _md5(folder / name) != md5:
            raise DataMissing(f"{folder / name} is damaged: its checksum is another than CIFAR-100's; {how}")
    data = CIFAR100(str(root), train=split == "train")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR100_MEAN, CIFAR100_STD))
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)
    return TensorDataset(images, torch.tensor(data.targets))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        checksum = hashlib.md5(usedforsecurity=False)
        while part := file.read(1 << 20):
            checksum.update(part)
    return checksum.hexdigest()


def imagenet(
    root: Path | None,
    split: Split,
    classes: int = 1000,
    counts: Mapping[str, int] = MappingProxyType({"train": 1_281_167, "test": 50_000}),
) -> Dataset[Any]:
    """ImageNet's `train` and `val` under `root`/imagenet, one folder a class; 224x224 from the centre of 256.

    That is what torchvision unpacks the published archives to, whose checksums it checks. `classes` and `counts` are
    what a complete set has: a class that is missing would shift the labels of all behind it.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    part = "train" if split == "train" else "val"
    folder = (root or HERE) / "imagenet" / part
    unpack = f"from torchvision.datasets import ImageNet; ImageNet('{folder.parent}', '{part}')"
    how = (
        f"put ILSVRC2012_img_{part}.tar and ILSVRC2012_devkit_t12.tar.gz of https://image-net.org into {folder.parent} "
        f'and unpack them by python -c "{unpack}"{ELSEWHERE}'
    )
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    try:
        images = ImageFolder(str(folder), transform, loader=_open_image)
    except OSError:
        raise DataMissing(f"ImageNet not found in {folder}, as one folder a class; {how}") from None
    found = len(images.classes), len(images)
    if found != (classes, counts[split]):
        raise DataMissing(
            f"ImageNet in {folder} is damaged: {found[0]:,} classes and {found[1]:,} images, not {classes:,} and "
            f"{counts[split]:,}; {how}"
        )
    return images


def _open_image(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # PIL's for a PNG file
        raise InputError(f"{path} is damaged: {error}; unpack ImageNet again") from error


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
    # Math is 2 x the MACs of the network, as for the baselines of the challenge.
    Task(
        name="fashion-mnist",
        description="Fashion-MNIST, 10 classes of 1x28x28 images; 60,000 for training, 10,000 for testing",
        baseline="WideResNet-40-4",
        storage=8_948_922,
        math=1_988_003_328,
        metric="top-1",
        threshold=0.94,
        input_shape=(1, 28, 28),
        dataset=fashion_mnist,
    ),
)
