"""PyTorch's .pth files: values are read exactly, and hostile files are refused."""

import argparse
import collections
import io
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from test_fuzz import Watch

from cnnjax import weights
from cnnjax.weights import pth, unpickling

GOLDEN = pathlib.Path(__file__).parent / "golden"

# ------------------------------------------------------------------ files by PyTorch


@pytest.mark.parametrize("file", ["kinds.pth", "kinds_legacy.pth"])
def test_every_type_and_layout_is_read(file):
    """The values are those that tests/golden/make_pth.py states."""
    tensors = pth.read(GOLDEN / file)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "base": base,
        "transposed": base.T,
        "sliced": base[1:3, ::2],
        "bool": np.array([True, False, True]),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3), np.float32),
        "repeated": np.ones(7, np.float32),
        "parameter": np.ones(2, np.float32),
    }
    for name in ("float16", "float64", "int64", "int32", "int16", "int8", "uint8"):
        expected[name] = np.arange(5).astype(name)
    expected["bfloat16"] = np.arange(5).astype(ml_dtypes.bfloat16)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].dtype == values.dtype, name
        assert tensors[name].shape == values.shape, name
        assert np.array_equal(tensors[name], values), name


def test_a_checkpoint_of_parallel_training_is_unwrapped():
    """The weights lie under `state_dict` and have DataParallel's prefix."""
    tensors = weights.read(GOLDEN / "checkpoint.pth")
    assert sorted(tensors) == ["bias", "running_mean", "running_var", "weight"]
    assert np.array_equal(tensors["running_var"], [1, 1])
    assert tensors.names["bias"] == "module.bias"


def test_a_whole_module_is_refused_with_advice():
    message = (
        r"model.pth' is not a readable .pth file .*'torch.nn.modules.linear.Linear'.*state_dict"
    )
    with pytest.raises(ValueError, match=message):
        weights.read(GOLDEN / "model.pth")


# ------------------------------------------------------------------ files by cnnjax


class _StandardUnpickler(pickle.Unpickler):
    """Python's own unpickler, with lists in place of tensors."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if name == "_rebuild_tensor_v2":
            return lambda *arguments: list(arguments)
        return f"{module}.{name}"

    def persistent_load(self, identity):
        return identity


def test_strided_arrays_are_written_as_they_read(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"transposed": values.T, "sliced": values[:, ::2], "scalar": values[0, 1]}
    pth.write(tensors, tmp_path / "w.pth")
    for name, array in pth.read(tmp_path / "w.pth").items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)
        assert array.shape == tensors[name].shape


def test_what_is_written_reads_back_and_is_what_torch_save_writes(tmp_path):
    tensors = {
        "layers.0.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "layers.1.running_mean": np.zeros(3, np.float32),
        "layers.1.num_batches_tracked": np.zeros((), np.int64),
    }
    path = tmp_path / "written.pth"
    pth.write(tensors, path)
    loaded = pth.read(path)
    assert loaded.keys() == tensors.keys()
    for name, values in tensors.items():
        assert loaded[name].dtype == values.dtype
        assert np.array_equal(loaded[name], values)

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        unpickled = _StandardUnpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
    storage = ("storage", "torch.FloatStorage", "0", "cpu", 24)
    assert unpickled["layers.0.weight"] == [storage, 0, (2, 3, 4), (12, 4, 1), False, {}]
    # torchvision's MNASNet requires a version for the whole network, 1 or 2.
    assert unpickled._metadata[""] == {"version": 2}
    assert unpickled._metadata["layers.0"] == {"version": 1}
    assert unpickled._metadata["layers.1"] == {"version": 2}


# ------------------------------------------------------------------ attacks


def archive(pickled: bytes, storages: dict[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
    """Returns a file in zip format."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as members:
        members.writestr("x/data.pkl", pickled)
        for key, content in storages.items():
            members.writestr(f"x/data/{key}", content)
    return buffer.getvalue()


def legacy(pickled: bytes, keys: list, tail: bytes, system: dict | None = None) -> bytes:
    """Returns a file in legacy format; `tail` follows the list of keys."""
    system = {"little_endian": True} if system is None else system
    before = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join([*before, pickled, pickle.dumps(keys, 2), tail])


def name(text: str) -> bytes:
    module, _, attribute = text.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def plain(value) -> bytes:
    """Returns a value's opcodes, without the first and last of its pickle."""
    return pickle.dumps(value, 2)[2:-1]


def storage(kind="torch.FloatStorage", key="0", count=4) -> bytes:
    return b"(" + plain("storage") + name(kind) + plain(key) + plain("cpu") + plain(count) + b"tQ"


def tensor(*, offset=0, shape=(2, 2), strides=(2, 1), of: bytes | None = None) -> bytes:
    arguments = (of or storage()) + plain(offset) + plain(shape) + plain(strides)
    rebuild = name("torch._utils._rebuild_tensor_v2")
    return rebuild + b"(" + arguments + plain(False) + b"}tR"


def state(*tensors: bytes) -> bytes:
    items = [plain(f"t{number}") + value for number, value in enumerate(tensors)]
    return b"\x80\x02}(" + b"".join(items) + b"u."


NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def test_the_attacks_begin_from_files_that_are_read(tmp_path):
    """The unchanged files are valid, so each attack is refused for its own fault."""
    path = tmp_path / "w.pth"
    for content in (
        archive(state(tensor()), {"0": NUMBERS}),
        legacy(state(tensor()), ["0"], struct.pack("<q", 4) + NUMBERS),
    ):
        path.write_bytes(content)
        assert pth.read(path)["t0"].tolist() == [[0, 1], [2, 3]]


def test_a_file_of_python_2_is_read(tmp_path):
    """PyTorch 0.1 to 0.3 wrote such files.

    They have bytes for text, an OrderedDict of pairs, the first rebuild function, and longs.
    """
    text = lambda value: b"U" + bytes([len(value)]) + value.encode()
    stored = b"(" + text("storage") + name("torch.FloatStorage") + text("9")
    stored += text("cuda:0") + b"\x8a\x01\x04" + b"NtQ"
    rebuilt = name("torch._utils._rebuild_tensor") + b"(" + stored + b"K\x00"
    rebuilt += b"K\x02K\x02\x86" + b"K\x02K\x01\x86" + b"tR"
    pairs = b"](](" + text("fc.weight") + rebuilt + b"ee"
    pickled = b"\x80\x02" + name("collections.OrderedDict") + pairs + b"\x85R."
    path = tmp_path / "w.pth"
    path.write_bytes(legacy(pickled, ["9"], struct.pack("<q", 4) + NUMBERS))
    assert pth.read(path)["fc.weight"].tolist() == [[0, 1], [2, 3]]


def calls(function: str, argument) -> bytes:
    return b"\x80\x02" + name(function) + b"(" + plain(argument) + b"tR."


def checkpoint(**others: bytes) -> bytes:
    """Returns a pickle of a state dict under `model`, and of others' opcodes by name."""
    items = {"model": state(tensor())[2:-1], **others}
    pairs = b"".join(plain(key) + value for key, value in items.items())
    return b"\x80\x02}(" + pairs + b"u."


# Opcodes of a value x = ((x, x), (x, x), ...): 2**200 leaves in 600 bytes.
DOUBLED = b"K\x01" + b"q\x00h\x00\x86" * 200

# What a checkpoint may hold beside its weights, as opcodes.
OTHERS = {
    # The state of MultiStepLR counts its milestones in one.
    "a counter": plain({"milestones": collections.Counter([30, 30, 60]), "gamma": 0.1}),
    # As torchvision's references/classification/train.py saves them.
    "options": plain(argparse.Namespace(lr=0.1, device="cuda", resume=None, milestones=[-1, 60])),
    "collections": plain(
        [collections.deque([1, 2]), collections.defaultdict(int, a=1), {"a", "b"}, b"bytes"]
    ),
    "objects": plain([pathlib.PurePosixPath("a"), collections.UserList([1]), range(3)]),
    "numbers of NumPy": plain([np.float64(0.75), np.arange(3), np.float32(1), np.bool_(True)]),
    "a function": name("torch.optim.lr_scheduler.LambdaLR"),
    # PyTorch before 1.6 named parameters by their addresses in memory.
    "an optimizer of PyTorch 1.5": plain({"param_groups": [{"lr": 0.1, "params": [2**47 - 16]}]})
    + plain("state")
    + b"}"
    + plain(2**47 - 16)
    + b"}"
    + plain("momentum_buffer")
    + tensor()
    + b"sss",
    "keys that are not text": plain({0.5: 1, None: 2, True: 3, frozenset: 4, -1: 5, (1, 2): 6}),
    # Hashing these would take forever or overflow the stack.
    "a deep key": b"}K\x01" + b"\x85" * 100_000 + b"K\x01s",
    "a key of 2**200 leaves": b"}" + DOUBLED + b"K\x01s",
    "colliding keys": plain(dict.fromkeys(number * (2**61 - 1) for number in range(1, 1000))),
    "an attack": calls("os.system", "touch ran")[2:-1],
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_a_checkpoint_holds_beside_the_weights_is_passed_over(
    kind, other, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    pickled = checkpoint(before=OTHERS[other], epoch=plain(3), after=OTHERS[other])
    if kind == "zip":
        path.write_bytes(archive(pickled, {"0": NUMBERS}))
    else:
        path.write_bytes(legacy(pickled, ["0"], struct.pack("<q", 4) + NUMBERS))
    assert weights.read(path)["t0"].tolist() == [[0, 1], [2, 3]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "keys", [("net",), ("model", "state_dict"), ("net", "model"), ("state_dict", "state_dict")]
)
def test_wrappers_are_taken_off(keys, tmp_path):
    pickled = state(tensor())[2:-1]
    for key in reversed(keys):
        pickled = b"}(" + plain("epoch") + b"K\x01" + plain(key) + pickled + b"u"
    path = tmp_path / "w.pth"
    path.write_bytes(archive(b"\x80\x02" + pickled + b".", {"0": NUMBERS}))
    assert list(weights.read(path)) == ["t0"]


def test_weights_under_another_key_are_refused_with_the_keys_that_are_read(tmp_path):
    path = tmp_path / "w.pth"
    pickled = b"\x80\x02}" + plain("encoder") + state(tensor())[2:-1] + b"s."
    path.write_bytes(archive(pickled, {"0": NUMBERS}))
    message = (
        "expected tensors, alone or under one of the keys state_dict, model_state_dict, model, "
        "net; 'encoder' is a dict"
    )
    with pytest.raises(ValueError, match=message):
        weights.read(path)


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"\x80\x02X\x20\x00\x00\x00abc", "the pickle is cut short"),
        (b"\x80\x02X" + struct.pack("<I", 1 << 20) + bytes(1 << 20), "is longer than 1 MiB, more"),
    ],
)
def test_a_pickle_that_is_cut_short_is_told_from_one_that_is_too_long(
    pickled, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(unpickling, "_MOST_PICKLE_BYTES", 1 << 20)
    path = tmp_path / "w.pth"
    path.write_bytes(archive(pickled, {}))
    with pytest.raises(ValueError, match=message):
        weights.read(path)


@pytest.mark.parametrize(
    "pickled, message",
    [
        (state(tensor(), OTHERS["an attack"]), "'t1' is 'os.system', and only tensors are read"),
        (checkpoint(model=OTHERS["options"]), "it holds 'argparse.Namespace', and only tensors"),
        (checkpoint(model=plain({"a": np.float64(1)})), r"'a' is 'numpy[\w.]*\.scalar', and only"),
    ],
    ids=["a call", "options", "a number"],
)
def test_objects_in_place_of_weights_are_named(pickled, message, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(archive(pickled, {"0": NUMBERS}))
    with pytest.raises(ValueError, match=f"{message}.*; save model.state_dict.. alone"):
        weights.read(path)


PICKLES = {
    "os.system": calls("os.system", "touch ran"),
    "posix.system": calls("posix.system", "touch ran"),
    "eval": calls("builtins.eval", "open('ran', 'w')"),
    "getattr": calls("builtins.getattr", "x"),
    "popen": calls("subprocess.Popen", "touch ran"),
    "torch.load": calls("torch.load", "x"),
    "bytes as a storage": calls("torch.storage._load_from_bytes", "x"),
    "a module of torch": calls("torch.hub.load", "x"),
    "a dotted name": b"\x80\x02ctorch\n_utils._rebuild_tensor_v2.__globals__\n.",
    "codecs": calls("_codecs.encode", "x"),
    "a long name": b"\x80\x02c" + b"a" * 10_000 + b"\nb\n.",
    "INST": b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.",
    "OBJ": b"\x80\x02(" + name("collections.OrderedDict") + b"o.",
    "NEWOBJ": b"\x80\x02" + name("collections.OrderedDict") + b")\x81.",
    "NEWOBJ_EX": b"\x80\x04" + name("collections.OrderedDict") + b")}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "EXT1": b"\x80\x02\x82\x01.",
    "PERSID": b"\x80\x02Pos.system\n.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call of a constant": b"\x80\x02" + name("torch.float32") + b")R.",
    "a call of a storage": b"\x80\x02" + name("torch.FloatStorage") + b")R.",
    "a call without a tuple": b"\x80\x02" + name("collections.OrderedDict") + b"]R.",
    "attributes of a tensor": state(tensor() + b"}b"),
    "attributes of a name": b"\x80\x02" + name("torch.Size") + b"}b.",
    "a memo of 2**32": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "a number of many digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    "a value of 2**200 leaves": state(DOUBLED),
    "300,000 marks": b"\x80\x02" + b"(" * 300_000,
    "two million dictionaries": b"\x80\x02" + b"}" * 2_000_000 + b".",
    "no end": b"\x80\x02}",
    "no value": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "a value never stored": b"\x80\x02h\x05.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a tensor alone": b"\x80\x02" + tensor() + b".",
    "a number in place of a tensor": state(b"K\x01"),
    "a name in place of a tensor": state(name("torch.float32")),
    "a key with an escape": b"\x80\x02}" + plain("a\n\x1b[31mb") + tensor() + b"s.",
    "a wrapper that holds itself": b"\x80\x02}q\x00" + plain("model") + b"h\x00s.",
    "one key of two wrappers": b"\x80\x02}("
    + plain("module.a")
    + tensor()
    + plain("module.a.num_batches_tracked")
    + b"Nu.",
    "an offset beyond": state(tensor(offset=1)),
    "a negative offset": state(tensor(offset=-1)),
    "a huge offset": state(tensor(offset=2**61)),
    "a shape beyond": state(tensor(shape=(3, 2))),
    "a huge shape": state(tensor(shape=(2**61, 2**61))),
    "a negative shape": state(tensor(shape=(-2, 2))),
    "a stride beyond": state(tensor(strides=(3, 1))),
    "a negative stride": state(tensor(offset=3, strides=(-2, -1))),
    "a number repeated without end": state(tensor(shape=(2**40, 2**20), strides=(0, 0))),
    "too few strides": state(tensor(strides=(1,))),
    "fractional strides": state(tensor(strides=(2.0, 1.0))),
    "a shape of truth values": state(tensor(shape=(True, True))),
    "a thousand dimensions": state(tensor(shape=(1,) * 1000, strides=(1,) * 1000)),
    "an empty tensor of huge dimensions": state(tensor(shape=(0, 2**61, 2**61), strides=(1, 1, 1))),
    "a storage of another type": state(tensor(of=storage("torch.DoubleStorage"))),
    "a storage of two types": state(tensor(), tensor(of=storage("torch.IntStorage"))),
    "a storage of an unknown type": state(tensor(of=storage("torch.QInt8Storage"))),
    "a storage that is a function": state(tensor(of=storage("torch.Size"))),
    "a storage that is too large": state(tensor(of=storage(count=2**61))),
    "a storage outside the archive": state(tensor(of=storage(key="../../etc/passwd"))),
    "a storage without a name": state(tensor(of=b"(K\x01K\x01K\x01K\x01K\x01tQ")),
    "a reference to a number": b"\x80\x02K\x01Q.",
}


# It takes seconds to read these: each is read in one format only, as one interpreter reads both.
LONG = {"two million dictionaries": "zip"}


@pytest.mark.parametrize(
    "attack",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in PICKLES],
)
def test_pickles_that_attack(attack, tmp_path, monkeypatch):
    """Both formats are refused with one line, run nothing, and take little memory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    contents = {
        "zip": archive(PICKLES[attack], {"0": NUMBERS}),
        "legacy": legacy(PICKLES[attack], ["0"], struct.pack("<q", 4) + NUMBERS),
    }
    if attack in LONG:
        contents = {LONG[attack]: contents[LONG[attack]]}
    most_mb = 400
    if attack == "two million dictionaries":
        # A quarter of the limit takes a quarter of the time, and may take a quarter of the memory.
        quarter = 1 << 20
        most_mb *= quarter / unpickling._MOST_PICKLE_BYTES
        monkeypatch.setattr(unpickling, "_MOST_PICKLE_BYTES", quarter)
    watch = Watch(most_mb)
    for content in contents.values():
        path.write_bytes(content)
        watch(weights.read, path)
    watch.end()
    assert watch.refused == len(contents)
    assert list(tmp_path.iterdir()) == [path]


def overlapping() -> bytes:
    """Returns an archive whose members all share the same bytes: 64 MB in 1 MB."""
    content = bytearray(archive(state(tensor()), {"0": bytes(1 << 20)}))
    end = content.rindex(b"PK\x05\x06")
    directory = struct.unpack_from("<I", content, end + 16)[0]
    entries = content[directory:end]
    large = entries[entries.rindex(b"PK\x01\x02") :]
    copies = b"".join(large.replace(b"data/0", f"data/{n}".encode()) for n in "123456789") * 7
    made = content[:directory] + entries + copies
    struct.pack_into("<HH", content, end + 8, 65, 65)
    struct.pack_into("<I", content, end + 12, len(entries) + len(copies))
    return bytes(made + content[end:])


GOOD = archive(state(tensor()), {"0": NUMBERS})
COUNT = struct.pack("<q", 4)
# Made in their tests, since some take long to make.
FILES = {
    "nothing but a beginning": lambda: b"PK\x03\x04",
    "an empty archive's beginning": lambda: b"PK\x03\x04" + bytes(100),
    "a compressed member": lambda: archive(state(tensor()), {"0": NUMBERS}, zipfile.ZIP_DEFLATED),
    "a bomb": lambda: archive(state(tensor()), {"0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "overlapping members": overlapping,
    "a changed number": lambda: GOOD.replace(NUMBERS, NUMBERS[::-1]),
    "no storage": lambda: archive(state(tensor()), {}),
    "a short storage": lambda: archive(state(tensor()), {"0": NUMBERS[:-1]}),
    "a long storage": lambda: archive(state(tensor()), {"0": NUMBERS + b"\0"}),
    "another archive": lambda: GOOD.replace(b"x/data.pkl", b"x/data.pki"),
    "cut in the middle": lambda: GOOD[: len(GOOD) // 2],
    "a count of 2**63": lambda: legacy(state(tensor()), ["0"], struct.pack("<Q", 2**63) + NUMBERS),
    "a count beyond": lambda: legacy(state(tensor()), ["0"], struct.pack("<q", 5) + NUMBERS),
    "an unknown storage": lambda: legacy(state(tensor()), ["1"], COUNT + NUMBERS),
    "a storage twice": lambda: legacy(state(tensor()), ["0", "0"], (COUNT + NUMBERS) * 2),
    "a storage left out": lambda: legacy(state(tensor()), [], COUNT + NUMBERS),
    "keys that are numbers": lambda: legacy(state(tensor()), [0], COUNT + NUMBERS),
    "another byte order": lambda: legacy(
        state(tensor()), ["0"], COUNT + NUMBERS, {"little_endian": False}
    ),
    "nothing behind the number": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2),
}


@pytest.mark.parametrize("attack", FILES)
def test_files_that_attack(attack, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(FILES[attack]())
    watch = Watch(200)
    watch(weights.read, path)
    watch.end()
    assert watch.refused == 1
