"""CIFAR-100 and ImageNet from tiny files of their real formats; test_tasks and test_language have the other sets."""

import hashlib
import io
import pickle
import random
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from micronet_eval.errors import InputError
from micronet_eval.task import DataMissing
from micronet_plugins.tasks import cifar100, imagenet

# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


def batch(first, labels):
    """Images of one grey level each, as a batch is pickled: rows of 1,024 red, 1,024 green, 1,024 blue values."""
    rows = [np.repeat(np.array([level, 0, 255], np.uint8), 1024) for level in range(first, first + len(labels))]
    return {"filenames": [b"x.png"] * len(labels), "fine_labels": labels, "data": np.stack(rows)}


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The three files of cifar-100-python, whose checksums the loader expects."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, content in (
        ("train", batch(0, [99, 7, 7])),
        ("test", batch(51, [3, 0])),
        ("meta", {"fine_label_names": [str(i) for i in range(100)]}),
    ):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path


def test_cifar100_in_its_real_format(cifar):
    train, test = cifar100(cifar, "train"), cifar100(cifar, "test")
    assert [int(train[i][1]) for i in range(len(train))] == [99, 7, 7]
    image, label = test[0]
    assert (image.shape, image.dtype, int(label)) == ((3, 32, 32), torch.float32, 3)
    # 51 of 255 is 0.2; mean and deviation of the channels are 0.5071, 0.4865, 0.4409 and 0.2673, 0.2564, 0.2762.
    expected = [(0.2 - 0.5071) / 0.2673, (0 - 0.4865) / 0.2564, (1 - 0.4409) / 0.2762]
    assert image[:, 31, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(image, image[:, :1, :1].expand(3, 32, 32))


def test_the_checksums_are_those_that_the_authors_publish():
    assert CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert CIFAR100.train_list == [["train", "16019d7e3df5f24257cddd939b257f8d"]]
    assert CIFAR100.test_list == [["test", "f0ef6b0ae62326f3e7ffdfab6717acfc"]]


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cifar100_that_is_damaged_or_incomplete_names_the_file(cifar, name):
    path = cifar / "cifar-100-python" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataMissing, match=rf"^{path} is damaged: its checksum .* unpack cifar-100-python.tar.gz"):
        cifar100(cifar, "test")
    path.unlink()
    with pytest.raises(DataMissing, match=rf"^CIFAR-100 not found in .*: it has no file {name}; .*--data"):
        cifar100(cifar, "test")


def test_cifar100_that_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-100-python/meta"), io.BytesIO())
    with pytest.raises(DataMissing, match=rf"{path} is damaged: get it again"):
        cifar100(tmp_path, "test")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(DataMissing, match=rf"{path} is not unpacked yet$"):
        cifar100(tmp_path, "test")


# --- ImageNet ---------------------------------------------------------------------------------------------------------

CLASSES = ("n01440764", "n01443537", "n02100735")
tiny = partial(imagenet, classes=3, counts={"train": 6, "test": 3})


@pytest.fixture
def photos(tmp_path):
    """Two training images and one for testing of each of three classes, JPEG, wider than high."""
    for part, count in (("train", 2), ("val", 1)):
        for at, name in enumerate(CLASSES):
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (300, 200), (100 * at, 0, 255))
                picture.save(tmp_path / "imagenet" / part / name / f"{name}_{i}.JPEG", quality=100)
    return tmp_path


def test_imagenet_as_it_is_unpacked(photos):
    train, test = tiny(photos, "train"), tiny(photos, "test")
    assert [label for _, label in train] == [0, 0, 1, 1, 2, 2]
    image, label = test[2]
    assert (image.shape, label) == ((3, 224, 224), 2)
    # 200 of 255 red, no green, all blue, normalised with the usual numbers; JPEG is some levels off.
    expected = [(200 / 255 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225]
    assert image[:, 112, 112].tolist() == pytest.approx(expected, abs=0.05)


def test_imagenet_that_is_incomplete_says_what_there_is(photos):
    with pytest.raises(
        DataMissing, match=r"damaged: 3 classes and 3 images, not 1,000 and 50,000; put ILSVRC2012_img_val"
    ):
        imagenet(photos, "test")
    (photos / "imagenet" / "val" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG").rename(photos / "imagenet" / "val" / "x.JPEG")
    with pytest.raises(DataMissing, match=r"imagenet/val, as one folder a class; .*devkit.*ImageNet\('.*', 'val'\)"):
        tiny(photos, "test")


def test_an_image_that_is_damaged_names_its_file(photos):
    path = photos / "imagenet" / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    noise = Image.frombytes("RGB", (300, 200), random.Random(0).randbytes(300 * 200 * 3))
    noise.save(parts := io.BytesIO(), "PNG")  # the pixels in several parts; the last one gets a name that none has
    for content in (path.read_bytes()[:100], b"\0\0\0\0".join(parts.getvalue().rsplit(b"IDAT", 1))):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is damaged"):
            tiny(photos, "test")[0]


def test_imagenet_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(DataMissing) as missing:
        imagenet(tmp_path, "train")
    assert f"ImageNet not found in {tmp_path / 'imagenet' / 'train'}" in str(missing.value)
    assert "ILSVRC2012_img_train.tar" in str(missing.value)
    assert "--data or MICRONET_DATA" in str(missing.value)
