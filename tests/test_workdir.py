"""Work directories: complete files, one configuration, and one process."""

import errno
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import matplotlib.figure
import ml_collections
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax.position import report
from cnnjax.runtime import claims, files, workdir
from cnnjax.runtime import report as footers


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write(path, "new"),
        lambda path: files.write_json(path, {"a": 1}),
        lambda path: quick.write_figure(path, matplotlib.figure.Figure((1, 1))),
    ],
)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_appears_whole_or_not_at_all(write, error, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("old")
    whole = pathlib.Path.write_bytes

    def fails_half_way(self, content):
        whole(self, content[: len(content) // 2])
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(pathlib.Path, "write_bytes", fails_half_way)
        write(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "old")]
    write(path)
    assert path.read_bytes()[:3] != b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So a power failure leaves no empty file; some file systems cannot sync a folder."""
    events = []
    fsync = os.fsync
    replace = pathlib.Path.replace

    def record_fsync(descriptor):
        synced = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        if synced == tmp_path:
            events.append("folder")
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        events.append(synced.read_text())

    def record_replace(path, target):
        events.append(f"renamed to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(pathlib.Path, "replace", record_replace)
    files.write(tmp_path / "results.json", "content")
    assert events == ["content", "renamed to results.json", "folder"]
    assert (tmp_path / "results.json").read_text() == "content"


def test_a_disk_that_fails_late_keeps_the_old_file(tmp_path, monkeypatch):
    """Some file systems report a full disk only when a file is synced."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "kept"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device: .*kept"):
        files.write(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "old")]


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    files.write(tmp_path / "table.md", os.fsdecode(b"caf\xe9.jpg"))
    assert (tmp_path / "table.md").read_bytes() == rb"caf\udce9.jpg"


def test_a_figure_is_cropped_to_what_it_shows(tmp_path):
    figure = matplotlib.figure.Figure((4, 3))
    figure.text(0.5, 0.5, "A title\nof $n=3$ seeds")
    quick.write_figure(tmp_path / "figure.png", figure)
    with PIL.Image.open(tmp_path / "figure.png") as picture:
        width, height = picture.size
        assert 50 < width < 200 and 30 < height < 150
        assert np.asarray(picture.convert("L")).min() == 0


def test_json_has_no_nan(tmp_path):
    with pytest.raises(FloatingPointError, match="a.json: a number is not finite"):
        files.write_json(tmp_path / "a.json", {"spc": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_holds_what_is_converted_to_it(tmp_path):
    value = {"rows": [np.arange(2), (np.float32(0.5), np.int64(3))], "name": None}
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(tmp_path / "a.json", value)
    files.write_json(tmp_path / "a.json", value, default=lambda array: array.tolist())
    assert files.read_json(tmp_path / "a.json") == {"rows": [[0, 1], [0.5, 3]], "name": None}


def test_the_environments_of_a_run_started_several_times_are_all_recorded(tmp_path, monkeypatch):
    file = tmp_path / "environment.json"

    def prepare(revision, computes=True):
        monkeypatch.setattr(workdir, "_git_revision", lambda: revision)
        workdir.prepare(tmp_path, {"seed": 0}, computes)
        recorded = json.loads(file.read_text())
        starts = [*recorded.get("earlier", []), recorded]
        return [start["git_revision"] for start in starts]

    assert prepare("a") == ["a"]
    # The first start computed nothing, so it is not recorded.
    assert prepare("b") == ["b"]
    (tmp_path / "metrics.jsonl").touch()
    assert prepare("b") == ["b"]
    assert prepare("c") == ["b", "c"]
    assert prepare("c") == ["b", "c"]
    # A job may be requeued on two kinds of machines in turn.
    assert prepare("b") == ["c", "b"]
    assert prepare("d") == ["c", "b", "d"]
    (tmp_path / "results.json").touch()
    assert prepare("e", computes=False) == ["c", "b", "d"]

    environment = json.loads(file.read_text())
    text = footers.footer(footers.Finished({}, environment, {"seconds": 3}))
    revisions = re.findall("^(An earlier start)?.*revision ([a-e])", text, re.MULTILINE)
    assert revisions == [("", "d"), ("An earlier start", "c"), ("An earlier start", "b")]

    (tmp_path / "results.json").unlink()
    for damaged in ("{ torn", "{}", "[]", "null", '{"earlier": null}', '{"earlier": [1, {}]}'):
        file.write_text(damaged)
        assert prepare("e") == ["e"]


def test_a_directory_belongs_to_one_configuration(tmp_path):
    config = {"seed": 0, "paddings": ("zeros", "none"), "nested": {"a": 1}}
    folder = workdir.prepare(tmp_path / "new" / "run", config)
    assert workdir.prepare(folder, config) == folder
    assert json.loads((folder / "environment.json").read_text())["seed"] == 0
    (folder / "results.json").write_text("{}")
    (folder / "environment.json").write_text("what made the results")
    assert (
        workdir.prepare(folder, config, computes=False) == folder
        and (folder / "environment.json").read_text() == "what made the results"
    )
    for change, message in (
        ({"seed": 1}, "seed=0 there, 1 now"),
        ({"paddings": ("zeros",)}, r"paddings=\['zeros', 'none'\] there, \['zeros'\] now"),
        ({"nested": {"a": 2}}, "nested.a=1 there, 2 now"),
        ({"extra": 3}, "extra=None there, 3 now"),
    ):
        with pytest.raises(
            ValueError,
            match=f"holds a run of another configuration \\({message}\\); choose another --workdir",
        ):
            workdir.prepare(folder, config | change)
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(config))
    (folder / "config.json").write_text("{ torn")
    with pytest.raises(ValueError, match="holds a config.json that is not JSON"):
        workdir.prepare(folder, config)


def test_a_refusal_lists_what_differs(tmp_path):
    """Another `data_dir`, which is seldom the reason, comes last."""
    config = {"data_dir": "there", "seed": 0, "steps": 1, "width": 1, "zoom": 1}
    workdir.prepare(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    for change, listed in (
        ({"data_dir": "here"}, "data_dir='there' there, 'here' now"),
        (
            {"data_dir": "here", "seed": 1},
            "seed=0 there, 1 now; data_dir='there' there, 'here' now",
        ),
        # A key that the record lacks is named where no recorded one is the reason.
        (
            {"data_dir": "here", "extra": 1},
            "extra=None there, 1 now; data_dir='there' there, 'here' now",
        ),
        ({"seed": 1, "extra": 1}, "seed=0 there, 1 now"),
        ({"seed": 1, "steps": 2}, "seed=0 there, 1 now; steps=1 there, 2 now"),
        (
            {"data_dir": "here", "seed": 1, "steps": 2, "width": 2, "zoom": 2},
            "seed=0 there, 1 now; steps=1 there, 2 now; width=1 there, 2 now; and 2 more",
        ),
    ):
        with pytest.raises(workdir.OtherConfiguration, match=rf"configuration \({listed}\); "):
            workdir.prepare(tmp_path, config | change)


@pytest.mark.parametrize(
    "recorded, name",
    [
        ({"kind": "train", "accumulate": 1}, "a training run"),
        ({"kind": "position"}, "a position study"),
        ({"kind": "combine"}, "a combination of runs"),
        ({"command": "occlusion"}, "a run of the command 'occlusion'"),
        (
            {"kind": "dance"},
            r"a run of another configuration \(kind='dance' there, .*\)",
        ),
    ],
)
def test_a_refusal_names_the_command_of_a_folder(recorded, name, tmp_path):
    workdir.prepare(tmp_path, recorded)
    (tmp_path / "results.json").touch()
    message = f"^workdir='{tmp_path}' holds {name}; choose another --workdir$"
    with pytest.raises(workdir.OtherConfiguration, match=message):
        workdir.prepare(tmp_path, {"kind": "other", "command": "another", "size": 3})


def test_a_file_is_no_work_directory(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("mine")

    def begin():
        with workdir.prepared(file, {}):
            pytest.fail("the work began")

    message = f"^workdir='{file}' is a file; expected a folder$"
    for use in (begin, lambda: workdir.prepare(file, {})):
        with pytest.raises(ValueError, match=message):
            use()
    assert file.read_text() == "mine"


def test_a_report_needs_results(tmp_path):
    with pytest.raises(
        ValueError,
        match="has no config.json, environment.json, results.json: there is no finished run to "
        "report on",
    ):
        report.write(tmp_path)
    for name in ("config", "environment"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "results.json").write_text('{"kind": "dance"}')
    with pytest.raises(ValueError, match="kind='dance' of .*results.json is not 'position'"):
        report.write(tmp_path)


def finish(config, folder):
    files.write_json(folder / "results.json", {})


def test_only_what_runs_write_is_sealed(tmp_path):
    """Other files may change; a manifest of before, which has their hashes, too, stays valid."""
    config = ml_collections.ConfigDict({"kind": "train"})
    foreign = ("sweep.json", "notes.json", "._results.json")
    for name in foreign:
        (tmp_path / name).write_text("{}")
    workdir.run_once(finish, config, tmp_path)
    manifest = tmp_path / "manifest.json"
    sealed = json.loads(manifest.read_text())
    assert sorted(sealed) == ["environment.json", "results.json"]
    manifest.write_text(json.dumps(sealed | {"sweep.json": "the hash of before"}))
    for name in foreign:
        (tmp_path / name).unlink()
        workdir.run_once(finish, config, tmp_path)
    # The seal of a finished run is not renewed.
    assert "sweep.json" in json.loads(manifest.read_text())
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="results.json is not as it was written"):
        workdir.run_once(finish, config, tmp_path)


def test_a_damaged_list_of_earlier_scores_can_be_given_up(tmp_path):
    config = ml_collections.ConfigDict({"kind": "train"})
    workdir.prepare(tmp_path, config.to_dict())
    files.write_json(tmp_path / "extended.json", [{"epoch": 1}])
    workdir.run_once(finish, config, tmp_path)
    (tmp_path / "extended.json").write_text("[]")
    advice = "the same scores; remove extended.json and manifest.json$"
    with pytest.raises(ValueError, match=advice):
        workdir.run_once(finish, config, tmp_path)
    for name in ("extended.json", "manifest.json"):
        (tmp_path / name).unlink()
    workdir.run_once(finish, config, tmp_path)


def test_a_failed_run_that_begins_again_has_not_failed(tmp_path):
    """A sweep leaves the record of a failure, and does not start the run again."""
    config = ml_collections.ConfigDict({"kind": "train"})
    folder = workdir.prepare(tmp_path, config.to_dict())
    failure = folder / "failure.json"
    failure.write_text("{}")

    def stop(config, folder):
        raise workdir.Interrupted

    with pytest.raises(workdir.OtherConfiguration):
        workdir.run_once(stop, ml_collections.ConfigDict({"kind": "position"}), folder)
    assert failure.exists()

    def refuse(config, folder):
        raise ValueError

    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError):
        workdir.run_once(refuse, config, folder)
    assert failure.exists()
    with pytest.raises(workdir.Interrupted):
        workdir.run_once(stop, config, folder)
    assert not failure.exists()


def test_results_that_no_run_wrote_are_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text("{}")
    config = ml_collections.ConfigDict({"kind": "train"})
    message = (
        f"^workdir='{tmp_path}' holds results.json of something else; remove it or choose another"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            workdir.run_once(pytest.fail, config, tmp_path, adopt=pytest.fail)
        assert list(tmp_path.iterdir()) == [file]
    # The user removed a damaged config.json, as `check_config` advises.
    file.unlink()
    workdir.prepare(tmp_path, config.to_dict())
    (tmp_path / "config.json").unlink()
    file.write_text("{}")
    assert workdir.run_once(pytest.fail, config, tmp_path) == {}


@pytest.mark.parametrize(
    "name, content",
    [
        ("results.json", "{}"),
        ("manifest.json", "{}"),
        ("failure.json", "{}"),
        ("weights.safetensors", ""),
        ("report.md", "mine"),
        ("environment.json", '{"mine": 1}'),
        ("environment.json", "name: mine"),
        ("tensorboard/events.out.tfevents.1", ""),
        ("config.json", '{"model_type": "resnet"}'),
        ("config.json", "[]"),
        ("config.json", "{ torn"),
    ],
)
def test_files_that_no_run_wrote_stay_as_they_are(name, content, tmp_path):
    """Also beside a log, which starts no run."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    (tmp_path / "train.log").touch()
    before = sorted(tmp_path.rglob("*"))
    config = {"kind": "train", "seed": 0}
    message = f"^workdir='{tmp_path}' holds {name} of something else; remove it or choose "
    message += "another --workdir$"
    with pytest.raises(ValueError, match=message):
        workdir.run_once(pytest.fail, ml_collections.ConfigDict(config), tmp_path)
    with pytest.raises(ValueError, match=message), workdir.prepared(tmp_path, config):
        pytest.fail("the work began")
    assert sorted(tmp_path.rglob("*")) == before and file.read_text() == content
    # What a process left that was killed before it recorded its environment.
    file.unlink()
    (tmp_path / "config.json").write_text('{"kind": "train", "seed": 1}')
    with workdir.prepared(tmp_path, config):
        assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("name", ["log.txt", ".DS_Store", "seed=0/config.json"])
def test_a_refused_run_leaves_a_folder_as_it_was(name, tmp_path):
    """So the corrected command, which has another configuration, is not refused."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()

    def refuse(config, folder):
        raise ValueError("batch_size=1000000 is more than the 1437 training images")

    before = sorted(tmp_path.rglob("*"))
    wrong = {"kind": "train", "batch_size": 1_000_000}
    with pytest.raises(ValueError, match="batch_size"):
        workdir.run_once(refuse, ml_collections.ConfigDict(wrong), tmp_path)
    with pytest.raises(ValueError, match="batch_size"), workdir.prepared(tmp_path, wrong):
        refuse(wrong, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    right = ml_collections.ConfigDict({"kind": "train", "batch_size": 100})
    workdir.run_once(finish, right, tmp_path)
    # What a run has recorded stays if it is refused later.
    (tmp_path / "results.json").rename(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="batch_size"):
        workdir.run_once(refuse, right, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 100


def test_a_refused_start_leaves_the_record_of_those_before(tmp_path, monkeypatch):
    """It has measured nothing."""
    config = ml_collections.ConfigDict({"kind": "train"})
    workdir.run_once(finish, config, tmp_path)
    (tmp_path / "results.json").rename(tmp_path / "metrics.jsonl")
    record = {}
    for name in ("config.json", "environment.json", "manifest.json"):
        record[name] = (tmp_path / name).read_bytes()
    monkeypatch.setattr(workdir, "_git_revision", lambda: "a later one")

    def adopt(config, folder):
        files.write_json(folder / "config.json", config.to_dict() | {"data_dir": "elsewhere"})

    def refuse(config, folder):
        raise FileNotFoundError("data_dir='absent' does not exist")

    with pytest.raises(FileNotFoundError):
        workdir.run_once(refuse, config, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        workdir.run_once(refuse, config, tmp_path, adopt)
    assert all((tmp_path / name).read_bytes() == content for name, content in record.items())

    def measure(config, folder):
        files.write(folder / "metrics.jsonl", "one more epoch")
        raise ValueError("a.jpg is not a readable image")

    # What has measured is recorded, whatever ends it.
    with pytest.raises(ValueError, match="readable"):
        workdir.run_once(measure, config, tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["git_revision"] == "a later one" and len(environment["earlier"]) == 1


@pytest.mark.parametrize("name", ["log.txt", "train.log", "nohup.out", "slurm-7.err", ".DS_Store"])
def test_a_log_starts_no_run(name, tmp_path):
    """So a smaller batch is accepted after one that did not fit into memory."""
    (tmp_path / name).touch()

    def run(config, folder):
        raise MemoryError

    for size in (1_000_000, 100):
        config = ml_collections.ConfigDict({"kind": "train", "batch_size": size})
        with pytest.raises(MemoryError):
            workdir.run_once(run, config, tmp_path)


def test_a_call_that_computes_nothing_keeps_the_record(tmp_path):
    """It is not bound to the files and the machine that made the results."""
    config = {"size": 3}
    measured = config | {"contents": {"photographs": "13 files"}, "environment": {"jax": "1"}}
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "0.json").touch()
    # Earlier versions wrote a results.json.
    (tmp_path / "results.json").touch()
    for recorded in (config, measured):
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        now = measured | {"contents": {}, "environment": {"jax": "2"}}
        with workdir.prepared(tmp_path, now, computes=False):
            assert json.loads((tmp_path / "config.json").read_text()) == recorded
    assert not (tmp_path / "environment.json").exists()
    with (
        pytest.raises(ValueError, match="environment.jax='1' there, '2' now"),
        workdir.prepared(tmp_path, now | {"contents": measured["contents"]}, computes=True),
    ):
        pass
    with workdir.prepared(tmp_path, measured, computes=True):
        assert (tmp_path / "environment.json").exists()


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    """A package that is installed in the folder of another project is of no commit."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=theirs")
    file = tmp_path / "workdir.py"
    file.touch()
    monkeypatch.setattr(workdir, "__file__", str(file))
    read_revision = workdir._git_revision.__wrapped__
    assert read_revision() is None
    git("add", "workdir.py")
    git("commit", "--quiet", "--message=ours")
    assert re.fullmatch("[0-9a-f]{40}", read_revision())


# ------------------------------------------------------------------ claims


HERE = {"host": platform.node(), "process": os.getpid()}
# The process number is above the largest possible one.
GONE = {"host": platform.node(), "process": 2**22 + 1}


@pytest.mark.parametrize("left", [None, GONE], ids=["free", "void"])
def test_one_process_at_a_time(left, tmp_path):
    """A second process is refused; of six at once, one gets in. No claim file remains."""
    code = """
import pathlib, sys
from cnnjax.runtime import claims
print("ready", flush=True)
sys.stdin.readline()
try:
    with claims.claim(pathlib.Path(sys.argv[1])):
        print("in", flush=True)
        sys.stdin.readline()
except claims.Claimed as error:
    print(error, flush=True)
"""
    with (
        claims.claim(tmp_path),
        pytest.raises(claims.Claimed, match=f"in use by process {os.getpid()} on "),
    ):
        claims.claim(tmp_path).__enter__()
    if left:
        (tmp_path / "run.claim").write_text(json.dumps(left))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 6
    # All go on at once, and the one that gets in stays until the others have been refused.
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = sorted(process.stdout.readline() for process in processes)
    for process in processes:
        process.communicate()
    assert outputs[0] == "in\n"
    assert all("is in use by process" in line for line in outputs[1:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "held, idle, void",
    [
        (GONE, 0, True),
        # A container has its own process numbers.
        (GONE | {"namespace": "pid:[1]"}, 0, False),
        (GONE | {"namespace": "pid:[1]"}, 130, True),
        # Another machine may have the name of this one.
        (GONE | {"boot": "another"}, 0, False),
        (GONE | {"boot": "another"}, 130, True),
        (HERE, 0, False),
        # An earlier version's: another process may have the number by now.
        (HERE, 130, True),
        # A process that is suspended by Ctrl-Z does not renew its claim.
        (HERE | {"started": claims._started_at(os.getpid())}, 130, False),
        (HERE | {"started": 1}, 0, True),
        ({"host": "elsewhere", "process": 1}, 100, False),
        ({"host": "elsewhere", "process": 1}, 130, True),
        # The clock was set back.
        ({"host": "elsewhere", "process": 1}, -1000, False),
    ],
)
def test_what_its_holder_left_is_void(held, idle, void, tmp_path):
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(held))
    os.utime(path, (time.time() - idle,) * 2)
    if void:
        with claims.claim(tmp_path):
            assert json.loads(path.read_text())["process"] == os.getpid()
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(claims.Claimed), claims.claim(tmp_path):
            pass
        assert [file.name for file in tmp_path.iterdir()] == ["run.claim"]


@pytest.mark.parametrize("hidden", [PermissionError, FileNotFoundError], ids=["1", "2"])
def test_a_process_that_proc_hides_keeps_its_claim(hidden, tmp_path, monkeypatch):
    """With hidepid=1 or hidepid=2, /proc shows no processes of other users."""
    path = tmp_path / "run.claim"
    parent = {"host": platform.node(), "process": os.getppid()}
    path.write_text(json.dumps(parent | {"started": claims._started_at(os.getppid())}))
    read_bytes = pathlib.Path.read_bytes

    def read(path):
        if str(path) == f"/proc/{os.getppid()}/stat":
            raise hidden
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read)
    with pytest.raises(claims.Claimed), claims.claim(tmp_path):
        pass


def test_the_proc_of_another_namespace_tells_nothing(tmp_path, monkeypatch):
    """After `unshare --pid`, /proc may have the numbers of the outer namespace."""
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(HERE | {"started": 1}))
    readlink = os.readlink
    links = lambda path: "1" if path == "/proc/self" else readlink(path)
    monkeypatch.setattr(os, "readlink", links)
    with pytest.raises(claims.Claimed) as refusal, claims.claim(tmp_path):
        pass
    # The number may be another process's by now, so nobody is told to end it.
    assert "kill" not in str(refusal.value)
    os.utime(path, (time.time() - 130,) * 2)
    with claims.claim(tmp_path):
        assert json.loads(path.read_text())["started"] is None


def test_only_a_process_of_this_machine_is_to_be_ended(tmp_path):
    hint = (
        f"if it is suspended, continue it with fg; if it hangs, end it with kill -9 {os.getpid()}"
    )
    with (
        claims.claim(tmp_path),
        pytest.raises(claims.Claimed, match=hint),
    ):
        claims.claim(tmp_path).__enter__()
    (tmp_path / "run.claim").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    with pytest.raises(claims.Claimed, match="1 on elsewhere; wait for it, or choose another"):
        claims.claim(tmp_path).__enter__()


def test_a_claim_that_replaced_a_void_one_stays(tmp_path):
    """Two processes may find a claim void; one must not remove the other's new claim."""
    path = tmp_path / "run.claim"
    path.write_text("another's")
    claims._remove_stale(path, b"void", tmp_path / ".mine.claim")
    assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]
    claims._remove_stale(path, b"another's", tmp_path / ".mine.claim")
    assert not list(tmp_path.iterdir())


def test_claims_where_a_file_has_one_name(tmp_path, monkeypatch):
    """exFAT and some network file systems have no hard links."""

    def link(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(claims, "_RENEWAL_SECONDS", 0.05)
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(GONE))
    with claims.claim(tmp_path):
        with pytest.raises(claims.Claimed, match=f"in use by process {os.getpid()} on "):
            claims.claim(tmp_path).__enter__()
        wait_for_a_renewal(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [None, GONE], ids=["free", "void"])
def test_a_claim_whose_reply_was_lost_is_held(left, tmp_path, monkeypatch):
    """NFS repeats a request whose reply was lost, and so reports that it failed."""
    link = os.link
    rename = pathlib.Path.rename

    def link_and_fail(*arguments):
        link(*arguments)
        raise FileExistsError

    def rename_and_fail(*arguments):
        rename(*arguments)
        raise FileNotFoundError

    monkeypatch.setattr(os, "link", link_and_fail)
    monkeypatch.setattr(pathlib.Path, "rename", rename_and_fail)
    path = tmp_path / "run.claim"
    if left:
        path.write_text(json.dumps(left))
    with claims.claim(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
        # Another claim of this process is another's.
        with pytest.raises(claims.Claimed, match=f"in use by process {os.getpid()} on "):
            claims.claim(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def wait_for_a_renewal(claim: pathlib.Path):
    """Sets a held claim's time back and waits until it is renewed."""
    os.utime(claim, (0, 0))
    deadline = time.monotonic() + 30
    while time.time() - claim.stat().st_mtime > 60:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    """The folder is removed even if the run has made a folder for its checkpoints."""
    folder = tmp_path / "run"

    def refuse(config, folder):
        (folder / "checkpoints").mkdir()
        raise ValueError("resize=100 is too small")

    for _ in range(2):
        with pytest.raises(ValueError, match="resize=100"):
            workdir.run_once(refuse, ml_collections.ConfigDict({"kind": "train"}), folder)
        assert not folder.exists()


def test_what_a_killed_process_leaves_before_it_starts_binds_no_run(tmp_path):
    first, second = ({"kind": "train", "seed": seed} for seed in (0, 1))
    workdir.prepare(tmp_path, first)
    for name in ("run.claim", ".1a.claim", ".1a.void", ".metrics.jsonl.1a.partial"):
        (tmp_path / name).write_text("{")
    workdir.prepare(tmp_path, second)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="seed"):
        workdir.prepare(tmp_path, first)


def test_a_claim_is_renewed_and_anothers_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_RENEWAL_SECONDS", 0.05)
    path = tmp_path / "run.claim"
    with claims.claim(tmp_path):
        wait_for_a_renewal(path)
        claims.check_held(tmp_path)
        path.unlink()
        # Another process has found this claim void, say after a long sleep of this machine.
        with pytest.raises(claims.Lost, match="has been taken over"):
            claims.check_held(tmp_path)
        path.write_text("another's")
        with pytest.raises(claims.Lost):
            claims.check_held(tmp_path)
    # This process has no claim that it could have lost.
    claims.check_held(tmp_path)
    assert path.read_text() == "another's" and len(list(tmp_path.iterdir())) == 1
