"""Files of strangers: what is no submission, what hides in one, what a terminal or a browser would obey."""

import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from conftest import OWN_MANIFEST
from safetensors import safe_open
from safetensors.torch import save_file

from micronet_eval import packing
from micronet_eval.errors import InputError, printable
from micronet_eval.evaluation import evaluate, score
from micronet_eval.files import digest, read_whole
from micronet_eval.formats import of_activations
from micronet_eval.formats.number import OffGrid, format_of
from micronet_eval.structure import StructureError, build_layer
from micronet_eval.validating import validate

ONE = np.float32(1).tobytes()
TOO_LARGE = b'{"values":{"dtype":"U8","shape":[9876543210],"data_offsets":[0,9876543210]}}'

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.attack("a pickle bomb under every name that is read", "refused, never loaded")
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "submission.toml", "recipe.toml", "state.pt", "state.safetensors"]
)
def test_a_pickle_under_any_name_is_not_loaded(submission, run, tmp_path, name):
    (submission / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    words = {"recipe.toml": ("compress", submission / name, "-o", tmp_path / "out")}
    if name.startswith("state"):
        words[name] = ("import", submission, submission / name, "-o", tmp_path / "out")
    status, _, err = run(*words.get(name, (submission,)))
    assert (status, err.count("\n")) == (2, 1)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.attack("a FIFO, a device, a folder, a sparse file of 1 TB, a link to itself", "refused before it is read")
@pytest.mark.parametrize("name", ["weights.safetensors", "submission.toml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse", "loop"])
def test_what_is_no_ordinary_file(submission, run, name, kind):
    path = submission / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.attack("model.py is a link", "refused")
@pytest.mark.parametrize("link", ["/etc/passwd", "../model.py"])
def test_a_model_that_is_a_link(own, run, tmp_path, link):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").rename(tmp_path / "model.py")
    (folder / "model.py").symlink_to(link)
    status, _, err = run(folder)
    assert status == 2
    assert "no ordinary file" in err


@pytest.mark.attack("weights or manifest are a link to a neighbour's, to /proc", "refused")
@pytest.mark.parametrize("name", ["weights.safetensors", "submission.toml"])
def test_files_that_are_links(submission, run, tmp_path, name):
    (submission / name).rename(tmp_path / name)
    (submission / name).symlink_to(tmp_path / name)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{name} is a link" in err


def test_a_file_of_the_kernel_has_an_end(tmp_path):
    """The memory of a process is an ordinary file of no size, and of terabytes."""
    (tmp_path / "link").symlink_to("/proc/self/pagemap")
    (tmp_path / "file").write_bytes(b"something")
    assert len(digest(tmp_path / "link")) == 32
    (tmp_path / "other").symlink_to("file")
    assert digest(tmp_path / "other") == digest(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="a file of Linux")
def test_files_that_hide_their_size():
    with pytest.raises(InputError, match="has more than 100 bytes"):
        read_whole(Path("/proc/self/maps"), 100)


@pytest.mark.attack("model.py by `..` or an absolute path", "refused")
@pytest.mark.parametrize("name", ["../model.py", "/etc/passwd", "model.py\\u0000", "other.py"])
def test_a_model_somewhere_else(own, run, tmp_path, name):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "submission.toml").write_text(OWN_MANIFEST.replace("model.py", name))
    status, _, err = run(folder)
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.attack("a safetensors header that promises more than there is", "refused")
@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (90).to_bytes(8, "little") + TOO_LARGE.ljust(90),
        (100_002).to_bytes(8, "little") + b"[" * 100_002,
        b"",
    ],
    ids=["length", "tensor", "nesting", "empty"],
)  # fmt: skip
def test_headers_that_promise_too_much(submission, run, data):
    (submission / "weights.safetensors").write_bytes(data)
    status, _, err = run(submission)
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.attack("a mask that claims billions of zeros", "refused: at most 2^30 elements")
def test_a_tensor_of_more_elements_than_memory(submission):
    packed = packing.read(submission / "weights.safetensors")
    large = {"type": "Linear", "in_features": 1 << 15, "out_features": (1 << 15) + 1}
    structure = packing.Structure(layers={"": large}, tensors=[("0.weight", "fixed-point:4", "bitmask")])
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="elements; at most 1,073,741,824"):
        packing.unpack(packing.Packed(structure.model_copy(update={"layers": {"0": large}}), packed.streams, {}), model)


@pytest.mark.attack("TOML nested too deep, with endless numbers, with control characters", "refused, with the place")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, "no valid TOML"),
        ("a." * 50_000 + "b = 1", "more than 100 dots"),
        ("1." * 50_000 + "b = 1", "more than 100 dots"),
        ("a = " + "1" * 10_000, "no valid TOML"),
        ("[claims]\nscore = 1e999999999", "too large, too small, or too long"),
        ("[claims]\nscore = 1e9999999999999999999", "too large, too small, or too long"),
        ("[frequencies]\nclusters = [1e-999999999]", "too large, too small, or too long"),
        ('note = "\\u001b]0;owned\\u0007"', "control character U+001B"),
        ('note = "\\u202eevil"', "control character U+202E"),
        ('"\\u009bkey" = 1', "control character U+009B"),
    ],
)
def test_toml_that_bombs_or_hides(submission, run, text, message):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text() + "\n" + text)
    status, out, err = run(submission)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err) < 200_000


@pytest.mark.attack("look-alike letters in a name", "unknown; the message prints their codes")
def test_a_name_that_looks_like_another(submission, run):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace("digits", "dіgits"))  # Cyrillic
    status, _, err = run(submission)
    assert status == 2
    assert r"'d\u0456gits'" in err


def test_printable_leaves_the_languages_of_the_world_alone():
    assert printable("Zoë 李 \n") == "Zoë 李 \n"
    assert printable("\x1b\x9b\u200e\ud800") == r"\x1b\x9b\u200e\ud800"


@pytest.mark.attack("payloads of NaN", "refused")
@pytest.mark.parametrize("bits", [0x7FC01234, 0xFFC00001, 0x7F800000])
def test_payloads_of_nan(bits):
    plain = torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)
    with pytest.raises(InputError, match="NaN or infinity"):
        _unpacked(plain)


@pytest.mark.attack("negative zeros, denormals", "the sign is lost; counted as the bits that they take")
@pytest.mark.parametrize(("bits", "kept"), [(-(1 << 31), 0), (1, 1), (0x807FFF, 0x807FFF)])
def test_negative_zero_loses_its_sign_and_denormals_are_counted(bits, kept):
    plain = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert _unpacked(plain).view(torch.int32).item() == kept


@pytest.mark.attack("a plain tensor with other values than its format, or of another dtype", "refused")
@pytest.mark.parametrize(
    ("plain", "spec", "overhead"),
    [
        (torch.zeros(1), "signs:affine:-1:1:1x1", ONE),  # zero has no code there, and would become +1
        (torch.ones(1, dtype=torch.complex64), "fixed-point:5", b"\0"),
        (torch.ones(1, dtype=torch.float64), "fixed-point:5", b"\0"),
        (torch.ones(1).to(torch.float8_e5m2), "affine:-7:7:1x1", ONE),
        (torch.ones(1).to(torch.float8_e5m2), "codebook:1", ONE),
    ],
)
def test_plain_tensors_of_another_format(plain, spec, overhead):
    with pytest.raises(InputError, match="tensor 'weight' of torch"):
        _unpacked(plain, spec, overhead)


@pytest.mark.attack("streams of numbers that are no bytes", "refused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_streams_that_are_no_bytes(submission, dtype):
    path = submission / "weights.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "values": torch.zeros(8).to(dtype)}, path, metadata)
    with pytest.raises(InputError, match="must be bytes"):
        packing.read(path)


def _unpacked(plain, spec="float32", overhead=b""):
    structure = packing.Structure(tensors=[("weight", spec, "plain")])
    empty = np.zeros(0, np.uint8)
    streams = {"values": empty, "masks": empty, "overhead": np.frombuffer(overhead, np.uint8)}
    packed = packing.Packed(structure, streams, {"weight": plain.view(1, 1)})
    return packing.unpack(packed, torch.nn.Linear(1, 1, bias=False)).weight.detach()


@pytest.mark.attack("the same as recipe.toml, or under any other name", "not read; the evaluation goes on")
@pytest.mark.parametrize("kind", ["pipe", "sparse", "device", "loop", "many"])
def test_what_lies_beside_a_submission(submission, run, tmp_path, kind):
    for name in ("recipe.toml", "other"):
        path = submission / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        elif kind in ("device", "loop"):
            path.symlink_to("/dev/zero" if kind == "device" else path)
        else:
            for i in range(10_000):
                (submission / f"file{i}").touch()
            break
    assert run(submission)[0] == 1  # the threshold is missed, nothing else
    assert run("leaderboard", submission, "--html", tmp_path / "site")[0] == 0
    assert run("compare", submission, "--results", tmp_path / "results", "--executor", "here")[0] == 0


@pytest.mark.attack("a state dict that is a FIFO, a sparse file, a zip bomb", "refused")
@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "sparse", "zip"])
def test_state_dicts_that_bomb(submission, run, tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        torch.save({"0.weight": torch.zeros(8)}, tmp_path / "small.pt")
        with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in small.namelist():
                bomb.writestr(entry, small.read(entry) if "data/" not in entry else bytes(1 << 28))
    status, out, err = run("import", submission, path, "-o", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.attack("a .pt2 file, with or without custom operations", "refused unread: no command opens one")
def test_exported_programs_are_not_opened(run, tmp_path):
    (tmp_path / "bomb.pt2").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for words in (["count", tmp_path / "bomb.pt2", "--input", "1x3x8x8"], [tmp_path / "bomb.pt2"]):
        assert run(*words)[0] == 2
    assert not (tmp_path / "exploded").exists()


@pytest.mark.attack("TOML with a key of 1 MB, or 50,000 unknown keys", "refused in a message of a few lines")
@pytest.mark.parametrize("text", ["k" * 1_000_000 + " = 1", "\n".join(f"k{i} = 1" for i in range(50_000))])
def test_messages_stay_short(submission, run, text):
    manifest = submission / "submission.toml"
    manifest.write_text(text + "\n" + manifest.read_text())
    status, out, err = run(submission)
    assert (status, out) == (2, "")
    assert len(err) < 5_000
    assert "Extra inputs are not permitted" in err


ESCAPES = "\x1b[31m[bold]\u202e\x9b=1"


@pytest.mark.attack("terminal escapes, markup and turned directions in the name of a folder", "printed as escapes")
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "F"], ["evaluate", "F", "F"], ["evaluate", "F", "--format", "csv"],
        ["evaluate", "F", "--format", "markdown"], ["evaluate", "F", "--format", "json"],
        ["evaluate", "F", "--cross-check"], ["check", "F", "--junit", "J", "--summary", "S"], ["compare", "F"],
        ["compare", "F", "--format", "csv"], ["leaderboard", "F", "--html", "H"],
        ["leaderboard", "F", "--format", "csv"],
        ["leaderboard", "F", "--format", "markdown"], ["explain", "F", "0"], ["explain", "F", "nowhere"],
        ["diff", "F", "F"],
        ["rules", "F"], ["validate", "F"], ["validate", "F", "--format", "json"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_names_that_a_terminal_obeys(submission, run, tmp_path, words):
    folder = submission.rename(submission.with_name(ESCAPES))
    short = {"F": folder, "J": tmp_path / "junit", "S": tmp_path / "summary", "H": tmp_path / "site"}
    more = ["--results", tmp_path / "results", "--executor", "here"] if words[0] == "compare" else []
    _, out, err = run(*(short.get(word, word) for word in words), *more)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".html", "") and path.is_file()
               and tmp_path / "results" != path and folder not in path.parents]  # fmt: skip
    for text in (out, err, *written):
        assert not {"\x1b", "\u202e", "\x9b"} & set(text)
    assert "Traceback" not in err


MARKUP = "<img src=x onerror=alert(1)>[/nope][red]"


@pytest.mark.attack("HTML and markup in every text of a submission", "shown as text")
def test_texts_that_a_browser_or_a_console_obeys(submission, run, tmp_path):
    read = tomllib.loads((submission / "submission.toml").read_text())
    read["name"], read["authors"], read["provenance"]["note"] = MARKUP, [MARKUP], MARKUP
    for step in read["provenance"]["steps"]:
        step["stage"] = MARKUP
    (submission / "submission.toml").write_text(tomli_w.dumps(read))
    (submission / "recipe.toml").write_text(f"# {MARKUP}")
    bad = shutil.copytree(submission, tmp_path / "<img src=x onerror=alert(1)>")
    (bad / "weights.safetensors").unlink()
    status, _, err = run("leaderboard", submission, bad, "--html", tmp_path / "site")
    assert status == 0, err
    assert "[/nope][red]" in run(submission)[1]
    pages = [path.read_text() for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) == 3
    for page in pages:
        assert "<img" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_notebook_shows_names_as_text(submission):
    folder = submission.rename(submission.with_name("<img src=x onerror=alert(1)>"))
    assert "<img" not in evaluate(folder)._repr_html_()


@pytest.mark.attack("number formats nested or long without end", "refused")
@pytest.mark.parametrize(
    "spec",
    ["signs:" * 5_000 + "int8", "fixed-point:" + "9" * 5_000, "affine:0:" + "9" * 60 + ":1x1:zeros",
     "codebook:" + "9" * 30, "affine:-7:7:" + "9" * 30 + "x1",
     "fixed-point:\u0668"],
)  # fmt: skip
def test_formats_without_end(spec):
    reader = packing._BitReader(np.zeros(8, np.uint8))
    with pytest.raises(OffGrid):
        format_of(spec, (1, 1), lambda count, width: torch.from_numpy(reader.read(count, width)))


@pytest.mark.attack("weights that are no numbers, in a model that is only counted", "counted, with a warning")
def test_a_count_warns_of_weights_that_are_no_numbers():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert score(layer, torch.zeros(1, 2)).warnings == (
        "1 tensor holds NaN or infinity, the first is 'weight'; the model cannot be packed",
    )
    assert score(torch.nn.Linear(2, 2), torch.zeros(1, 2)).warnings == ()


@pytest.mark.attack("recipe.toml is a link to a file of the organiser's", "not read, so not published")
def test_a_recipe_that_is_a_link(submission, run, tmp_path):
    (tmp_path / "private").write_text("password = 1")
    (submission / "recipe.toml").unlink()
    (submission / "recipe.toml").symlink_to(tmp_path / "private")
    assert run("leaderboard", submission, "--html", tmp_path / "site")[0] == 0
    assert not [path for path in (tmp_path / "site").rglob("*.*") if "password" in path.read_text()]


def changed(submission, **parts):
    path = submission / "weights.safetensors"
    packed = packing.read(path)
    packing.write(packing.Packed(packed.structure.model_copy(update=parts), packed.streams, packed.plain), path)
    return packed.structure


@pytest.mark.attack("blocks of a mask that are larger than all memory", "refused")
def test_blocks_beyond_their_tensor(submission, run):
    (name, kind, _), *others = packing.read(submission / "weights.safetensors").structure.tensors
    changed(submission, tensors=[(name, kind, "blocks:9999999999x9999999999"), *others])
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "are larger than a tensor of shape" in err


@pytest.mark.attack("names of tensors and options of 1 MB", "refused in a short message")
@pytest.mark.parametrize("what", ["tensors", "layers"])
def test_names_in_the_weights_that_are_long(submission, run, what):
    layer = {"type": "Linear", "in_features": 1, "out_features": 1, "k" * 1_000_000: 1}
    changed(
        submission,
        **({"layers": {"0": layer}} if what == "layers" else {"tensors": [("n" * 1_000_000, "int8", "dense")]}),
    )
    status, _, err = run(submission)
    assert status == 2
    assert len(err) < 5_000
    assert max(map(len, (finding.told for finding in validate(submission)))) < 5_000


@pytest.mark.attack("a layer that asks for values of its own, on another device", "refused")
@pytest.mark.parametrize("option", ["device", "dtype"])
def test_layers_that_are_placed(option):
    with pytest.raises(StructureError, match=f"no option '{option}' in a file"):
        build_layer({"type": "Linear", "in_features": 1, "out_features": 1, option: "cpu"})


@pytest.mark.attack("layers with options that nothing reads", "refused")
@pytest.mark.parametrize("layer", [{"type": "Identity"}, {"type": "Sequential", "layers": []}])
def test_layers_with_options_that_nothing_reads(layer):
    build_layer(layer)
    with pytest.raises(StructureError, match="no option 'note' in a file"):
        build_layer({**layer, "note": "read by nobody"})


@pytest.mark.attack("bytes behind the structure of the weights, or too few of it", "refused")
@pytest.mark.parametrize("change", [lambda whole: whole + b"more", lambda whole: whole[:-4]], ids=["more", "cut"])
def test_a_structure_that_is_not_one_stream(submission, run, monkeypatch, change):
    compress = packing.zlib.compress
    monkeypatch.setattr(packing.zlib, "compress", lambda *given: change(compress(*given)))
    changed(submission)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the structure cannot be read" in err


@pytest.mark.attack("a layer in the weights that computes across the examples of a batch", "refused")
def test_layers_that_look_at_the_others_of_a_batch(submission, run):
    layer = {"type": "BatchNorm2d", "num_features": 16, "track_running_stats": False}
    changed(submission, layers={"0": layer})
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "computes across the examples of a batch" in err


@pytest.mark.attack("hides weights as numbers of layers in the weights", "refused: at most 16 such numbers")
@pytest.mark.parametrize("step", [1e-5, 1])
def test_layers_with_many_numbers(submission, run, step):
    norms = [{"type": "GroupNorm", "num_groups": 1, "num_channels": 1, "eps": step * i} for i in range(1, 18)]
    changed(submission, layers={"0": {"type": "Sequential", "layers": norms}})
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "layers with 17 numbers, such as eps" in err


@pytest.mark.attack("a tensor under a second name, through its parametrization", "refused")
def test_a_tensor_by_the_name_of_its_parametrization():
    structure = packing.Structure(tensors=[("weight", "fixed-point:4", "dense"),
                                           ("parametrizations.weight.original", "float32", "dense")])  # fmt: skip
    streams = {"values": np.zeros(5, np.uint8), "masks": np.zeros(0, np.uint8), "overhead": np.zeros(1, np.uint8)}
    with pytest.raises(InputError, match=r"'parametrizations.weight.original' has no place"):
        packing.unpack(packing.Packed(structure, streams, {}), torch.nn.Linear(1, 1, bias=False))


@pytest.mark.attack("quantizers of activations with endless numbers", "refused")
@pytest.mark.parametrize("declared", [f"affine:-{'9' * 5_000}:7", "affine:-9999999999:5:zeros"])
def test_quantizers_with_endless_numbers(declared):
    with pytest.raises(OffGrid, match="no quantizer of activations"):
        of_activations(declared)


@pytest.mark.attack("layers nested too deep", "refused")
def test_layers_nested_too_deep(submission):
    deep = {"type": "Identity"}
    for _ in range(2_000):
        deep = {"type": "Sequential", "layers": [deep]}
    packed = packing.read(submission / "weights.safetensors")
    with pytest.raises(InputError, match="nested too deep"):
        packing.unpack(
            packing.Packed(packed.structure.model_copy(update={"layers": {"0": deep}}), packed.streams, {}),
            torch.nn.Sequential(torch.nn.Identity()),
        )
