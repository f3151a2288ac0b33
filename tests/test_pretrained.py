"""Published weights: their records, their downloads, and their use in commands."""

import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import http.server
import pathlib
import re
import socket
import threading
import time
import urllib.request

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest
import skimage
from quick import exit_code
from test_weights import numbered

import cnnjax
import configs.lenet_digits
from cnnjax import classifier, evaluate, predict, transfer, weights
from cnnjax.models import create_model
from cnnjax.runtime import files, imagenet
from cnnjax.train import run as train
from cnnjax.train.parallel import Parallel
from cnnjax.weights import __main__ as listing
from cnnjax.weights import download, preprocessing, records

GOLDEN = pathlib.Path(__file__).parent / "golden"
PHOTOGRAPHS = pathlib.Path(skimage.__file__).parent / "data"

# ------------------------------------------------------------------ records


def test_every_network_of_torchvision_has_its_records():
    torchvision = np.load(GOLDEN / "torchvision.npz")
    networks = {case.split("/")[0] for case in torchvision.files if case.endswith("/keys")}
    records = weights.list_weights()
    assert {record.network for record in records} == networks
    assert len(networks) == 33
    newer = [record.network for record in records if record.tag == "imagenet1k_v2"]
    assert sorted(newer) == [
        "mobilenet_v2",
        "resnet101",
        "resnet152",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
    ]
    assert len({record.file for record in records}) == len(records) == 39
    for record in records:
        assert len(bytes.fromhex(record.sha256)) >= 4
        assert 50 < record.top1 < record.top5 < 97
        assert record.crop == create_model(record.network).input_shape[0]


def test_a_record_as_torchvision_publishes_it():
    record = weights.find("resnet50", "IMAGENET1K_V2")
    assert record.url == "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    assert (record.sha256, record.top1, record.top5) == ("11ad3fa6", 80.858, 95.434)
    assert (record.resize, record.crop, record.hub) == (232, 224, "timm/resnet50.tv2_in1k")
    inception = weights.find("inception_v3")
    assert (inception.resize, inception.crop, inception.transform_input) == (342, 299, True)
    # timm's weights of this network are other ones.
    assert weights.find("mobilenet_v2").hub is None
    assert weights.of_file("~/x/googlenet-1378be20.pth") == weights.find("googlenet")
    assert weights.of_file("googlenet.pth") is None
    # The Hugging Face cache has files of one name in folders named after the weights.
    in_cache = "hub/models--timm--inception_v3.tv_in1k/snapshots/0f/model.safetensors"
    assert weights.of_file(in_cache) == inception
    assert weights.of_file("hub/model.safetensors") is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet5",), "model='resnet5' has no published ImageNet weights; did you mean resnet"),
        (("lenet",), "model='lenet' has no published ImageNet weights"),
        (("vgg16", "imagenet1k_v2"), "tag='imagenet1k_v2' is not one of vgg16's: imagenet1k_v1"),
    ],
)
def test_unknown_weights_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.find(*arguments)


def test_names_that_are_imported_late_are_listed():
    assert {"load_pretrained", "create_model", "visualize", "__version__"} <= {*dir(cnnjax)}
    assert {"load_pretrained", "preprocess", "find"} <= {*dir(weights)}


def test_the_command_lists_all_weights(capsys):
    assert exit_code(listing.main, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 39
    row = next(line for line in lines if line.startswith("googlenet"))
    assert row.split() == [
        "googlenet",
        "imagenet1k_v1",
        "69.778",
        "89.530",
        "256",
        "224",
        "googlenet-1378be20.pth",
    ]


def test_the_documentation_has_the_table():
    page = pathlib.Path(__file__).parents[1] / "docs" / "pretrained.md"
    assert listing.markdown() in page.read_text()


def test_the_classes_are_imagenets():
    classes = weights.imagenet_classes()
    assert len(set(classes)) == 1000
    assert [classes[number] for number in (0, 1, 281, 999)] == [
        "tench",
        "goldfish",
        "tabby",
        "toilet tissue",
    ]


# ------------------------------------------------------------------ where files come from

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8))
SHA256 = hashlib.sha256(CONTENT).hexdigest()[:8]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT up to `cut` bytes per connection, and records requested ranges."""

    cut = len(CONTENT)
    takes_ranges = True
    is_chunked = False
    protocol_version = "HTTP/1.1"
    asked: list[str | None] = []

    def do_GET(self):
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        self.close_connection = True
        start = 0
        if wanted and self.takes_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        answer = CONTENT[start : start + self.cut]
        if self.is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(answer), answer))
            if start + len(answer) == len(CONTENT):
                self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def direct(monkeypatch):
    """Reaches this machine's servers without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # urllib remembers the proxy of its first request.
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def server(direct):
    """Starts a local server; yields a URL and the handler class with its settings."""
    handler = type("Handler", (Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/w.pth", handler
        running.shutdown()
        thread.join()


def test_a_download_that_is_cut_off_is_resumed(server, tmp_path):
    url, handler = server
    handler.cut = 1_250_000
    path = download.download(url, tmp_path / "cache" / "w.pth", SHA256)
    assert path.read_bytes() == CONTENT
    assert handler.asked == [None, "bytes=1250000-", "bytes=2500000-"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("takes_ranges", [True, False])
@pytest.mark.parametrize("arrived", [1, 2_000_000, len(CONTENT)])
def test_a_later_call_resumes_what_an_earlier_one_left(arrived, takes_ranges, server, tmp_path):
    """The server may ignore ranges, and a complete file may lack only its final name."""
    url, handler = server
    handler.takes_ranges = takes_ranges
    (tmp_path / "w.pth.partial").write_bytes(CONTENT[:arrived])
    path = download.download(url, tmp_path / "w.pth", SHA256)
    assert path.read_bytes() == CONTENT
    assert handler.asked == [f"bytes={arrived}-"]


@pytest.mark.parametrize("cut", [2_000_000, len(CONTENT)])
def test_an_answer_without_a_length_is_read_to_its_end(cut, server, tmp_path):
    """Some proxies send files in chunks; a cut-off download is resumed."""
    url, handler = server
    handler.cut = cut
    handler.is_chunked = True
    path = download.download(url, tmp_path / "w.pth", SHA256)
    assert path.read_bytes() == CONTENT
    assert len(handler.asked) == (1 if cut == len(CONTENT) else 2)


def test_a_server_that_always_cuts_off_at_the_same_place_is_an_error(server, tmp_path):
    url, handler = server
    handler.cut = 1_500_000
    handler.takes_ranges = False
    with pytest.raises(OSError, match="w.pth: cut off again after 1.5 MB"):
        download.download(url, tmp_path / "w.pth", SHA256)
    assert handler.asked == [None, "bytes=1500000-"]


def test_a_file_of_another_hash_is_not_kept(server, tmp_path):
    url, _ = server
    with pytest.raises(OSError, match=f"SHA-256 begins with {SHA256}, .* with 00000000"):
        download.download(url, tmp_path / "w.pth", "00000000")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth.partial"]
    assert (tmp_path / "w.pth.partial").read_bytes() == b""


def test_a_process_that_waits_downloads_after_one_that_met_another_file(
    server, tmp_path, monkeypatch
):
    url, _ = server
    path = tmp_path / "w.pth"
    has_opened = threading.Event()
    results = []

    def wait():
        lock = fcntl.flock
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: (has_opened.set(), lock(*arguments)))
        results.append(download.download(url, path, SHA256))

    waiting = threading.Thread(target=wait)

    def digest(partial, digest=download.sha256):
        monkeypatch.setattr(download, "sha256", digest)
        waiting.start()
        assert has_opened.wait(60)
        return digest(partial)

    monkeypatch.setattr(download, "sha256", digest)
    with pytest.raises(OSError, match="is another file"):
        download.download(url, path, "00000000")
    waiting.join(60)
    assert results == [path]
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_is_enough(server, tmp_path, monkeypatch):
    errors = [errno.EIO, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EPERM]

    def lock(stream, operation):
        raise OSError(errors[0], "no lock")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(OSError, match="no lock"):
        download.download(server[0], tmp_path / "w.pth", SHA256)
    while errors := errors[1:]:
        path = download.download(server[0], tmp_path / f"{errors[0]}.pth", SHA256)
        assert path.read_bytes() == CONTENT


@pytest.mark.slow
def test_a_server_that_sends_nothing_is_an_error(server, tmp_path):
    url, handler = server
    handler.cut = 0
    with pytest.raises(OSError, match="nothing arrived"):
        download.download(url, tmp_path / "w.pth", SHA256)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Sets empty caches and a proxy that refuses connections; returns their folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    return tmp_path


def test_pytorchs_cache_comes_first_and_its_hash_is_checked(caches, monkeypatch):
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "alexnet-owt-7be5be79.pth"
    content = (GOLDEN / "kinds.pth").read_bytes()
    path.write_bytes(content)
    assert weights.fetch("alexnet") == str(path)
    with pytest.raises(ValueError, match="alexnet-owt-7be5be79.pth is damaged or another file"):
        cnnjax.load_pretrained("alexnet")
    prefix = hashlib.sha256(content).hexdigest()[:8]
    record = dataclasses.replace(weights.find("alexnet"), file=f"alexnet-owt-{prefix}.pth")
    monkeypatch.setattr("cnnjax.weights.records.of_name", lambda path: record)
    assert "base" in weights.read(path)


def test_the_cache_is_where_pytorch_has_it(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.checkpoints_folder() == tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache" / "torch" / "hub" / "checkpoints"
    assert download.checkpoints_folder() == expected


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_without_a_network_one_line_says_what_to_put_where(name, caches):
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        weights.fetch(name)
    assert time.monotonic() - began < 5
    record = weights.find(name)
    for part in (record.file, record.url, f"put it into {caches}/torch/hub/checkpoints"):
        assert part in str(error.value)
    assert str(error.value).startswith(f"no weights of '{name}' were found or downloaded (")
    assert str(error.value).endswith(
        "(--weights FILE, path=FILE, --config.weights=FILE of the position study or "
        "--config.initial_weights=FILE of training)"
    )
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_servers_that_never_answer_are_given_up_on(caches, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(download, "_PROBE_SECONDS", 0.1)
        monkeypatch.setattr(download, "_STALLED_SECONDS", 0.3)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="download.pytorch.org: no answer within 0.3 s"):
            weights.fetch("vgg16")
        assert 0.4 < time.monotonic() - began < 5


@pytest.fixture
def servers(caches, monkeypatch):
    """Replaces the servers by local functions; returns a list that records requests."""
    asked = []

    def from_hub(repository, file):
        asked.append(f"{repository}/{file}")
        if repository == "timm/resnet18.tv_in1k":
            raise RuntimeError("no such repository\nand more")
        return "hub.safetensors"

    def from_torchvision(url, path, sha256):
        asked.append(url.rpartition("/")[2])
        return path

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    monkeypatch.setattr(download, "download", from_torchvision)
    monkeypatch.setattr(download, "_ask", lambda urls, seconds: ({}, []))
    return asked


@pytest.mark.parametrize(
    "name, tag, asked",
    [
        ("resnet50", "imagenet1k_v2", ["timm/resnet50.tv2_in1k/model.safetensors"]),
        ("mobilenet_v2", "imagenet1k_v2", ["mobilenet_v2-7ebf99e0.pth"]),
        (
            "resnet18",
            "imagenet1k_v1",
            ["timm/resnet18.tv_in1k/model.safetensors", "resnet18-f37072fd.pth"],
        ),
    ],
)
def test_the_hub_comes_before_torchvisions_server(name, tag, asked, servers, caches):
    """torchvision's server is asked only if timm has other weights or the hub fails."""
    path = weights.fetch(name, tag)
    assert servers == asked
    if asked[-1].endswith(".pth"):
        assert path == str(caches / "torch" / "hub" / "checkpoints" / asked[-1])
    else:
        assert path == "hub.safetensors"


def test_the_hubs_cache_comes_before_any_server(servers, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: "cached")
    assert weights.fetch("vgg16") == "cached"
    assert servers == []


def test_a_slow_server_is_waited_for_if_no_other_answers(servers, monkeypatch):
    """Within two seconds, neither answers; later, the hub refuses and torchvision answers."""
    rounds = []

    def ask(urls, seconds):
        rounds.append(seconds)
        return ({}, urls) if len(rounds) == 1 else ({urls[0]: "refused"}, [])

    monkeypatch.setattr(download, "_ask", ask)
    assert weights.fetch("vgg16").endswith("vgg16-397923af.pth")
    assert rounds == [2, 30] and servers == ["vgg16-397923af.pth"]
    monkeypatch.setattr(download, "_ask", lambda urls, seconds: ({}, urls))
    with pytest.raises(RuntimeError, match="download.pytorch.org: no answer within 30 s"):
        weights.fetch("vgg16")


def test_servers_that_refuse_are_told_from_slow_ones(direct):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        slow, refusing = (f"http://127.0.0.1:{s.getsockname()[1]}/w" for s in (silent, closed))
        refusals, waiting = download._ask([slow, refusing], 0.5)
    assert waiting == [slow]
    assert list(refusals) == [refusing] and "refused" in refusals[refusing]


def test_an_address_that_is_none_refuses(direct):
    refusals, waiting = download._ask(["localhost/hub"], 5)
    assert waiting == [] and "unknown url type" in refusals["localhost/hub"]


def test_a_hub_that_is_offline_is_not_asked(servers, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert weights.fetch("vgg16").endswith("vgg16-397923af.pth")
    assert servers == ["vgg16-397923af.pth"]


# ------------------------------------------------------------------ use


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, resize, crop",
    [
        ("chelsea.png", 256, 224),
        ("coffee.png", 232, 224),
        ("motorcycle_left.png", 342, 299),
        ("camera.png", 256, 224),
    ],
)
def test_photographs_are_prepared_as_by_torchvision(name, resize, crop):
    """Compares every 16th pixel with torchvision's transforms (golden/make_pth.py)."""
    record = dataclasses.replace(weights.find("resnet50"), resize=resize, crop=crop)
    pixels = weights.preprocess(PHOTOGRAPHS / name, record)
    assert pixels.shape == (crop, crop, 3)
    expected = np.load(GOLDEN / "preprocessed.npz")[name]
    np.testing.assert_allclose(pixels[::16, ::16], expected, atol=1e-5)
    in_memory = PIL.Image.open(PHOTOGRAPHS / name)
    np.testing.assert_array_equal(weights.preprocess(in_memory, record), pixels)


@pytest.mark.parametrize("kind, mode", [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_an_image_in_memory_of_more_than_8_bits_is_refused(kind, mode):
    image = PIL.Image.fromarray(np.full((300, 300), 1000, kind))
    message = rf"pixels of more than 8 bits \(Pillow's mode {mode}\); expected 8"
    with pytest.raises(ValueError, match=message):
        weights.preprocess(image, weights.find("resnet50"))


def test_an_image_is_a_path_or_pillows():
    record = weights.find("resnet50")

    class Path:
        def __fspath__(self):
            return str(PHOTOGRAPHS / "chelsea.png")

    assert weights.preprocess(Path(), record).shape == (224, 224, 3)
    with pytest.raises(ValueError, match="^image=ndarray is neither a path nor an image of Pillow"):
        weights.preprocess(np.zeros((300, 300, 3), np.uint8), record)
    message = r"^record='resnet50' is not a record of weights; cnnjax\.weights\.find\(NAME\) ret"
    with pytest.raises(ValueError, match=message):
        weights.preprocess(PHOTOGRAPHS / "chelsea.png", "resnet50")


@pytest.mark.slow
@pytest.mark.parametrize("name, stage", [("googlenet", "conv1"), ("inception_v3", "Conv2d_2b_3x3")])
def test_networks_of_google_convert_their_input(name, stage):
    """With ImageNet weights, the input becomes x * (std / 0.5) + (mean - 0.5) / 0.5."""
    assert not create_model(name).transform_input
    plain = create_model(name, aux_logits=False)
    fields = weights.fields_for(name, "imagenet")
    assert fields == weights.fields_for(name, weights.find(name).file)
    converting = create_model(name, **fields)
    assert converting == plain.clone(transform_input=True)

    mean = np.float32(imagenet.MEAN)
    std = np.float32(imagenet.STD)
    variables = numbered(plain)
    pixels = np.random.default_rng(1).random((1, 16, 16, 3), np.float32)
    normalized = (pixels - mean) / std

    def run(model, x):
        apply = functools.partial(model.apply, method="stages", last=stage)
        return jax.jit(apply)(variables, x)[stage]

    expected = run(plain, (pixels - 0.5) / 0.5)
    np.testing.assert_allclose(run(converting, normalized), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def renamed(monkeypatch, tmp_path):
    """Returns a file that has the content, and not the name, of GoogLeNet's published weights."""
    content = (GOLDEN / "kinds.pth").read_bytes()
    path = tmp_path / "renamed.pth"
    path.write_bytes(content)
    prefix = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setitem(records._V1, "googlenet", (f"googlenet-{prefix}", 69.778, 89.530))
    return path


def test_a_published_file_is_recognized_whatever_its_name(renamed, monkeypatch):
    assert weights.of_file(renamed) == weights.find("googlenet")
    monkeypatch.setenv("HOME", str(renamed.parent))
    assert weights.fields_for("googlenet", "~/renamed.pth") == weights.find("googlenet").fields
    assert classifier.published("googlenet", path=str(renamed)).published["top-1"] == 69.778
    renamed.write_bytes(renamed.read_bytes() + b"0")
    assert weights.of_file(renamed) is None


def test_files_that_do_not_tell_are_assumed_not_to_convert_and_a_warning_says_so(tmp_path, caplog):
    path = tmp_path / "mine.pth"
    for _ in range(2):
        fields = weights.fields_for("inception_v3", path)
        assert fields == {"transform_input": False, "aux_logits": False}
    (message,) = caplog.messages
    assert message.startswith(f"{path} is not a published file of inception_v3: transform_input=Fa")
    fields = weights.fields_for("inception_v3", path, transform_input=True)
    assert fields == {"transform_input": True, "aux_logits": False}
    for name, source in (("resnet18", path), ("inception_v3", "random")):
        assert weights.fields_for(name, source) == {}
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_load_pretrained_is_told_how_a_file_was_trained(tmp_path):
    path = tmp_path / "mine.safetensors"
    weights.save_torchvision(numbered(create_model("googlenet", aux_logits=False)), path)
    for given, expected in ((None, False), (False, False), (True, True)):
        model, _ = cnnjax.load_pretrained("googlenet", path=path, transform_input=given)
        assert model.transform_input == expected


def test_published_weights_are_not_taken_by_a_network_without_the_conversion(renamed):
    model = create_model("googlenet", num_classes=10)
    message = "needs a model with transform_input=True"
    with pytest.raises(ValueError, match=f"^initial_weights=.*{message}"):
        transfer.load_initial_weights(renamed, model)
    with pytest.raises(ValueError, match=f"^weights=.*{message}"):
        weights.load_torchvision(renamed, model)
    with pytest.raises(ValueError, match=f"^path=.*{message}"):
        cnnjax.load_pretrained("googlenet", path=renamed, transform_input=False)


@pytest.mark.parametrize("kind", ["train", "combine"])
@pytest.mark.parametrize("was_transformed", [True, False])
def test_a_runs_weights_are_not_taken_by_a_network_of_another_input(
    was_transformed, kind, tmp_path
):
    finished_run(tmp_path / "run")
    fields = {"transform_input": True} if was_transformed else {}
    config = {"kind": kind, "model": "googlenet", "model_fields": fields}
    files.write_json(tmp_path / "run" / "config.json", config)
    # Where a combination records the network that it made.
    files.write_json(tmp_path / "run" / "results.json", {"config": config})
    model = create_model("googlenet", num_classes=10, transform_input=not was_transformed)
    message = f"needs a model with transform_input={was_transformed}"
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(tmp_path / "run", model)
    fields = weights.fields_for("googlenet", tmp_path / "run" / transfer.WEIGHTS)
    assert fields == {"transform_input": was_transformed, "aux_logits": False}


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet50", {"num_classes": "10"}, "num_classes='10' is not a positive whole number"),
        ("resnet50", {"num_classes": 10.5}, "num_classes=10.5 is not a positive whole number"),
        ("resnet50", {"num_classes": 0}, "num_classes=0 is not a positive whole number"),
        ("resnet50", {"num_classes": True}, "num_classes=True is not a positive whole number"),
        ("resnet50", {"seed": "a"}, "seed='a' is not a whole number"),
        ("resnet50", {"seed": -1}, "seed=-1 is not a whole number of at least 0"),
        (
            "resnet50",
            {"seed": 2**64},
            "seed=18446744073709551616 is not a whole number of at least",
        ),
        ("resnet50", {"tag": ""}, "tag='' is not one of resnet50's: imagenet1k_v1, imagenet1k_v2"),
        (
            "resnet50",
            {"tag": "imagenet1k_v1", "path": "a/resnet50-11ad3fa6.pth"},
            "tag='imagenet1k_v1' does not fit path='a/resnet50-11ad3fa6.pth', which holds imagenet",
        ),
        ("resnet50", {"tag": 2}, "tag=2 is not one of resnet50's"),
        (
            "resnet50",
            {"transform_input": True},
            "transform_input=True is not a field of resnet50; it is one of googlenet and inception",
        ),
        ("googlenet", {"transform_input": 1}, "transform_input=1 is not True, False or None"),
        ("googlenet", {"transform_input": False}, "transform_input=False is for a file at path"),
        (["resnet50"], {}, r"model=\['resnet50'\] has no published ImageNet weights"),
    ],
)
def test_wrong_arguments_are_refused_before_a_download(name, options, message, monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda *arguments: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=f"^{message}"):
        cnnjax.load_pretrained(name, **options)


@pytest.mark.slow
def test_a_pretrained_network_with_its_own_head_and_with_another(tmp_path):
    variables = {"batch_stats": {}, **numbered(create_model("squeezenet1_1"))}
    path = tmp_path / "w.pth"
    weights.save_torchvision(variables, path)
    model, loaded = cnnjax.load_pretrained("squeezenet1_1", path=path)
    assert model == create_model("squeezenet1_1")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)

    model, loaded = cnnjax.load_pretrained(
        "squeezenet1_1",
        path=path,
        num_classes=7,
        padding="reflect",
        dtype=jnp.bfloat16,
    )
    assert (model.num_classes, model.padding, model.dtype) == (7, "reflect", jnp.bfloat16)
    head = loaded["params"].pop("classifier.1")
    assert head["kernel"].shape == (1, 1, 512, 7)
    assert np.std(head["kernel"]) > 0
    assert not head["bias"].any()
    variables["params"].pop("classifier.1")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.fixture(scope="module")
def trunk():
    """Returns SqueezeNet's variables without its head."""
    variables = numbered(create_model("squeezenet1_1"))
    variables["params"].pop("classifier.1")
    return variables


@pytest.mark.parametrize("classes", [None, 3, 7, 1000])
def test_a_new_head_needs_none_in_the_file(classes, trunk, tmp_path, caplog):
    """Nor does the file's have to fit; a warning says so if it has as many classes."""
    params = trunk["params"]
    if classes is not None:
        head = {"kernel": np.ones((1, 1, 512, classes), np.float32), "bias": np.ones(classes)}
        params = params | {"classifier.1": head}
    path = tmp_path / "w.safetensors"
    weights.save_torchvision({"params": params}, path)
    model, loaded = cnnjax.load_pretrained("squeezenet1_1", path=path, num_classes=7)
    head = loaded["params"].pop("classifier.1")
    assert model.num_classes == 7 and head["kernel"].shape == (1, 1, 512, 7)
    assert not head["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], trunk["params"])
    assert [message.split(": ")[1] for message in caplog.messages] == (
        [
            "its head of 7 classes is not read, since num_classes asks for a new one; create_model "
            "and load_torchvision keep it"
        ]
        if classes == 7
        else []
    )


def test_a_head_of_several_layers_is_not_read_either(tmp_path):
    """As of MoCo v2, whose head is a `Sequential`."""
    variables = numbered(create_model("squeezenet1_1"))
    params = variables["params"]
    params["classifier.1.0"] = params.pop("classifier.1")
    params["classifier.1.2"] = params["classifier.1.0"]
    path = tmp_path / "w.safetensors"
    weights.save_torchvision(variables, path)
    _, loaded = cnnjax.load_pretrained("squeezenet1_1", path=path, num_classes=2)
    assert loaded["params"]["classifier.1"]["bias"].shape == (2,)
    # What lies elsewhere is refused.
    params["queue"] = {"bias": np.ones(2, np.float32)}
    weights.save_torchvision(variables, path)
    message = r"^path=.*the file holds tensors that the model lacks.*: queue.bias \(2,\)$"
    with pytest.raises(ValueError, match=message):
        cnnjax.load_pretrained("squeezenet1_1", path=path, num_classes=2)


def test_predict_says_weights_of_a_file_that_does_not_fit(trunk, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    weights.save_torchvision(trunk, path)
    arguments = ["squeezenet1_1", str(PHOTOGRAPHS / "chelsea.png"), "--weights", str(path)]
    assert exit_code(predict.main, arguments) == 2
    assert f"weights='{path}' does not fit the model (" in capsys.readouterr().err
    message = (
        rf"^path='{path}' does not fit .*if the file is known to lack these modules, name them: "
        r"missing=\('classifier',\) in cnnjax\.weights\.load_torchvision, "
    )
    with pytest.raises(ValueError, match=message):
        cnnjax.load_pretrained("squeezenet1_1", path=path)
    model = create_model("squeezenet1_1")
    loaded = weights.load_torchvision(path, model, missing=("classifier",))
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], trunk["params"])


def real(data_dir) -> list[str]:
    file = data_dir / "weights" / "squeezenet1_1_imagenet.safetensors"
    return ["--weights", str(file)]


@pytest.mark.slow
def test_predict_names_what_photographs_show(data_dir, capsys):
    names = ("chelsea.png", "coffee.png")
    photographs = [str(PHOTOGRAPHS / name) for name in names]
    assert exit_code(predict.main, ["squeezenet1_1", *photographs, *real(data_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[0] == photographs[0] and lines[6] == photographs[1]
    assert lines[1].split("%")[1].strip() == "Egyptian cat"
    assert lines[7].split("%")[1].strip() == "espresso"
    shares = [float(line.split("%")[0]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True) and 99 < sum(shares) <= 100.05


def finished_run(
    folder: pathlib.Path, image_shape: tuple[int, int, int] = (8, 8, 1), **settings
) -> tuple:
    """Creates the work directory of an untrained run, by default on digits.

    Returns the model and its variables.
    """
    config = configs.lenet_digits.get_config()
    config.update(settings)
    model = create_model(
        config.model, num_classes=10, input_shape=image_shape, **config.model_fields
    )
    variables = {"batch_stats": {}, **numbered(model)}
    folder.mkdir()
    weights.save_torchvision(variables, folder / transfer.WEIGHTS)
    files.write_json(folder / "config.json", config.to_dict())
    results = {
        "classes": [f"digit {number}" for number in range(10)],
        "image_shape": list(image_shape),
        "mean": [0.25] * image_shape[2],
        "std": [0.5] * image_shape[2],
    }
    files.write_json(folder / "results.json", results)
    return model, variables


def test_predict_prepares_photographs_as_the_run_did(tmp_path, capsys):
    """Photographs become gray, have the run's size, and are normalized by its moments."""
    model, variables = finished_run(tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    files = []
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(pixels):
        files.append(str(tmp_path / "folder" / f"{number}.png"))
        PIL.Image.fromarray(image[..., 0]).save(files[-1])
    paths = [pathlib.Path(file) for file in files]
    network = classifier.trained(tmp_path / "run")
    np.testing.assert_array_equal([network.read(path) for path in paths], pixels)
    normalized = (pixels / np.float32(255) - np.float32(0.25)) / np.float32(0.5)
    expected = jax.nn.softmax(jax.jit(model.apply)(variables, normalized))
    np.testing.assert_allclose([*predict.probabilities(network, paths)], expected, atol=1e-5)

    assert exit_code(predict.main, [str(tmp_path / "run"), *files]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[6] == files[1]
    assert lines[7].endswith(f"%  digit {int(expected[1].argmax())}")
    # As a table, with the same order and probabilities.
    assert exit_code(predict.main, [str(tmp_path / "run"), *files, "--csv"]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["file", "rank", "class", "probability"]
    assert [row[0] for row in rows] == [file for file in files for _ in range(5)]
    for file, rank, name, probability in rows:
        percent, printed_name = lines[6 * files.index(file) + int(rank)].split(" %  ")
        assert printed_name == name
        assert float(percent) == pytest.approx(100 * float(probability), abs=0.0051)

    # A folder stands for its images.
    (tmp_path / "folder" / "3.heic").touch()
    assert exit_code(predict.main, [str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
    captured = capsys.readouterr()
    assert captured.out == output
    assert captured.err.endswith(f"{tmp_path / 'folder'}: 1 file passed over: 1 .heic\n")


def test_photographs_of_a_run_on_rectangles(tmp_path):
    """As in camvid_scenes, images have 180x240 pixels and several classes."""
    settings = {"model": "scene_net", "dataset": "camvid_scenes", "loss": "sigmoid"}
    model, variables = finished_run(tmp_path / "run", (180, 240, 3), **settings)
    pixels = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    # Twice as large, with margins on the left and right that a center crop removes.
    wide = np.zeros((360, 500, 3), np.uint8)
    wide[:, 10:490] = pixels.repeat(2, 0).repeat(2, 1)
    tall = np.zeros((400, 480, 3), np.uint8)
    tall[20:380] = 200
    paths = [tmp_path / name for name in ("same.png", "wide.png", "tall.png")]
    for path, image in zip(paths, (pixels, wide, tall)):
        PIL.Image.fromarray(image).save(path)
    network = classifier.trained(tmp_path / "run")
    same, smaller, middle = map(network.read, paths)
    np.testing.assert_array_equal(same, pixels)
    # Antialiasing mixes neighboring pixels.
    assert smaller.shape == middle.shape == (180, 240, 3)
    assert np.corrcoef(smaller.ravel(), pixels.ravel())[0, 1] > 0.9
    assert (middle[1:-1] == 200).all()

    (probabilities,) = predict.probabilities(network, paths[:1])
    normalized = (pixels[None] / np.float32(255) - np.float32(0.25)) / np.float32(0.5)
    (logits,) = jax.jit(model.apply)(variables, normalized)
    np.testing.assert_allclose(probabilities, jax.nn.sigmoid(logits), atol=1e-5)


def test_photographs_in_gray_of_a_run_on_rectangles(tmp_path):
    finished_run(tmp_path / "run", (9, 12, 1))
    PIL.Image.new("RGB", (40, 30), (70, 70, 70)).save(tmp_path / "a.png")
    read = classifier.trained(tmp_path / "run").read
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.full((9, 12, 1), 70))


def test_a_run_of_nested_fields_is_opened_again(tmp_path):
    """The fields of convnet are tuples of tuples, which become lists in JSON."""
    fields = ml_collections.ConfigDict({"blocks": ((4, 4), (8,))})
    model, _ = finished_run(tmp_path / "run", (8, 8, 3), model="convnet", model_fields=fields)
    reopened = train.open_run(tmp_path / "run")
    assert reopened.model == model
    assert reopened.config.model_fields.blocks == ((4, 4), (8,))
    # A configuration file or a command line may give lists.
    listed = create_model("convnet", blocks=[[4, 4], [8]], input_shape=(8, 8, 3))
    assert hash(listed) == hash(model)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_run_on_images_that_are_no_photographs_is_refused(channels, tmp_path):
    finished_run(tmp_path / "run", (8, 8, channels))
    message = f"run was trained on images of {channels} channels; photographs have 3, or 1 in gray"
    with pytest.raises(ValueError, match=message):
        classifier.trained(tmp_path / "run")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--resize", "224"], "resize=224 is for published weights; run is a run"),
        (["run", "--tag", "imagenet1k_v2"], "tag='imagenet1k_v2' is for published weights"),
        (["run", "--weights", "a.pth"], "weights='a.pth' is for published weights"),
        # It would be the current folder.
        ([""], "error: model='' is not a path"),
        (["squeezenet1_1", "--weights", ""], "error: weights='' is not a path"),
        (["run/none"], "run/none is neither a network's name nor a run's work directory"),
        (["resnet5"], "model='resnet5' has no published ImageNet weights; did you mean resnet"),
        (["runs_mien"], "there is no folder 'runs_mien', and model='runs_mien' has no published"),
        (["resnet50"], "a folder of this name is taken before the network resnet50"),
        (["squeezenet1_1", "--resize", "8"], "resize=8 is not at least 224"),
    ],
)
def test_predict_refuses_what_it_cannot_do(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run", loss="pixelwise")
    (tmp_path / "resnet50").mkdir()
    PIL.Image.new("L", (8, 8)).save(tmp_path / "photo.jpg")
    model, *options = arguments
    assert exit_code(predict.main, [model, "photo.jpg", *options]) == 2
    assert message in capsys.readouterr().err


def test_names_that_begin_with_a_tilde_are_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished_run(pathlib.Path("~run"))
    PIL.Image.new("L", (8, 8)).save("~photo.png")
    assert exit_code(predict.main, ["~run", "~photo.png"]) == 0
    assert capsys.readouterr().out.startswith("~photo.png\n")
    run = train.open_run("~run")
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(run.read("~/~photo.png"), run.read(tmp_path / "~photo.png"))
    assert train.read_config("~/~run").model == run.config.model
    assert transfer.weights_file("~run") == pathlib.Path("~run") / transfer.WEIGHTS
    weights.preprocess("~photo.png", weights.find("resnet50"))
    weights.save_torchvision({}, "~w.safetensors")
    assert pathlib.Path("~w.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["~run", "--data_dir", "."], "model='~run' has no published ImageNet weights"),
        (["resnet50", "--data_dir", "~folder"], "data_dir='~folder' is not a folder"),
        (["resnet50", "--data_dir", ".", "--weights", "~w"], "weights='~w' is not a file"),
    ],
)
def test_names_that_begin_with_a_tilde_and_are_not_there(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").mkdir()
    PIL.Image.new("L", (8, 8)).save(tmp_path / "0" / "a.png")
    assert exit_code(evaluate.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_predict_reads_no_weights_before_it_knows_the_files(tmp_path, capsys):
    (tmp_path / "b.jpg").write_text("no image")
    PIL.Image.new("L", (8, 8)).save(tmp_path / "a.png")
    absent = "is neither an image file nor a folder of them"
    for name, message in (
        (tmp_path / "none.jpg", f"none.jpg' {absent}"),
        (tmp_path / "*.png", f"*.png' {absent}"),
        ("https://x.org/a.png", f"x.org/a.png' {absent}"),
        (tmp_path / "b.jpg", "is not a readable image"),
    ):
        files = [str(tmp_path / "a.png"), str(name)]
        assert exit_code(predict.main, ["squeezenet1_1", *files, "--weights", "none"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and not captured.out


def test_predict_prints_what_it_has_before_a_damaged_photograph(tmp_path, monkeypatch, capsys):
    """The last photograph has truncated pixels, and batches have one image."""
    finished_run(tmp_path / "run")
    monkeypatch.setattr(predict, "_BATCH", 1)
    names = ("a.png", "b.png", "c.png")
    for name in names:
        PIL.Image.new("L", (8, 8)).save(tmp_path / name)
    damaged = tmp_path / "c.png"
    damaged.write_bytes(damaged.read_bytes()[:45])
    files = [str(tmp_path / name) for name in names]
    assert exit_code(predict.main, [str(tmp_path / "run"), *files]) == 2
    captured = capsys.readouterr()
    assert f"{damaged} is not a readable image" in captured.err
    assert captured.out.splitlines()[::6] == files[:2]


def test_predict_leaves_out_damaged_photographs(tmp_path, monkeypatch, capsys):
    """Batches have two images: of the first, one is damaged, and of the second, both are."""
    model, variables = finished_run(tmp_path / "run")
    monkeypatch.setattr(predict, "_BATCH", 2)
    paths = []
    for number, name in enumerate("abcdefg"):
        paths.append(tmp_path / f"{name}.png")
        PIL.Image.new("L", (8, 8), 30 * number).save(paths[-1])
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "c.png").write_text("no image")
    for name in ("d.png", "g.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:45])
    intact = [tmp_path / f"{name}.png" for name in "bef"]

    arguments = [str(tmp_path / "run"), *map(str, paths)]
    assert exit_code(predict.main, arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("; --skip_damaged leaves it out\n") and not captured.out
    assert exit_code(predict.main, [*arguments, "--skip_damaged"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[::6] == [str(path) for path in intact]
    for path in set(paths) - set(intact):
        assert f"passed over: {path} is not a readable image" in captured.err
    assert captured.err.endswith("4 damaged images passed over\n")

    # With smaller weights, the probabilities differ between photographs.
    variables = jax.tree.map(lambda leaf: leaf / 20, variables)
    network = dataclasses.replace(
        classifier.trained(tmp_path / "run"), load=lambda: (model, variables)
    )
    _, rows = zip(*predict._predict(network, paths, damaged=set()))
    expected = np.concatenate([[*predict.probabilities(network, [path])] for path in intact])
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(rows, expected, rtol=1e-3)


def test_predict_says_that_it_follows_no_links_to_folders(tmp_path, capsys):
    finished_run(tmp_path / "run")
    for name in ("elsewhere", "val"):
        (tmp_path / name).mkdir()
    PIL.Image.new("L", (8, 8)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "val" / "cat").symlink_to(tmp_path / "elsewhere")
    assert exit_code(predict.main, [str(tmp_path / "run"), str(tmp_path / "val")]) == 2
    message = (
        f"error: PHOTO='{tmp_path / 'val'}' holds no image file; expected .jpg, .jpeg, .png, "
        ".webp, .bmp (1 folder passed over: cat; links to folders are not followed)\n"
    )
    assert capsys.readouterr().err.endswith(message)


def test_classes_of_a_photograph_that_has_several(tmp_path):
    model, variables = finished_run(tmp_path / "run", loss="sigmoid")
    PIL.Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    network = classifier.trained(tmp_path / "run")
    (probabilities,) = predict.probabilities(network, [tmp_path / "a.png"])
    normalized = np.full((1, 8, 8, 1), (200 / 255 - 0.25) / 0.5, np.float32)
    (logits,) = jax.jit(model.apply)(variables, normalized)
    np.testing.assert_allclose(probabilities, jax.nn.sigmoid(logits), atol=1e-5)


def test_a_segmentation_run_is_refused(tmp_path):
    finished_run(tmp_path / "run", loss="pixelwise")
    with pytest.raises(ValueError, match="is a segmentation run"):
        classifier.trained(tmp_path / "run")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 12, 1)])
def test_evaluate_scores_a_run_on_other_photographs(shape, tmp_path, capsys):
    """Four of six photographs lie in the folder of the predicted class."""
    model, variables = finished_run(tmp_path / "run", shape)
    pixels = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    normalized = (pixels / np.float32(255) - np.float32(0.25)) / np.float32(0.5)
    labels = np.array(jax.jit(model.apply)(variables, normalized).argmax(-1))
    labels[4:] = (labels[4:] + 1) % 10
    for number, (image, label) in enumerate(zip(pixels, labels)):
        folder = tmp_path / "new" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image[..., 0]).save(folder / f"{number}.png")
    arguments = [str(tmp_path / "run"), "--data_dir", str(tmp_path / "new")]
    assert exit_code(evaluate.main, [*arguments, "--batch_size", "8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{tmp_path / 'run'}, 6 photographs", "top-1  66.67 %"]


@pytest.mark.usefixtures("standard_promotion")
def test_evaluate_says_how_many_views_it_averages(tmp_path, capsys):
    """The averages themselves are compared with those of a run's own test in test_train.py."""
    finished_run(tmp_path / "run", test_views=2)
    (tmp_path / "new" / "digit 0").mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(tmp_path / "new" / "digit 0" / "a.png")
    arguments = [str(tmp_path / "run"), "--data_dir", str(tmp_path / "new"), "--batch_size", "8"]
    assert exit_code(evaluate.main, arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{tmp_path / 'run'}, 1 photographs, 2 views of each"


@pytest.mark.usefixtures("standard_promotion")
def test_evaluate_counts_a_class_among_the_first_five(monkeypatch):
    """The labels have the ranks 1, 5, and 6 of eleven; ten classes have no such score."""
    ascending = np.tile(np.arange(11, dtype=np.float32), (3, 1))
    monkeypatch.setattr(classifier, "logits", lambda *arguments: [ascending])
    accuracies = evaluate.evaluate(None, ["a", "b", "c"], np.array([10, 6, 5]))
    assert accuracies == pytest.approx({"top-1": 100 / 3, "top-5": 200 / 3})
    monkeypatch.setattr(classifier, "logits", lambda *arguments: [ascending[:, :10]])
    assert set(evaluate.evaluate(None, ["a", "b", "c"], np.array([9, 5, 4]))) == {"top-1"}


def test_evaluate_divides_batches_over_any_number_of_devices(monkeypatch):
    """By default; a size that is given is kept or refused."""
    sizes = []

    def logits(network, files, parallel, batch_size):
        sizes.append(batch_size)
        yield np.eye(2, dtype=np.float32)

    three = Parallel("jit")
    three.size = 3
    monkeypatch.setattr("cnnjax.train.parallel.Parallel", lambda: three)
    monkeypatch.setattr(classifier, "logits", logits)
    score = functools.partial(evaluate.evaluate, None, [None] * 2, np.arange(2, dtype=np.int32))
    assert score() == score(batch_size=9) == {"top-1": 100}
    assert sizes == [66, 9]
    with pytest.raises(ValueError, match="batch_size=64 is not a multiple of 3 devices"):
        score(batch_size=64)


@pytest.mark.parametrize(
    "options, title, published, resize",
    [
        ({}, "resnet50 imagenet1k_v1", 76.130, 256),
        ({"tag": "imagenet1k_v2"}, "resnet50 imagenet1k_v2", 80.858, 232),
        ({"path": "a/resnet50-11ad3fa6.pth"}, "resnet50 imagenet1k_v2", 80.858, 232),
        ({"path": "resnet50-0676ba61.pth"}, "resnet50 imagenet1k_v1", 76.130, 256),
        ({"path": "a/own.pth"}, "resnet50 a/own.pth", None, 256),
        ({"path": "a/own.pth", "tag": "IMAGENET1K_V2"}, "resnet50 a/own.pth", None, 232),
    ],
)
def test_photographs_are_prepared_as_the_file_of_weights_expects(
    options, title, published, resize, tmp_path
):
    network = classifier.published("resnet50", **options)
    assert network.title == title
    assert network.published.get("top-1") == published
    photograph = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (240, 300, 3), dtype=np.uint8)
    )
    photograph.save(tmp_path / "a.png")
    expected = weights.find("resnet50").resized(resize)
    np.testing.assert_array_equal(
        network.read(tmp_path / "a.png"), preprocessing.resize_and_crop(photograph, expected)
    )


def test_a_tag_that_is_not_the_files_is_refused():
    message = (
        "^tag='imagenet1k_v1' does not fit weights='resnet50-11ad3fa6.pth', which holds "
        "imagenet1k_v2$"
    )
    with pytest.raises(ValueError, match=message):
        classifier.published("resnet50", tag="imagenet1k_v1", path="resnet50-11ad3fa6.pth")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("count, batch_size, size", [(3, 64, 4), (3, 2, 2), (9, 8, 8)])
def test_few_photographs_are_no_full_batch(count, batch_size, size, tmp_path, monkeypatch):
    """On two devices, three photographs are a batch of four."""
    finished_run(tmp_path / "run")
    files = [tmp_path / f"{number}.png" for number in range(count)]
    for file in files:
        PIL.Image.new("L", (8, 8)).save(file)
    sizes = []

    def predict_batches(parallel, model, variables, moments, batches, batch_size, output):
        sizes.append(batch_size)
        return (np.zeros((len(images), 10)) for images in batches)

    monkeypatch.setattr("cnnjax.train.evaluate.predict_batches", predict_batches)
    parallel = Parallel("jit")
    parallel.size = 2
    outputs = classifier.logits(classifier.trained(tmp_path / "run"), files, parallel, batch_size)
    assert sum(map(len, outputs)) == count
    assert sizes == [size]


def test_evaluate_reads_all_headers_before_it_computes(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path / "run")
    (tmp_path / "new" / "0").mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(tmp_path / "new" / "0" / "a.png")
    (tmp_path / "new" / "0" / "b.png").write_text("no image")
    monkeypatch.setattr("cnnjax.train.evaluate.predict_batches", None)
    arguments = [str(tmp_path / "run"), "--data_dir", str(tmp_path / "new")]
    assert exit_code(evaluate.main, [*arguments, "--batch_size", "8"]) == 2
    assert "b.png is not a readable image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "folder, settings, message",
    [
        ("cat", {}, "the folder 'cat' is neither the name of a class (digit 0, digit 1, "),
        ("10", {}, "'10' is neither the name of a class (digit 0, digit 1, "),
        ("", {}, "has no images; expected"),
        ("digit 3", {"loss": "sigmoid"}, "is a multi-label run"),
    ],
)
def test_evaluate_refuses_what_it_cannot_score(folder, settings, message, tmp_path, capsys):
    finished_run(tmp_path / "run", **settings)
    (tmp_path / "new" / folder).mkdir(parents=True)
    if folder:
        (tmp_path / "new" / folder / "a.png").touch()
    arguments = [str(tmp_path / "run"), "--data_dir", str(tmp_path / "new")]
    assert exit_code(evaluate.main, arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, hint",
    [
        (["val/cat/a.png", "train/cat/a.png"], "; did you mean {}/val?"),
        (["dev/cat/a.png", "train/cat/a.png"], "; did you mean {}/train?"),
        # A class may have the name of a split.
        (["train/a.png", "plane/old/a.png"], ""),
    ],
)
def test_evaluate_suggests_the_folder_of_a_split(files, hint, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    hint = re.escape(hint.format(tmp_path))
    with pytest.raises(ValueError, match=rf"^the class folder .* has no images; .*\){hint}$"):
        evaluate.list_imagenet(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_evaluate_counts_the_same_in_every_layout(data_dir, tmp_path, capsys):
    """Labels of 40 photographs come from file names or from numbered folders."""
    files = sorted((data_dir / "imagenet_sample").iterdir())[:40]
    for file in files:
        number, _, label = file.stem.split("_", 2)
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / file.name).symlink_to(file)
        (tmp_path / "numbers" / str(int(number))).mkdir(parents=True, exist_ok=True)
        (tmp_path / "numbers" / str(int(number)) / file.name).symlink_to(file)
    labels_by_name = {}
    for layout in ("flat", "numbers"):
        listed, labels = evaluate.list_imagenet(tmp_path / layout)
        names = [file.name for file in listed]
        labels_by_name[layout] = dict(zip(names, labels.tolist(), strict=True))
    assert labels_by_name["numbers"] == labels_by_name["flat"]
    assert len(labels_by_name["flat"]) == 40
    arguments = ["squeezenet1_1", "--data_dir", str(tmp_path / "numbers"), "--resize", "224"]
    assert exit_code(evaluate.main, [*arguments, *real(data_dir)]) == 0
    out = capsys.readouterr().out
    # The file is not one of torchvision's, so nothing is published of it.
    assert f"squeezenet1_1 {real(data_dir)[1]}, 40 photographs" in out
    assert "top-1  67.50 %\n" in out


@pytest.mark.parametrize(
    "names, message",
    [
        (["tench/a.jpg", "dog/b.jpg"], r"'dog' is neither the name of a class \(tench, goldfish, "),
        (["1000/b.jpg"], r"'1000' is neither .* nor its number, 0 to 999"),
        (["1000_b.jpg"], "1000_b.jpg does not begin with a class's number, 0 to 999"),
        (["b.jpg"], "b.jpg does not begin with a class's number"),
        ([], "has no photographs"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        evaluate.list_imagenet(tmp_path)


def test_class_folders_have_names_or_numbers(tmp_path):
    """No folder can have a class name with a slash; the class's number stands for it."""
    for name in ("2", "0", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    files, labels = evaluate.list_classes(tmp_path, ("a/b", "b", "c"))
    assert [file.parent.name for file in files] == ["0", "2", "b"]
    assert labels.tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="'b' is the name of several classes"):
        evaluate.list_classes(tmp_path, ("a", "b", "b", "c"))


@pytest.mark.parametrize("classes", [("1", "2", "3"), ("1", "2", "a"), ("00", "01", "02")])
def test_numbers_are_names_where_classes_have_such_names(classes, tmp_path):
    """A folder 0 does not stand for the first class if classes are named by numbers."""
    for name in classes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    assert evaluate.list_classes(tmp_path, classes)[1].tolist() == [0, 1, 2]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.jpg").touch()
    message = rf"the folder '0' is not the name of a class \({', '.join(classes)}\)$"
    with pytest.raises(ValueError, match=message):
        evaluate.list_classes(tmp_path, classes)


def test_a_thousand_folders_are_imagenets_classes_in_order(tmp_path):
    for number in range(1000):
        folder = tmp_path / f"n{number:08}"
        folder.mkdir()
        (folder / "a.jpg").touch()
    files, labels = evaluate.list_imagenet(tmp_path)
    assert [file.parent.name for file in files] == [f"n{number:08}" for number in range(1000)]
    assert labels.tolist() == list(range(1000))


def test_a_thousand_folders_named_by_class_are_matched_by_name(tmp_path):
    classes = weights.imagenet_classes()
    names = {}
    for number, name in enumerate(classes):
        is_unique = classes.count(name) == 1
        names[name if is_unique else str(number)] = number
    assert len(names) == 1000
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    files, labels = evaluate.list_imagenet(tmp_path)
    assert labels.tolist() == [names[file.parent.name] for file in files]
    # One class's name among 999 synsets: the folders have no common order.
    for number, name in enumerate(list(names)[1:]):
        (tmp_path / name).rename(tmp_path / f"n{number:08}")
    with pytest.raises(ValueError, match="the folder 'n00000000' is neither the name of a class"):
        evaluate.list_imagenet(tmp_path)


@pytest.mark.parametrize("names", [("0/a.jpg", "0/b.gif"), ("0_a.jpg", "b.gif")])
def test_files_that_evaluate_passes_over_are_told(names, tmp_path, caplog):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level("INFO", "cnnjax"):
        assert len(evaluate.list_imagenet(tmp_path)[0]) == 1
    assert f"{tmp_path}: 1 file passed over: 1 .gif" in caplog.text
