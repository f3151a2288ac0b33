"""Ensembles and soups, compared with NumPy, brute force, and single networks."""

import functools
import json
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import classifier, combine, transfer, weights
from cnnjax.combine import combination, runs
from cnnjax.combine.methods import ENSEMBLES
from cnnjax.data import arrays
from cnnjax.models import Network, base
from cnnjax.nn import BatchNorm, Conv, Dense, flatten, global_avg_pool, max_pool
from cnnjax.runtime import files, workdir
from cnnjax.train import defaults, evaluate, loop
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.data import digest_arrays
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import open_run, read_config
from cnnjax.train.training import build_run

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parents[1]
WAYS = pytest.mark.parametrize("way", ["jit", "pmap", "shard_map"])


class Tiny(Network):
    """Two convolutions with BatchNorm."""

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        for number in (1, 2):
            x = Conv(6, 3, fill=self.padding, name=f"conv{number}")(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, name=f"bn{number}")(x, train))
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def some(model: Network, seed: int) -> dict:
    """Returns variables of random numbers, batch statistics included."""
    variables = jax.eval_shape(
        model.clone(axis_name=None).init, jax.random.key(0), jnp.zeros((1, *model.input_shape))
    )
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: generator.uniform(0.1, 0.5, leaf.shape).astype(np.float32), variables
    )


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)


# ------------------------------------------------------------------ pure functions


def test_an_average_is_numpys():
    generator = np.random.default_rng(0)
    trees = [
        {
            "a": {"kernel": generator.normal(size=(3, 2)).astype(np.float32)},
            "b": {"c": {"bias": generator.normal(size=4).astype(np.float32)}},
        }
        for _ in range(3)
    ]
    average = combine.average(trees, [0.5, 0.2, 0.3])
    np.testing.assert_allclose(
        average["a"]["kernel"],
        sum(w * tree["a"]["kernel"] for w, tree in zip((0.5, 0.2, 0.3), trees)),
        rtol=1e-6,
    )
    assert jax.tree.map(lambda leaf: leaf.dtype, average) == jax.tree.map(
        lambda leaf: leaf.dtype, trees[0]
    )
    average = combine.average(trees, {"a": [1, 0, 0], "b.c": [0, 0.5, 0.5]})
    np.testing.assert_array_equal(average["a"]["kernel"], trees[0]["a"]["kernel"])
    np.testing.assert_allclose(
        average["b"]["c"]["bias"],
        np.mean([tree["b"]["c"]["bias"] for tree in trees[1:]], 0),
        rtol=1e-6,
    )
    # The average of equal trees is the same tree, bit for bit.
    for count in (3, 7):
        jax.tree.map(
            np.testing.assert_array_equal,
            combine.average([trees[0]] * count, [1 / count] * count),
            trees[0],
        )


def test_an_ensembles_logits_are_their_formulas():
    logits = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        np.exp(combine.ensemble_logits(logits)), probabilities.mean(1), rtol=1e-5
    )
    np.testing.assert_allclose(combine.ensemble_logits(logits, "logits"), logits.mean(1), rtol=1e-5)
    # The smaller probabilities underflow in float32, their logarithms do not.
    with pytest.raises(ValueError, match="^mean_of='logit' is not one of probabilities, logits"):
        combine.ensemble_logits(logits, "logit")
    certain = combine.ensemble_logits(np.float32([[0, 300], [0, 400]]))
    np.testing.assert_allclose(certain, [-300 - np.log(2), 0], rtol=1e-6)


def recipe_1(accuracies, accuracy):
    """Computes recipe 1 of Wortsman et al. (2022) line by line, on sets."""
    ingredients = frozenset()
    for model in np.argsort(-np.asarray(accuracies), kind="stable").tolist():
        if not ingredients or accuracy(ingredients | {model}) >= accuracy(ingredients):
            ingredients |= {model}
    return ingredients


def test_greedy_is_recipe_1():
    """Compares with recipe 1 on random accuracies for every subset of five models.

    The accuracies are coarse, so half of the decisions are ties.
    """
    generator, sizes = np.random.default_rng(0), []
    for _ in range(200):
        table = generator.integers(0, 4, 2**5) / 4
        accuracy = lambda numbers, table=table: table[sum(2**number for number in numbers)]
        accuracies = [accuracy([number]) for number in range(5)]
        ingredients = combine.greedy(accuracies, accuracy)
        assert set(ingredients) == recipe_1(accuracies, accuracy) and len(set(ingredients)) == len(
            ingredients
        )
        assert accuracies[ingredients[0]] == max(accuracies)
        sizes.append(len(ingredients))
    assert set(sizes) >= {1, 2, 3, 4}


def test_a_bad_ingredient_is_refused_and_a_tie_kept():
    """The models are numbers, and the best average is nearest to 1.

    Model 1 does not change the average and is kept; model 3 worsens it and is refused.
    """
    models = [1.1, 1.1, 0.9, 5.0]
    accuracy = lambda numbers: -round(abs(np.mean([models[number] for number in numbers]) - 1), 6)
    accuracies = [accuracy([number]) for number in range(4)]
    assert combine.greedy(accuracies, accuracy) == [0, 1, 2]
    # Now model 1 moves the average away from 1, too.
    models[1] = 1.2
    assert combine.greedy([accuracy([number]) for number in range(4)], accuracy) == [
        0,
        2,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [False, True])
def test_learned_coefficients_recover_a_known_mixture(by_layer):
    generator = np.random.default_rng(0)
    trees = [
        {
            layer: {"kernel": generator.normal(size=(4, 5)).astype(np.float32)}
            for layer in ("a", "b")
        }
        for _ in range(3)
    ]
    true = {"a": [0.6, 0.3, 0.1], "b": [0.2, 0.1, 0.7] if by_layer else [0.6, 0.3, 0.1]}
    target = combine.average(trees, true)

    def loss(tree, x):
        output = lambda of: jnp.tanh(x @ of["a"]["kernel"]) @ of["b"]["kernel"].T
        return jnp.square(output(tree) - output(target)).mean()

    batches = [generator.normal(size=(16, 4)).astype(np.float32) for _ in range(400)]
    coefficients = combine.learned(loss, trees, batches, by_layer)
    for layer, want in true.items():
        np.testing.assert_allclose(coefficients[layer], want, atol=0.01)
        assert sum(coefficients[layer]) == pytest.approx(1, abs=1e-6)
    assert loss(combine.average(trees, coefficients), batches[0]) < 1e-3 * loss(
        combine.average(trees, [1 / 3] * 3), batches[0]
    )


@pytest.mark.slow
@WAYS
def test_one_program_of_many_networks_is_each_of_them(way):
    """Stacked networks predict as each alone, with its own statistics and moments."""
    parallel, model, images = Parallel(way), Tiny(), some_images(37)
    model = model.clone(axis_name=parallel.axis_name)
    networks = [some(model, seed) for seed in range(3)]
    moments = [
        (np.full(1, 0.3 + 0.1 * number, np.float32), np.full(1, 0.2 + 0.1 * number, np.float32))
        for number in range(3)
    ]

    def predict(variables, moments, output):
        outputs = evaluate.predict_batches(
            parallel,
            model,
            variables,
            moments,
            batches=evaluate.batches_of(images, 16),
            batch_size=16,
            output=output,
        )
        return np.concatenate([*outputs])

    want = np.stack(
        [
            predict(*parallel.replicate((variables, own_moments)), evaluate.logits)
            for variables, own_moments in zip(networks, moments)
        ],
        1,
    )
    stacked, (mean, std) = jax.tree.map(lambda *leaves: np.stack(leaves), *zip(networks, moments))
    placed = parallel.replicate((stacked, (mean[:, None, None, None], std[:, None, None, None])))
    together = predict(*placed, combine.member_logits(evaluate.logits))
    assert together.shape == (37, 3, 10) and np.abs(want[:, 0] - want[:, 1]).max() > 0.01
    np.testing.assert_allclose(together, want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@WAYS
def test_reestimated_statistics_are_numpys_moments(way):
    """Compares with the moments of all whole batches, computed in NumPy.

    As in training mode, a BatchNorm normalizes the input of the next layer batch by batch.
    """
    parallel, images = Parallel(way), some_images(37)
    model = Tiny(axis_name=parallel.axis_name)
    variables, moments = some(model, 0), (np.full(1, 0.4, np.float32), np.full(1, 0.2, np.float32))
    statistics = combine.reestimate_statistics(parallel, model, variables, moments, images, 16)

    def convolved(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        layer = variables["params"][name]
        return (
            np.einsum("nhwcij,ijco->nhwo", windows, layer["kernel"].astype(np.float64))
            + layer["bias"]
        )

    inputs = [
        convolved((batch / 255 - 0.4) / 0.2, "conv1") for batch in (images[:16], images[16:32])
    ]
    for name, after in (("bn1", "conv2"), ("bn2", None)):
        all_inputs = np.concatenate(inputs)
        np.testing.assert_allclose(
            statistics[name]["mean"], all_inputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            statistics[name]["var"], all_inputs.var((0, 1, 2), ddof=1), rtol=1e-4
        )
        if after:
            scale, bias = (
                variables["params"][name][key].astype(np.float64) for key in ("scale", "bias")
            )
            inputs = [
                convolved(
                    np.maximum(
                        (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * scale + bias, 0
                    ),
                    after,
                )
                for x in inputs
            ]
    assert jax.tree.structure(statistics) == jax.tree.structure(variables["batch_stats"])
    assert (
        combine.reestimate_statistics(
            parallel, model, {"params": {}, "batch_stats": {}}, moments, images, 16
        )
        == {}
    )


def test_statistics_need_one_batch_of_images():
    parallel, images = Parallel("jit"), some_images(15)
    moments = (np.full(1, 0.4, np.float32), np.full(1, 0.2, np.float32))
    # A network without BatchNorm may lack the collection.
    no_norm = {"params": {}}
    model = Tiny()
    estimate = combine.reestimate_statistics
    assert estimate(parallel, model, no_norm, moments, images, 16) == {}
    with pytest.raises(
        ValueError, match="^batch_size=16 is not from 1 to 15, the number of images"
    ):
        estimate(parallel, model, some(model, 0), moments, images, 16)


@pytest.fixture
def networks_of_a_frozen_norm():
    """Two networks with equal statistics in the first BatchNorm, which was frozen."""
    config = defaults.get_config()
    config.update({"model": f"{__name__}:Tiny", "parallel": "jit", "batch_size": 16})
    config.freeze = ("bn1.*",)
    moments = (np.full(1, 0.4, np.float32), np.full(1, 0.2, np.float32))
    members = [combination.Member(str(seed), some(Tiny(), seed), moments) for seed in (0, 1)]
    for collection in ("params", "batch_stats"):
        first, second = (member.variables[collection] for member in members)
        second["bn1"] = first["bn1"]
    some_split = arrays.Split(some_images(37), np.arange(37, dtype=np.int32) % 10)
    data = arrays.Dataset(some_split, some_split, some_split, tuple("0123456789"))
    return combination.Networks(config, members, data)


def test_an_average_keeps_the_statistics_of_frozen_norms(networks_of_a_frozen_norm):
    before = networks_of_a_frozen_norm.members[0].variables["batch_stats"]
    after = networks_of_a_frozen_norm.average([0, 1]).variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["bn1"], before["bn1"])
    # The second BatchNorm sees what the frozen one puts out.
    variables = networks_of_a_frozen_norm.average([0, 1]).variables
    images = networks_of_a_frozen_norm.data.train.images
    order = np.random.default_rng(0).permutation(37)[:32]
    normalized = (images[order] / np.float32(255) - 0.4) / 0.2
    _, intermediates = Tiny().apply(
        variables, normalized, capture_intermediates=True, mutable=["intermediates"]
    )
    (inputs,) = intermediates["intermediates"]["conv2"]["__call__"]
    np.testing.assert_allclose(after["bn2"]["mean"], inputs.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(after["bn2"]["var"], inputs.var((0, 1, 2), ddof=1), rtol=1e-4)


def test_coefficients_are_learned_with_frozen_norms(networks_of_a_frozen_norm, monkeypatch):
    """If all are frozen, the loss is that of the network in evaluation mode."""
    networks = networks_of_a_frozen_norm
    losses = []

    def learn(loss, trees, batches, by_layer):
        batch = next(iter(batches))
        losses.append(float(loss(trees[0], batch)))
        logits = networks.logits(networks.members[0], batch[0], evaluate.logits)
        log_probabilities = jax.nn.log_softmax(logits)
        losses.append(-float(np.mean(log_probabilities[np.arange(len(logits)), batch[1]])))

    monkeypatch.setattr(combination, "learned", learn)
    networks.learn(by_layer=False)
    networks.frozen = transfer.select(networks.model, ("bn*",))
    networks.learn(by_layer=False)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)


# ------------------------------------------------------------------ which runs


@pytest.fixture
def sweep_folder(tmp_path):
    """Returns a sweep's folder: runs with only their configuration, a table, and jobs."""
    folder = tmp_path / "sweep"
    for name in ("dataset=cifar10[:12000],seed=0", "dataset=cifar10[:12000],seed=1", "seed=2"):
        (folder / name).mkdir(parents=True)
        files.write_json(folder / name / "config.json", {"kind": "train", "name": name})
    (folder / "jobs").mkdir()
    (folder / "sweep.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "patterns, numbers",
    [
        (["*"], [0, 1, 2]),
        # Exact names: their brackets are not read as patterns.
        (["dataset=cifar10[:12000],seed=0", "seed=2"], [0, 2]),
        (["dataset=cifar10[:12000],seed=*"], [0, 1]),
        (["seed=[12]"], [2]),
        # A run that is matched twice is listed once.
        (["seed=*", "seed=2"], [2]),
    ],
)
def test_runs_are_named_or_matched(patterns, numbers, sweep_folder):
    configs = runs.find_runs([str(sweep_folder / pattern) for pattern in patterns])
    assert [int(str(folder)[-1]) for folder in configs] == numbers
    assert [config["name"] for config in configs.values()] == [path.name for path in configs]


def test_a_run_of_two_spellings_is_listed_once(sweep_folder, tmp_path):
    run = sweep_folder / "seed=2"
    (tmp_path / "link").symlink_to(run)
    spellings = [str(run), str(tmp_path / "link"), f"{sweep_folder}/../{sweep_folder.name}/seed=*"]
    for patterns in (spellings, spellings[::-1]):
        assert len(runs.find_runs(patterns)) == 1


def test_a_single_pattern_is_not_read_letter_by_letter(sweep_folder):
    single = runs.find_runs(f"{sweep_folder}/seed=*")
    assert single == runs.find_runs([f"{sweep_folder}/seed=*"])
    assert single == runs.find_runs(sweep_folder / "seed=*")
    assert single == runs.find_runs([sweep_folder / "seed=2"])


def test_no_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^runs=\[\] names no training run$"):
        combine.run([], "uniform", tmp_path / "out")


def test_an_unknown_method_is_refused_before_anything_is_read(tmp_path):
    message = "method='ensembel' is not one of best, ensemble, ensemble-logits, uniform, "
    with pytest.raises(ValueError, match=f"^{message}"):
        combine.run([str(tmp_path / "none")], "ensembel", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("jobs", "jobs' is not the work directory of a training run; quote a pattern"),
        ("sweep.json", "sweep.json' is not the work directory of a training run"),
        ("seed=3", "seed=3' matches no work directory of a training run"),
        ("other*", r"other\*' matches no work directory of a training run"),
        ("job*", r"job\*' matches no work directory of a training run"),
    ],
)
def test_what_is_no_run_is_named(name, message, sweep_folder):
    patterns = [str(sweep_folder / "seed=2"), str(sweep_folder / name)]
    with pytest.raises(ValueError, match=f"^runs='{sweep_folder}/{message}"):
        runs.find_runs(patterns)


@pytest.mark.parametrize("loss", ["sigmoid", "pixelwise"])
def test_runs_of_other_labels_than_classes_are_refused(loss, tmp_path):
    configs = {}
    for name, kind in (("a", "cross_entropy"), ("b", loss)):
        configs[tmp_path / name] = defaults.get_config().to_dict() | {"loss": kind}
    with pytest.raises(ValueError, match=f"^{tmp_path / 'b'} has loss='{loss}'; runs that are"):
        runs.check_runs(configs, "uniform")


def test_runs_on_streamed_images_are_refused():
    config = defaults.get_config().to_dict() | {"dataset": "folder"}
    configs = {pathlib.Path(name): config for name in "ab"}
    message = "^a has dataset='folder', which is streamed; it must be one of .*, .* or FILE.npz$"
    with pytest.raises(ValueError, match=message):
        runs.check_runs(configs, "uniform")


def test_averages_are_of_runs_that_froze_the_same_norms():
    def check(*freeze):
        default = defaults.get_config().to_dict()
        configs = {pathlib.Path(name): default | {"freeze": parts} for name, parts in freeze}
        combination._check_frozen(Tiny(), configs, "uniform")

    check(("a", ()), ("b", ("conv1.*",)))
    check(("a", ("bn1.*",)), ("b", ("bn1.*", "conv1.*")))
    message = r"a and b cannot be combined: freeze=\(\) and freeze=\('bn1.\*',\); method='uniform'"
    with pytest.raises(ValueError, match=message):
        check(("a", ()), ("b", ("bn1.*",)))


def test_runs_on_other_images_than_those_of_today_are_refused(tmp_path):
    """Compares what every run recorded; those of earlier versions recorded less."""
    digits = arrays.load("digits", n_validation=200)
    config = defaults.get_config()
    config.n_validation = 200
    recorded = {
        "classes": list("0123456789"),
        "image_shape": [8, 8, 1],
        "n_train": 1237,
        "data": {"digest": digest_arrays(digits.train, digits.validation)},
    }
    configs = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        configs[tmp_path / name] = config.to_dict()
    files.write_json(tmp_path / "a" / "results.json", recorded)
    refused = f"^the images of dataset='digits', data_dir='' have changed since {tmp_path / 'b'} "
    for changes, message in (
        ({"classes": list("1023456789")}, "the classes are in another order"),
        ({"classes": list("x123456789")}, "missing classes: x; additional: 0"),
        ({"image_shape": [8, 9, 1]}, r"image_shape=\[8, 9, 1\] then, \[8, 8, 1\] now"),
        ({"n_train": 1000}, "n_train=1000 then, 1237 now"),
        # As many images of the same classes, but others.
        ({"data": {"digest": "01234567"}}, "digest=01234567 then, [0-9a-f]{8} now"),
    ):
        files.write_json(tmp_path / "b" / "results.json", recorded | changes)
        with pytest.raises(ValueError, match=rf"{refused}was trained \({message}\); bring them"):
            runs.check_data(configs, digits, config)
    # The run held out fewer images.
    configs[tmp_path / "b"]["n_validation"] = 100
    held_out = {"n_train": 1337, "data": {"digest": "01234567"}}
    files.write_json(tmp_path / "b" / "results.json", recorded | held_out)
    runs.check_data(configs, digits, config)
    files.write_json(tmp_path / "b" / "results.json", {"classes": recorded["classes"]})
    runs.check_data(configs, digits, config)


def test_snapshots_are_taken_at_the_ends_of_cycles():
    """A cycle is 2 epochs of 9 steps, after a warmup of 1 epoch."""
    config = defaults.get_config()
    config.schedule.update({"name": "restarts", "warmup_epochs": 1, "every": 2})
    select = functools.partial(runs.select_ends_of_cycles, config=config, per_epoch=9, folder="run")
    assert select([9, 18, 27, 36, 45]) == [27, 45]
    for steps, message in (
        ([9, 18, 27, 36], "9, 18, 27, 36, of which at the end of a cycle: 27; method='snapshot'"),
        ([9, 18], "9, 18, of which at the end of a cycle: none; .* two: train two or more cycles"),
        ([27], "27, of which .* with --config.checkpoint_every_steps=9 and --config.keep_checkp"),
    ):
        with pytest.raises(ValueError, match=f"^run kept the checkpoints of steps {message}"):
            select(steps)
    # A configuration may leave out keys of a schedule, such as that there is no warmup.
    config.schedule = {"name": "restarts", "learning_rate": 0.1, "every": 2}
    assert select([9, 18, 27, 36]) == [18, 36]


@pytest.mark.parametrize("averaged", [None, combination.Member("average", {}, ())])
def test_times_are_of_the_programs_that_scored(averaged):
    """`compiled` keeps a program by its function: another one would be compiled anew."""
    outputs = []
    networks = types.SimpleNamespace(
        members=[None],
        all=None,
        seconds_per_image=lambda member, output: outputs.append(output) or 1.0,
    )
    combination._time(networks, averaged)
    scored = combine.member_logits(evaluate.averaged(1))
    assert outputs == [evaluate.logits, evaluate.logits if averaged else scored]


class OtherNorm(Network):
    """A network with Flax's BatchNorm."""

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def runs_of_another_norm(tmp_path) -> str:
    """Writes two runs that look finished; returns a pattern that matches them."""
    config = defaults.get_config()
    config.update({"model": f"{__name__}:OtherNorm", "n_validation": 200, "parallel": "jit"})
    for seed in (0, 1):
        folder = workdir.prepare(tmp_path / f"run{seed}", config.to_dict())
        weights.save_torchvision(some(OtherNorm(), seed), folder / "weights.safetensors")
        classes = list("0123456789")
        files.write_json(folder / "results.json", {"final": {"step": 1}, "classes": classes})
    return str(tmp_path / "run*")


@pytest.mark.parametrize("method", ["uniform", "learned"])
def test_another_batch_norm_is_not_averaged(method, tmp_path):
    pattern = runs_of_another_norm(tmp_path)
    with pytest.raises(ValueError, match=f"^method='{method}' needs .* keep statistics: norm$"):
        combine.run([pattern], method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_may_go_to_the_home_folder(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(folder, record):
        raise Stop(folder)

    pattern = runs_of_another_norm(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(combination.workdir, "prepared", stop)
    with pytest.raises(Stop) as stopped:
        combine.run(pattern, "ensemble", "~/out")
    assert stopped.value.args == (tmp_path / "out",)


# ------------------------------------------------------------------ whole commands


class SmallLeNet(Network):
    """LeNet with a third of its channels, which has 14,000 parameters for digits."""

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        for number, features in enumerate((16, 32), 1):
            x = nn.relu(Conv(features, 3, padding=1, name=f"conv{number}")(x))
            x = yield f"conv{number}", x
            x = max_pool(x, 2)
        x = nn.relu(Dense(64, name="linear1")(flatten(x)))
        yield "logits", Dense(self.num_classes, name="linear2")(x)


@pytest.fixture
def runs_of_random_weights(tmp_path) -> list[pathlib.Path]:
    """Writes two runs that look finished, with images normalized by other moments in each."""
    folders = []
    for seed in (0, 1):
        config = defaults.get_config()
        config.update({"model": f"{__name__}:SmallLeNet", "parallel": "jit"})
        config.freeze = ("conv1.*",)
        folder = workdir.prepare(tmp_path / f"run{seed}", config.to_dict())
        weights.save_torchvision(some(SmallLeNet(), seed), folder / "weights.safetensors")
        results = {
            "final": {"step": 1},
            "classes": list("0123456789"),
            "image_shape": [8, 8, 1],
            "mean": [0.2 + 0.4 * seed],
            "std": [0.5 + 0.2 * seed],
        }
        files.write_json(folder / "results.json", results)
        folders.append(folder)
    return folders


def test_a_soup_opens_as_a_trained_network(runs_of_random_weights, tmp_path):
    """Its network and moments give the score of the combination."""
    folder = tmp_path / "soup"
    combine.run(runs_of_random_weights, "uniform", folder)
    run = open_run(folder)
    assert run.classes == tuple("0123456789") and run.image_shape == (8, 8, 1)
    assert run.model == SmallLeNet() and run.config.freeze == ("conv1.*",)
    np.testing.assert_allclose((run.mean, run.std), [[0.4], [0.6]], rtol=1e-6)
    data = arrays.load("digits")
    logits = jax.jit(run.model.apply)(
        run.variables, (data.test.images / np.float32(255) - run.mean) / run.std
    )
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), data.test.labels]
    scored = files.read_json(folder / "results.json")["test"]
    assert scored["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    # As `predict` and `evaluate` open it.
    assert classifier.trained(folder).classes == run.classes
    results = files.read_json(folder / "results.json")
    # An earlier version left this.
    del results["config"]
    files.write_json(folder / "results.json", results)
    with pytest.raises(ValueError, match=f"^{folder} was written before .* its own command again$"):
        open_run(folder)
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match=f"^{folder} is not finished, for it has no results.json"):
        open_run(folder)


def test_an_ensemble_is_no_network_to_open(tmp_path):
    record = {"kind": "combine", "method": "ensemble", "runs": ["a", "b"]}
    workdir.prepare(tmp_path, record)
    files.write_json(tmp_path / "results.json", record)
    message = f"^{tmp_path} holds scores only, since method='ensemble' makes no network of its own"
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path)


def train(folder: pathlib.Path, **changes) -> pathlib.Path:
    """Trains without drawing figures; returns the work directory."""
    config = defaults.get_config()
    config.update_from_flattened_dict(
        {
            "model": f"{__name__}:SmallLeNet",
            "epochs": 2,
            "n_validation": 200,
            "parallel": "jit",
            "keep_checkpoints": 3,
            "checkpoint_every_steps": 9,  # an epoch
            "final_weights": "last",
            **changes,
        }
    )
    workdir.prepare(folder, config.to_dict())
    loop.train(config, folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trains six small runs; returns their folder.

    Three runs in `rates` differ in their learning rate, and the smallest hardly learns. `ema` keeps
    an average of its parameters, `held` holds out other images, and `alone` keeps one checkpoint.
    """
    with jax.numpy_dtype_promotion("standard"):
        folder = tmp_path_factory.mktemp("combined")
        for rate in (0.1, 0.05, 1e-4):
            train(
                folder / "rates" / f"rate={rate}", **{"schedule.learning_rate": rate, "epochs": 3}
            )
        train(folder / "ema", ema_decay=0.8)
        train(folder / "held", seed=1, epochs=1, n_validation=100)
        train(folder / "alone", epochs=1, keep_checkpoints=1)
    # Sweeps write this file beside their runs.
    (folder / "rates" / "sweep.json").write_text("{}")
    return folder


def results(patterns, method: str, folder: pathlib.Path) -> dict:
    combine.run([str(pattern) for pattern in patterns], method, folder)
    is_average = method not in ENSEMBLES
    assert (folder / "weights.safetensors").exists() == is_average
    assert f"**{method}**" in (folder / "report.md").read_text()
    return json.loads((folder / "results.json").read_text())


def checkpoints_of(folder: pathlib.Path) -> tuple[list[int], list]:
    """Returns the steps and states of a run's checkpoints."""
    run = build_run(read_config(folder))
    like = run.initial_state()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.steps(), [
            checkpoints.restore_step(at, like)[0] for at in checkpoints.steps()
        ]


def networks(folder: pathlib.Path) -> list[dict]:
    """Returns the final parameters of the three runs in `rates`."""
    return [
        checkpoints_of(path)[1][-1].params for path in sorted((folder / "rates").glob("rate=*"))
    ]


def errors_of(folder: pathlib.Path):
    """Returns a function that computes the error rate of parameters on a split.

    It applies the model directly, without cnnjax's evaluation.
    """
    data = arrays.load("digits", n_validation=200)
    mean, std = arrays.normalization(data.train.images)
    apply = jax.jit(SmallLeNet().apply)

    def error(params, name="validation"):
        split = getattr(data, name)
        return float(
            (
                np.argmax(
                    apply({"params": params}, (split.images / np.float32(255) - mean) / std), -1
                )
                != split.labels
            ).mean()
        )

    return error


@pytest.mark.slow
def test_greedy_from_the_command_line(finished, tmp_path):
    """The ingredients are those of recipe 1, and the scores those of the model itself.

    The run that hardly learned is not an ingredient.
    """
    runs = str(finished / "rates" / "*")
    out = str(tmp_path / "out")
    assert combine.main(["--runs", runs, "--method", "greedy", "--workdir", out]) == 0
    soup = json.loads((tmp_path / "out" / "results.json").read_text())
    trained, error = networks(finished), errors_of(finished)
    mean = lambda numbers: jax.tree.map(
        lambda *leaves: sum(leaves) / len(leaves), *(trained[number] for number in sorted(numbers))
    )
    accuracy = lambda numbers: 1 - error(mean(numbers))
    ingredients = recipe_1([accuracy([number]) for number in range(3)], accuracy)
    names = sorted(str(path) for path in (finished / "rates").glob("rate=*"))
    assert soup["runs"] == names and set(soup["ingredients"]) == {
        names[number] for number in ingredients
    }
    assert (
        not any("rate=0.0001" in name for name in soup["ingredients"])
        and soup["coefficients"] is None
    )
    assert soup["validation"]["error"] == pytest.approx(error(mean(ingredients)))
    assert soup["test"]["error"] == pytest.approx(error(mean(ingredients), "test"))
    for row, params in zip(soup["individual"], trained):
        assert row["validation"]["error"] == pytest.approx(error(params))
        assert (
            row["test"]["error"]
            == json.loads((pathlib.Path(row["name"]) / "results.json").read_text())["final"][
                "test_error"
            ]
        )
    tested = [row["test"]["error"] for row in soup["individual"]]
    assert soup["mean_error"]["test"] == pytest.approx(np.mean(tested)) and soup["std_error"][
        "test"
    ] == pytest.approx(np.std(tested, ddof=1))
    assert (
        soup["best"] == min(soup["individual"], key=lambda row: row["validation"]["error"])["name"]
    )
    assert soup["forward_passes"] == 1 and soup["seconds_per_image"]["ratio"] > 0
    assert f"{100 * soup['test']['error']:.2f}" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_averages_of_several_runs(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(combination, "_LEARNED_STEPS", 20)
    trained, error = networks(finished), errors_of(finished)
    uniform, learned, layers, best = (
        results([finished / "rates" / "*"], method, tmp_path / method)
        for method in ("uniform", "learned", "learned-by-layer", "best")
    )
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *trained)
    assert (
        uniform["test"]["error"] == pytest.approx(error(mean, "test"))
        and uniform["ingredients"] == uniform["runs"]
    )
    assert (
        learned["validation"]["loss"] < uniform["validation"]["loss"]
        and layers["validation"]["loss"] < uniform["validation"]["loss"]
    )
    assert len({tuple(weights) for weights in learned["coefficients"].values()}) == 1
    assert len({tuple(weights) for weights in layers["coefficients"].values()}) == 4
    assert layers["test"]["error"] == pytest.approx(
        error(combine.average(trained, layers["coefficients"]), "test")
    )
    assert best["ingredients"] == [best["best"]] and best["test"] == pytest.approx(
        next(row for row in best["individual"] if row["name"] == best["best"])["test"]
    )


@pytest.mark.slow
def test_ensembles_of_several_runs(finished, tmp_path):
    """Compares both ensembles with averages in NumPy.

    Runs with different held-out images can be combined, but have no common validation score.
    """
    mixed = results(
        [finished / "rates" / "rate=0.1", finished / "held"], "ensemble", tmp_path / "held"
    )
    assert mixed["validation"] is None and mixed["best"] is None and mixed["forward_passes"] == 2
    patterns = [finished / "rates" / "*"]
    probable, plain = (
        results(patterns, method, tmp_path / method) for method in ("ensemble", "ensemble-logits")
    )
    data = arrays.load("digits", n_validation=200)
    mean, std = arrays.normalization(data.train.images)
    apply = jax.jit(SmallLeNet().apply)
    logits = np.stack(
        [
            apply({"params": params}, (data.test.images / np.float32(255) - mean) / std)
            for params in networks(finished)
        ]
    )
    wrong = lambda outputs: float((outputs.argmax(-1) != data.test.labels).mean())
    assert probable["test"]["error"] == pytest.approx(wrong(np.asarray(nn.softmax(logits)).mean(0)))
    assert plain["test"]["error"] == pytest.approx(wrong(logits.mean(0)))
    assert (
        probable["test"]["loss"] != plain["test"]["loss"]
        and probable["forward_passes"] == plain["forward_passes"] == 3
    )


@pytest.mark.slow
def test_checkpoints_of_one_run(finished, tmp_path):
    place, error = finished / "rates" / "rate=0.1", errors_of(finished)
    snapshot, polyak = (
        results([place], method, tmp_path / method) for method in ("snapshot", "polyak")
    )
    steps, states = checkpoints_of(place)
    assert len(steps) > 2 and snapshot["ingredients"] == polyak["ingredients"] == [
        f"step {at}" for at in steps
    ]
    assert (snapshot["forward_passes"], polyak["forward_passes"]) == (len(steps), 1)
    mean = jax.tree.map(
        lambda *leaves: sum(leaves) / len(leaves), *(state.params for state in states)
    )
    assert polyak["test"]["error"] == pytest.approx(error(mean, "test"))
    for combined in (snapshot, polyak):
        assert [row["test"]["error"] for row in combined["individual"]] == pytest.approx(
            [error(state.params, "test") for state in states]
        )
    losses = [row["test"]["loss"] for row in snapshot["individual"]]
    # Jensen's inequality: the logarithm of a mean exceeds the mean of the logarithms.
    assert snapshot["test"]["loss"] < np.mean(losses)


@pytest.mark.slow
def test_a_run_that_averaged_its_parameters(finished, tmp_path):
    """`polyak` and an ensemble with other runs use the average that the run kept.

    `snapshot` uses the parameters of its checkpoints.
    """
    _, states = checkpoints_of(finished / "ema")
    error, own = (
        errors_of(finished),
        json.loads((finished / "ema" / "results.json").read_text())["final"]["test_error"],
    )
    polyak, snapshot = (
        results([finished / "ema"], method, tmp_path / method) for method in ("polyak", "snapshot")
    )
    assert polyak["ingredients"] == ["ema_decay=0.8"] and polyak["test"][
        "error"
    ] == own == pytest.approx(error(states[-1].ema, "test"))
    assert (
        snapshot["individual"][-1]["test"]["error"]
        == pytest.approx(error(states[-1].params, "test"))
        != own
    )
    ensemble = results(
        [finished / "ema", finished / "rates" / "rate=0.1"], "ensemble", tmp_path / "ensemble"
    )
    assert ensemble["individual"][0]["test"]["error"] == own


@pytest.mark.slow
def test_a_soup_with_batch_norm_gets_statistics_of_its_own(tmp_path, monkeypatch):
    """Averages get re-estimated statistics; the method `best` keeps its run's own."""
    monkeypatch.setitem(base._REGISTRY, "tiny", Tiny)
    monkeypatch.setattr(combination, "_LEARNED_STEPS", 20)
    averages, average = [], combination.Networks.average
    monkeypatch.setattr(
        combination.Networks,
        "average",
        lambda self, *rest, **named: averages.append(average(self, *rest, **named)) or averages[-1],
    )
    networks = [some(Tiny(), seed) for seed in (0, 1)]
    for seed, variables in enumerate(networks):
        config = defaults.get_config()
        config.update({"model": "tiny", "n_validation": 200, "parallel": "jit"})
        folder = workdir.prepare(tmp_path / f"run{seed}", config.to_dict())
        weights.save_torchvision(variables, folder / "weights.safetensors")
        classes = list("0123456789")
        files.write_json(folder / "results.json", {"final": {"step": 1}, "classes": classes})
    train = arrays.load("digits", n_validation=200).train
    images = train.images[np.random.default_rng(0).permutation(len(train.images))]
    for method in ("uniform", "learned", "best"):
        summary = results([tmp_path / "run*"], method, tmp_path / method)
        soup = averages[-1].variables
        if method == "best":
            want = networks[int(summary["ingredients"][0][-1])]
        else:
            coefficients = summary["coefficients"] or [0.5, 0.5]
            want = {
                "params": combine.average(
                    [network["params"] for network in networks], coefficients
                ),
                "batch_stats": combine.reestimate_statistics(
                    Parallel("jit"), Tiny(), soup, arrays.normalization(train.images), images, 128
                ),
            }
            if method == "learned":
                initial = transfer.load_initial_weights(tmp_path / method, Tiny(), ("*",))
                jax.tree.map(np.testing.assert_array_equal, initial, soup)
                assert coefficients["conv1"] != pytest.approx([0.5, 0.5], abs=0.01)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), soup, want
        )


def refused(capsys, *arguments) -> str:
    assert combine.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "dataset, dataset_now", [("cifar10", "cifar10"), ("here/own.npz", "moved/own.npz")]
)
def test_data_that_have_moved_are_read_where_they_are(dataset, dataset_now, monkeypatch):
    config = defaults.get_config()
    config.dataset = dataset

    def load(*arguments):
        raise ValueError(arguments)

    monkeypatch.setattr(combination.arrays, "load", load)
    with pytest.raises(ValueError) as raised:
        combination._read_networks({pathlib.Path("a"): config.to_dict()}, "ensemble", "moved")
    assert raised.value.args[0] == (dataset_now, "moved", config.n_validation)


@pytest.mark.slow
def test_a_combination_without_its_data_leaves_no_folder(finished, tmp_path, capsys, monkeypatch):
    def load(dataset, data_dir, n_validation):
        raise ValueError(f"data_dir={data_dir!r} is not a folder")

    monkeypatch.setattr(combination.arrays, "load", load)
    runs = finished / "rates" / "rate=*"
    arguments = ["--runs", runs, "--method", "uniform", "--workdir", tmp_path / "a" / "b"]
    assert refused(capsys, *arguments) == "error: data_dir='' is not a folder\n"
    # The data set may have moved.
    message = refused(capsys, *arguments, "--data_dir", "moved")
    assert message == "error: data_dir='moved' is not a folder\n"
    assert not list(tmp_path.iterdir())


def test_a_run_that_failed_is_told_from_an_unfinished_one(tmp_path):
    config = defaults.get_config()
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        workdir.prepare(folder, config.to_dict())
    files.write_json(folders[0] / "results.json", {"final": {"step": 1}})
    configs = runs.find_runs(folders)
    with pytest.raises(ValueError, match=f"^{folders[1]} is not finished, for it has no results"):
        runs.check_runs(configs, "uniform")
    # A sweep records why a run failed, and does not start it again.
    failure = folders[1] / "failure.json"
    files.write_json(failure, {"error": "the loss is not finite\nand more"})
    message = rf"^{folders[1]} failed \(the loss is not finite\): remove {failure} and run the "
    message += "sweep again, or leave it out of --runs$"
    with pytest.raises(ValueError, match=message):
        runs.check_runs(configs, "uniform")
    # It has been run again since, by itself.
    files.write_json(folders[1] / "results.json", {"final": {"step": 1}})
    runs.check_runs(configs, "uniform")


def test_a_run_without_checkpoints_is_named_and_gets_no_folder(tmp_path):
    files.write_json(tmp_path / "results.json", {"final": {"step": 3}})
    with pytest.raises(ValueError, match="has no whole checkpoint of its last step, 3"):
        runs._read_checkpoints(tmp_path, "polyak", None)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_runs_that_do_not_combine_are_named(finished, tmp_path, capsys):
    def fake(name, **changes):
        """Creates a finished run's folder without weights and checkpoints."""
        config = defaults.get_config()
        config.update_from_flattened_dict({"n_validation": 200, **changes})
        workdir.prepare(tmp_path / name, config.to_dict())
        files.write_json(tmp_path / name / "results.json", {"final": {"step": 1}})
        return tmp_path / name

    first, rest = fake("a"), ("--workdir", tmp_path / "out")
    pair = lambda name, method="uniform", **changes: refused(
        capsys, "--runs", first, fake(name, **changes), "--method", method, *rest
    )
    both = lambda name: f"{first} and {tmp_path / name} cannot be combined: "
    assert both("model") + "model='lenet' and model='mlp1'" in pair("model", model="mlp1")
    assert both("data") + "dataset='digits' and dataset='mnist'" in pair("data", dataset="mnist")
    padded = {"model_fields.padding": "reflect"}
    assert both(
        "padding"
    ) + "model_fields.padding='zeros' and model_fields.padding='reflect'" in pair(
        "padding", **padded
    )
    for method in ("best", "greedy", "learned", "learned-by-layer"):
        chooses = (
            f"n_validation=200 and n_validation=100; method='{method}' chooses by validation images"
        )
        assert both("held") + chooses in pair("held", method, n_validation=100)
    none = [fake(name, n_validation=0) for name in ("none", "none too")]
    message = refused(capsys, "--runs", *none, "--method", "greedy", *rest)
    assert f"{none[0]} held none out" in message and "--config.n_validation=N" in message
    assert "matches no work directory" in refused(
        capsys, "--runs", tmp_path / "nothing*", "--method", "uniform", *rest
    )
    assert "takes at least two runs" in refused(
        capsys, "--runs", first, "--method", "uniform", *rest
    )
    assert "takes the checkpoints of one run" in refused(
        capsys, "--runs", first, tmp_path / "held", "--method", "polyak", *rest
    )
    assert "is streamed" in refused(
        capsys, "--runs", fake("folder", dataset="folder"), "--method", "polyak", *rest
    )
    assert "is not a finished training run: it has no weights.safetensors" in refused(
        capsys, "--runs", first, tmp_path / "held", "--method", "uniform", *rest
    )
    assert "kept one checkpoint" in refused(
        capsys, "--runs", finished / "alone", "--method", "snapshot", *rest
    )
    (first / "results.json").unlink()
    assert f"{first} is not finished" in pair("other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        combine.main(["--runs", str(first), "--method", "stew", "--workdir", str(tmp_path / "out")])
    assert stop.value.code == 2 and "invalid choice: 'stew'" in capsys.readouterr().err
