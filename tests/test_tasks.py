"""Fashion-MNIST, from files of its real format that the test writes, and from the real ones where they are."""

import gzip
import hashlib

import pytest
import torch

from micronet_eval.plugins import lookup
from micronet_eval.task import DataMissing
from micronet_plugins import tasks


def idx_file(array: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes()


@pytest.fixture
def files(monkeypatch):
    """Five images and labels of each split as files, whose checksums the task expects."""
    pixels = torch.arange(2 * 5 * 28 * 28).remainder(256).to(torch.uint8).view(2, 5, 28, 28)
    contents = {
        "train-images-idx3-ubyte": idx_file(pixels[0]),
        "train-labels-idx1-ubyte": idx_file(torch.tensor([9, 0, 3, 1, 2], dtype=torch.uint8)),
        "t10k-images-idx3-ubyte": idx_file(pixels[1]),
        "t10k-labels-idx1-ubyte": idx_file(torch.tensor([4, 4, 0, 8, 7], dtype=torch.uint8)),
    }
    sums = {
        split: tuple((name, hashlib.sha256(contents[name]).hexdigest()) for name, _ in listed)
        for split, listed in tasks.FASHION_FILES.items()
    }
    monkeypatch.setattr(tasks, "FASHION_FILES", sums)
    return contents


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_in_its_real_format(tmp_path, files, folder, packed):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (tmp_path / folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / folder / name).write_bytes(content)
    train, test = (tasks.fashion_mnist(tmp_path, split) for split in ("train", "test"))
    assert len(train) == len(test) == 5
    image, label = test[3]
    assert image.shape == (1, 28, 28)
    assert label == 8
    # The fourth image of the second five begins at 8 x 784 = 6272 = 24 x 256 + 128.
    assert image[0, 0, :3].tolist() == pytest.approx([128 / 255, 129 / 255, 130 / 255])
    assert train[0][1] == 9


def test_fashion_mnist_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "FASHION_SYSTEM", tmp_path / "system")
    with pytest.raises(DataMissing) as missing:
        tasks.fashion_mnist(tmp_path, "test")
    places = f"{tmp_path / 'FashionMNIST/raw'}, {tmp_path}, {tmp_path / 'system'}"
    assert f"not found in {places}; install Debian's package" in str(missing.value)
    assert "--data or MICRONET_DATA" in str(missing.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1] + b"?", "is damaged"),
        (lambda b: b[:40], "cannot be read"),
        (lambda b: b[:12] + 8 * b"\xff" + b[20:], "cannot be read"),
    ],
)
def test_fashion_mnist_that_is_damaged_names_the_file(tmp_path, files, change, message):
    for name, content in files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    broken = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = change(files["t10k-images-idx3-ubyte"]) if message == "is damaged" else None
    broken.write_bytes(gzip.compress(content) if content else change(broken.read_bytes()))
    with pytest.raises(DataMissing, match=f"{broken} {message}"):
        tasks.fashion_mnist(tmp_path, "test")
    assert len(tasks.fashion_mnist(tmp_path, "train")) == 5


@pytest.mark.skipif(not tasks.FASHION_SYSTEM.exists(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_is_there_for_any_data_folder(tmp_path):
    assert len(tasks.fashion_mnist(tmp_path, "test")) == 10_000


@pytest.mark.skipif(not tasks.FASHION_SYSTEM.exists(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    train, test = (lookup("task", "fashion-mnist").dataset(None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(test.tensors[1]).tolist() == [1000] * 10
    # The mean and the standard deviation that everybody normalises with.
    assert train.tensors[0].mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert train.tensors[0].std().item() == pytest.approx(0.3530, abs=1e-4)
