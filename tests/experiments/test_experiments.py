"""The experiments: what they write in a quick run, that a kill costs nothing, and what their tables are made to say."""

import dataclasses
import importlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "experiments"
sys.path.insert(0, str(SCRIPTS))

import contest
import degradation
import gates
import grow_resnet
import grow_vgg
import lab
import learn_identity
import no_forgetting
import page


def command(name, out, *options):
    return [sys.executable, str(SCRIPTS / f"{name}.py"), "--quick", "--out", str(out), *map(str, options)]


def run(name, out, *options):
    """A quick run in a process of its own; its tables."""
    done = subprocess.run(command(name, out, *options), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def results(name, out):
    found = lab.Results.read(name, out)
    assert found.about["quick"] is True and found.about["minutes"] >= 0
    return found


def images_of(name, out):
    from PIL import Image

    paths = sorted(out.glob(f"{name}*.png"))
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, path
    return [path.name for path in paths]


# ---------------------------------------------------------------- quick runs


@pytest.mark.slow
def test_learn_identity(tmp_path):
    run("learn_identity", tmp_path, "--seeds", "0,1")
    found = results("learn_identity", tmp_path)
    rows = found.rows
    assert len(rows) == 2 * 4 * (5 + 2 * learn_identity.POINTS) * 2 * 2  # depths, forms, maps, seeds, rates
    exact = lab.pick(rows, target="identity", form="residual")
    assert exact and all(row["start_error"] == 0 and row["error"] == 0 for row in exact), "zero weights are the identity"
    assert all(row["start_error"] < 1e-10 for row in lab.pick(rows, target="identity", form="plain_identity"))
    assert all(row["start_error"] > 0.1 for row in lab.pick(rows, target="identity", form="plain"))
    # Behind F = 0 the error at the start is the distance itself.
    for row in lab.pick(rows, form="residual", path="arc"):
        np.testing.assert_allclose(row["start_error"], row["distance"] ** 2, rtol=0.15, atol=1e-6)
    learned = [row["error"] < row["start_error"] for row in rows if row["start_error"] > 0.01]
    assert np.mean(learned) > 0.95
    assert images_of("learn_identity", tmp_path) == ["learn_identity_distance.png", "learn_identity_targets.png"]


@pytest.mark.slow
def test_degradation(tmp_path):
    options = ("--depths", "8,14", "--spread-depths", "8", "--epochs", 2, "--seeds", "0,1")
    run("degradation", tmp_path, *options)
    rows = results("degradation", tmp_path).rows
    assert {(row["net"], row["depth"], row["seed"]) for row in rows} == {
        (net, depth, seed) for net in ("plain", "residual") for depth, seed in ((8, 0), (8, 1), (14, 0))
    }
    assert {row["epoch"] for row in rows} == {1, 2} and all(0 <= row["train_error"] <= 1 for row in rows)
    assert images_of("degradation", tmp_path) == ["degradation.png"]
    # The same command does nothing again, and says the same.
    before = (tmp_path / "degradation.csv").read_text()
    again = run("degradation", tmp_path, *options)
    assert "[1 of" not in again.stderr and (tmp_path / "degradation.csv").read_text() == before
    # Another size is another run, and does not touch the first.
    folders = sorted((tmp_path / "runs" / "degradation").iterdir())
    run("degradation", tmp_path, *options, "--width", 2, "--seeds", 5)
    assert len(list((tmp_path / "runs" / "degradation").iterdir())) == len(folders) + 1
    assert {row["seed"] for row in results("degradation", tmp_path).rows} == {5}


@pytest.mark.slow
def test_speed(tmp_path):
    run("speed", tmp_path)
    rows = results("speed", tmp_path).rows
    assert [row["arm"] for row in rows] == ["recipe", "sgd", "random-stem"]
    assert len({row["loss"] for row in rows}) == 3 and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert images_of("speed", tmp_path) == ["speed.png"]
    done = subprocess.run(command("speed", tmp_path, "--arms", "recipe,speedy"), capture_output=True, text=True)
    assert done.returncode == 2 and "unknown arm 'speedy'; choose from recipe, sgd" in done.stderr


@pytest.mark.slow
def test_elastic(tmp_path):
    run("elastic", tmp_path)
    rows = results("elastic", tmp_path).rows
    assert {(row["arm"], row["budget"]) for row in rows} == {
        ("elastic", 1.0), ("elastic", 0.75), ("plain", 1.0), ("plain", 0.75), ("own", 0.75)
    }  # fmt: skip
    assert all(row["share"] <= row["budget"] and 0 <= row["accuracy"] <= 1 for row in rows)
    assert all((row["share"] == 1) == (row.get("blocks", 1) == 0) for row in rows)
    assert images_of("elastic", tmp_path) == ["elastic.png"]


@pytest.mark.slow
def test_grow_vgg(tmp_path):
    run("grow_vgg", tmp_path, "--seeds", 3)
    found = results("grow_vgg", tmp_path)
    starts = {row["arm"]: row for row in lab.pick(found.rows, epoch=0)}
    assert starts["vgg"]["eager_difference"] == starts["identity"]["eager_difference"] == 0
    assert starts["identity"]["test_error"] == starts["vgg"]["test_error"]
    assert starts["random"]["eager_difference"] > 0.01 and starts["plain"]["eager_difference"] > 0.01
    assert starts["plain"]["parameters"] > starts["vgg"]["parameters"]
    last = {arm: max(row["macs"] for row in lab.pick(found.rows, arm=arm)) for arm in grow_vgg.ARMS}
    assert last["identity"] == last["random"]
    one_epoch = min(row["macs"] for row in lab.pick(found.rows, arm="vgg") if row["epoch"] == 1)
    assert last["identity"] <= last["vgg"] < last["identity"] + one_epoch, "the VGG alone gets at least as much compute"
    assert {row["arm"] for row in found.more["drift"]} == {"identity", "random"}
    drift = lab.pick(found.more["drift"], arm="identity")
    assert len({row["block"] for row in drift}) == 13
    assert all((row["mean"] == 0) == (row["epoch"] == 0) for row in drift)
    assert images_of("grow_vgg", tmp_path) == ["grow_vgg.png", "grow_vgg_drift.png"]


@pytest.mark.slow
def test_grow_imagenet(tmp_path, shared_data):
    weights = shared_data / "weights" / "vgg16_imagenet_notop.npz"
    run("grow_vgg", tmp_path, "--trunk", "imagenet", "--seeds", 1, "--weights", weights)
    found = results("grow_imagenet", tmp_path)
    starts = {row["arm"]: row for row in lab.pick(found.rows, epoch=0)}
    assert starts["identity"]["eager_difference"] == 0 and starts["random"]["eager_difference"] > 0.01
    assert {row["block"].split("_grow")[0] for row in found.more["drift"]} == {"block4_pool", "block5_pool"}
    assert images_of("grow_imagenet", tmp_path) == ["grow_imagenet.png", "grow_imagenet_drift.png"]


@pytest.mark.slow
def test_grow_resnet(tmp_path):
    run("grow_resnet", tmp_path)
    found = results("grow_resnet", tmp_path)
    finals = {(row["budget"], row["arm"]): row for row in lab.pick(found.rows, phase="final")}
    assert finals.keys() == {(2, arm) for arm in grow_resnet.LABELS}
    # Equal compute, but for rounding to whole epochs; the networks from scratch get the backbone's as well.
    for arm, extra in (("further", 0), ("identity", 0), ("scratch", 1), ("wider", 1)):
        row = finals[2, arm]
        epochs = (2 + extra) * finals[2, "further"]["macs_per_image"] / row["macs_per_image"]
        assert row["epochs"] == max(1, round(epochs)), arm
    assert finals[2, "identity"]["largest_drift"] > 0 and "largest_drift" not in finals[2, "wider"]
    assert images_of("grow_resnet", tmp_path) == ["grow_resnet.png"]
    before = (tmp_path / "grow_resnet.csv").read_bytes()
    run("grow_resnet", tmp_path, "--report")
    assert (tmp_path / "grow_resnet.csv").read_bytes() == before


@pytest.mark.slow
def test_no_forgetting(tmp_path):
    run("no_forgetting", tmp_path)
    rows = lab.pick(results("no_forgetting", tmp_path).rows, phase="final")
    assert {row["arm"]: row["old_answers_equal"] for row in rows} == {"everything": 0, "head": 1, "grown": 1}
    assert all(row["old_accuracy"] == row["old_before"] for row in rows if row["arm"] != "everything")
    assert images_of("no_forgetting", tmp_path) == ["no_forgetting.png"]


@pytest.mark.slow
def test_gates(tmp_path):
    run("gates", tmp_path, "--seeds", "0")
    rows = results("gates", tmp_path).rows
    assert {(row["gate"], row["optimizer"]) for row in rows if row["gate"] != "trunk"} == {
        (gate, optimizer) for gate in gates.GATES for optimizer in gates.OPTIMIZERS
    }
    assert all("final_loss" in row or "diverged" in row for row in rows)
    assert images_of("gates", tmp_path) == ["gates.png"]


# ---------------------------------------------------------------- kills


def kill_when(process, condition):
    """SIGKILL a process as soon as a condition holds."""
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_training_goes_on(tmp_path):
    options = ("--depths", "8", "--spread-depths", "8", "--epochs", 4, "--seeds", 0, "--images", 512)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("degradation", whole, *options)
    process = subprocess.Popen(command("degradation", broken, *options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def second_is_half_done():
        logs = list(broken.glob("runs/degradation/*/residual-8-0/log.csv"))
        return bool(logs) and logs[0].exists() and len(logs[0].read_text().splitlines()) >= 3

    kill_when(process, second_is_half_done)
    first = next(broken.glob("runs/degradation/*/plain-8-0/rows.json"))
    stamp = first.stat().st_mtime_ns
    assert not (broken / "degradation.csv").exists(), "a table of a run that is not finished"
    done = run("degradation", broken, *options)
    assert "going on from step" in done.stderr and first.stat().st_mtime_ns == stamp
    ours, theirs = (results("degradation", folder).rows for folder in (broken, whole))
    assert [{k: row[k] for k in ("net", "epoch")} for row in ours] == [{k: row[k] for k in ("net", "epoch")} for row in theirs]
    for key in ("train_loss", "test_loss"):
        np.testing.assert_allclose([row[key] for row in ours], [row[key] for row in theirs], rtol=1e-4)


@pytest.mark.slow
def test_killed_fleet_goes_on(tmp_path):
    options = ("--layers", "8", "--steps", 200, "--seeds", 2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("learn_identity", whole, *options)
    process = subprocess.Popen(command("learn_identity", broken, *options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kill_when(process, lambda: any(broken.glob("runs/learn_identity/*/residual-8/state.npz")))
    run("learn_identity", broken, *options)
    ours, theirs = (results("learn_identity", folder).rows for folder in (broken, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert {**a, "error": 0, "start_error": 0} == {**b, "error": 0, "start_error": 0}
        np.testing.assert_allclose(a["error"], b["error"], rtol=1e-3, atol=1e-9)


# ---------------------------------------------------------------- what tables are made to say


def test_a_rate_at_which_one_seed_went_astray_is_not_the_best():
    common = {"form": "plain", "layers": 8, "path": "named", "target": "near"}
    rows = [{**common, "rate": rate, "seed": seed, "error": error} for rate, seed, error in
            ((0.1, 0, 1e-9), (0.1, 1, np.nan), (0.2, 0, 0.5), (0.2, 1, 0.25))]  # fmt: skip
    assert [row["rate"] for row in learn_identity.best(rows)] == [0.2, 0.2]


def test_cost_of_a_map_is_that_of_the_fastest_rate():
    rows = [
        {"rate": rate, "seed": seed, "steps_to_1_percent": steps}
        for rate, values in ((0.1, (100, 300, 500)), (0.2, (200, 200, 900)))
        for seed, steps in enumerate(values)
    ]
    assert learn_identity.fewest_steps(rows) == 200
    # Two of three seeds that never get there are no median.
    assert learn_identity.fewest_steps([*rows[:1], {"rate": 0.1, "seed": 1}, {"rate": 0.1, "seed": 2}]) == np.inf


def test_maps_are_what_they_are_called():
    for path, target, make in learn_identity.maps(6):
        matrix, distance = make(3), learn_identity.distance(make(3))
        if path == "line":
            np.testing.assert_allclose(distance, 2 * target, atol=1e-12)
        elif path == "arc":
            np.testing.assert_allclose(distance, 2 * np.sin(np.pi * target / 2), atol=1e-12)
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
        elif target == "near":
            np.testing.assert_allclose(distance, 0.1)
        elif target in ("rotation", "reflection"):
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
            np.testing.assert_allclose(np.linalg.det(matrix), 1 if target == "rotation" else -1)
            assert distance > 0.5 and not np.allclose(matrix, make(4))


def test_degradation_says_which_difference_exceeds_the_spread():
    errors = {
        ("plain", 20): (0.30, 0.32), ("plain", 56): (0.50, 0.56), ("residual", 20): (0.30, 0.31), ("residual", 56): (0.29, 0.33)
    }  # fmt: skip
    rows = [
        {
            "net": net,
            "depth": depth,
            "seed": seed,
            "epoch": epoch,
            "step": 10 * epoch,
            "train_error": error + (epoch == 1),
            "test_error": error,
        }
        for (net, depth), values in errors.items()
        for seed, error in enumerate(values)
        for epoch in (1, 2)
    ]
    table = lab.Results(rows, {}, {})
    said = degradation.facts(table)
    assert said["steps"] == "20"
    assert "plain: +22.0 ± 2.8 percentage points (more than the spread)" in said["gap"]
    assert "residual: +0.5 ± 2.1 percentage points (within the spread)" in said["gap"]
    assert "| 56 | 53.0 ± 4.2 | 53.0 ± 4.2 | 31.0 ± 2.8 | 31.0 ± 2.8 | 2 |" in said["table"]


def gate_rows(losses):
    """Rows of one rate for SGD; None is a seed that diverged."""
    common = {"optimizer": "sgd", "rate": 0.1}
    return [
        {"gate": gate, "seed": seed, **common, **({"diverged": 1} if loss is None else {"final_loss": loss})}
        for gate, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_a_gate_is_called_better_only_beyond_the_spread():
    others = {gate: (2.0, 2.0, 2.0) for gate in gates.GATES}
    default = {**others, "zero_conv": (1.0, 1.2, 1.1)}
    assert "no gate" in gates.verdict(gate_rows({**default, "rezero": (0.9, 1.3, 1.0)}), "sgd")
    assert "`rezero` (-0.200 ± 0.000)" in gates.verdict(gate_rows({**default, "rezero": (0.8, 1.0, 0.9)}), "sgd")
    assert "no gate" in gates.verdict(gate_rows({**default, "none": (0.1, 0.1, 0.1)}), "sgd"), "a control is no gate to pick"
    assert "no gate" in gates.verdict(gate_rows({**default, "rezero": (0.8, None, None)}), "sgd"), "one seed has no spread"


def test_steps_until_a_mean_of_many():
    losses = [2.0] * 30 + [0.1] + [2.0] * 30 + [0.9] * 40
    assert gates.steps_until(losses, 1.0) == 61 + 19  # 19 of 0.9 and one of 2.0 are below 1 in the mean
    assert gates.steps_until([0.1] * 10, 1.0) is None


def test_best_rate_of_a_gate_leaves_out_a_rate_that_diverged():
    rows = [
        {"gate": "none", "optimizer": "sgd", "rate": 0.1, "seed": 0, "diverged": 1},
        {"gate": "none", "optimizer": "sgd", "rate": 0.1, "seed": 1, "final_loss": 0.1},
        {"gate": "none", "optimizer": "sgd", "rate": 0.01, "seed": 0, "final_loss": 0.9},
        {"gate": "none", "optimizer": "sgd", "rate": 0.01, "seed": 1, "final_loss": 0.9},
    ]
    assert {row["rate"] for row in gates.best(rows, "none", "sgd")} == {0.01}


# ---------------------------------------------------------------- options and page


class Stub(contest.Contest):
    """A contest in which nothing is trained: arm by arm, how many of 200 test images are right."""

    arms = dict.fromkeys((*contest.MAIN, "random"))
    right_of = {"untouched": 100, "further": 120, "identity": 130, "random": 110}

    def backbone_key(self, seed):
        return {"phase": "backbone", "seed": seed}

    def train_backbone(self, seed, folder):
        return [{}]

    def images(self):
        return None, None

    def train(self, arm, seed, budget, recipe, test, folder):
        np.save(folder / "right.npy", np.arange(200) < self.right_of[arm] + seed)
        rate = (recipe or {}).get("learning_rate", 0.0)
        return [{"learning_rate": rate, "held_out_accuracy": rate, "test_accuracy": self.right_of[arm] / 200}]


def finished(folder, *arms, seeds=(0, 1, 2), **sizes):
    """A contest whose sub-runs of some arms are done, without trained models."""
    sizes = {"one_backbone": "yes", "backbone_epochs": 1, "trial_budget": 1, "budgets": (5,), "control_seeds": 2,
             "rates": (0.1, 0.2), "decays": (0.1,), "gate_rates": (1.0,), **sizes}  # fmt: skip
    kind = dataclasses.make_dataclass("Sizes", [(key, object, lab.size(value, "")) for key, value in sizes.items()])
    run = Stub(lab.Lab("stub", kind(), seeds, "digits", folder))
    run.arms = dict.fromkeys(arms)

    def rows(cells):
        for cell in cells:
            done = run.lab.folder(cell.key)
            done.mkdir(parents=True)
            (done / "rows.json").write_text(json.dumps({"seconds": 1, "rows": cell.function(done)}))
        return run.lab.run(cells)

    trials = rows(run.trials(arms))
    cells = run.finals(arms, trials)
    rows(cells)
    return run, trials, cells


def test_contest_compares_what_is_done(tmp_path):
    run, trials, cells = finished(tmp_path, *contest.MAIN, "random")
    assert {row["learning_rate"] for row in trials} == {0.1, 0.2}
    # The best recipe of each arm, all seeds for the main comparison, and two for the control.
    assert [cell.key["seed"] for cell in cells if cell.key["arm"] == "random"] == [0, 1]
    assert run.best_recipe("identity", trials)["learning_rate"] == 0.2 and run.best_recipe("untouched", trials) is None
    table = {row["arm"]: row for row in run.comparisons(cells)}
    assert table.keys() == {"untouched", "identity", "random"} and {row["against"] for row in table.values()} == {"further"}
    assert (table["identity"]["gain"], table["identity"]["standard_error"], table["identity"]["seeds"]) == (5.0, 0.0, 3)
    assert table["identity"]["low"] > 0 and table["random"]["seeds"] == 2 and table["random"]["high"] < 0
    # Where the control is missing there is nothing to compare with, and a single seed has no standard error.
    assert run.comparisons([cell for cell in cells if cell.key["arm"] != "further"]) == []
    one = run.comparisons([cell for cell in cells if cell.key["seed"] == 2])
    assert [row["arm"] for row in one] == ["untouched", "identity"] and "standard_error" not in one[0]


def test_report_trains_nothing(tmp_path, monkeypatch):
    run, *_ = finished(tmp_path, *contest.MAIN)
    monkeypatch.setattr(run.lab, "publish", lambda module: None)
    monkeypatch.setattr(Stub, "train", lambda *_: pytest.fail("a sub-run was trained"))
    run.arms, run.report = Stub.arms, True
    run.run(None)
    found = lab.Results.read("stub", tmp_path)
    assert {row["arm"] for row in found.rows} == set(contest.MAIN) and len(found.more["comparison"]) == 2
    run.report = False
    with pytest.raises(pytest.fail.Exception, match="was trained"):
        run.run(None)


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(Exception, match="give --data FILE.npz, or --quick"):
        monkeypatch.setattr(lab, "SHARED", tmp_path)
        lab.Lab("x", degradation.Sizes(), (0,), "cifar10", tmp_path).source()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grow_vgg", "gates"])
def test_wrong_sizes_are_one_sentence_before_anything_is_trained(name, tmp_path):
    for options, code, text in (
        (("--epochs", -1), 2, "-1 is not in the range x>=1"),
        (("--network", "nonsense"), 2, "unknown model 'nonsense'"),
        (("--network", "resnet20"), 2, 'no layer of the model matches "block*_pool"'),
    ):
        done = subprocess.run(command(name, tmp_path, *options), capture_output=True, text=True, timeout=120)
        assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "epoch 1/" not in done.stderr and not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("content", [b"no archive", None])
def test_weights_that_are_none_are_one_sentence(content, tmp_path):
    file = tmp_path / "w.npz"
    np.savez(file, block1_conv1=np.zeros(3)) if content is None else file.write_bytes(content)
    study = grow_vgg.ImageNetStudy(lab.Lab("x", grow_vgg.QUICK_IMAGENET, (0,), "digits", tmp_path), file)
    with pytest.raises(Exception, match="w.npz does not hold VGG16's convolutions") as caught:
        study.new_trunk(0)
    assert type(caught.value).__name__ == "TrainingError"


def test_own_data_is_used(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"{kind}_{part}": value for part, n in (("train", 40), ("test", 20)) for kind, value in
              (("x", rng.integers(0, 255, (n, 32, 32, 3), np.uint8)), ("y", rng.integers(0, 10, n)))}  # fmt: skip
    np.savez(tmp_path / "c.npz", **arrays)
    sizes = degradation.Sizes(images=30, test_images=50)
    source = lab.Lab("x", sizes, (0,), "cifar10", tmp_path, tmp_path / "c.npz").source()
    np.testing.assert_array_equal(source.train.images, arrays["x_train"][:30])
    assert source.test.size == 20 and source.preprocessing == "cifar10"


def test_page_is_current():
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run scripts/experiments/page.py"


def test_page_leaves_out_what_was_not_measured(tmp_path):
    text = page.render(tmp_path)
    assert "{" not in text and "<!--" not in text and "`docs/results`" in text and ".png" not in text


SECTIONS = [name for name in page.EXPERIMENTS if f"<!-- with {name} -->" in page.TEXT.read_text("utf-8")]


@pytest.mark.parametrize("name", SECTIONS)
def test_page_has_a_fact_for_every_name(name, tmp_path):
    """Each section is filled from tables of a quick run's form."""
    write_example(name, tmp_path)
    text = page.render(tmp_path)
    assert "{" not in text and f"results/{name}" in text and not re.search(r"\bnan\b", text)


def rows_of(measures, **keys):
    """A row for every combination of keys, with random measures."""
    rng = np.random.default_rng(0)
    return [
        {**dict(zip(keys, values, strict=True)), **{measure: rng.random() for measure in measures}}
        for values in itertools.product(*keys.values())
    ]


def write_example(name, folder):
    """Tables of the form that an experiment writes, with two seeds."""
    module = importlib.import_module(page.EXPERIMENTS[name])
    sizes = grow_vgg.IMAGENET if name == "grow_imagenet" else module.Sizes()
    more = {}
    if name == "degradation":
        rows = rows_of(("train_error", "test_error"), net=degradation.NETS, depth=(20, 56), seed=(0, 1), epoch=(1, 2), step=(9,))
    elif name == "learn_identity":
        keys = {"form": learn_identity.FORMS, "layers": (2, 26), "seed": (0, 1), "rate": (0.1, 1.0)}
        rows = [
            {**row, "path": path, "target": target, "distance": learn_identity.distance(make(0))}
            for path, target, make in learn_identity.maps(4)
            for row in rows_of(("start_error", "error"), **keys)
        ]
    elif name == "gates":
        measures = ("final_loss", "test_error", "steps_to_half")
        rows = rows_of(measures, gate=gates.GATES, optimizer=gates.OPTIMIZERS, rate=(0.1,), seed=(0, 1))
    elif name == "grow_resnet":
        final = {"phase": ("final",), "arm": grow_resnet.LABELS, "budget": (9, 3), "seed": (0, 1)}
        trial = {"phase": ("trial",), "arm": ("further", "identity"), "recipe": (0, 1)}
        recipe = ("learning_rate", "weight_decay", "gate_lr_multiplier", "epochs")
        rows = [
            *rows_of(("held_out_accuracy", "train_accuracy"), phase=("backbone",), seed=(0,)),
            *rows_of(("held_out_accuracy", *recipe), **trial),
            *rows_of(("held_out_accuracy", "test_accuracy", "macs_per_image"), **final),
        ]
        keys = {"budget": (9,), "arm": ("untouched", "identity"), "against": ("further",), "seeds": (2,)}
        more = {"comparison": rows_of(("gain", "standard_error", "low", "high"), **keys)}
    elif name == "no_forgetting":
        measures = ("old_accuracy", "new_accuracy", "mean_accuracy", "old_before", "old_answers_equal")
        rows = rows_of(measures, phase=("trial", "final"), arm=no_forgetting.LABELS, rate=(0.1,), seed=(0, 1))
    elif name == "match_scale":
        keys = {"arm": ("none", "match"), "optimizer": ("sgd",), "rate": (0.005,), "seed": (0, 1), "epoch": (0, 1)}
        rows = rows_of(("test_error",), **keys)
        more = {"drift": rows_of(("mean",), **keys, block=("block3_pool_grow1", "block4_pool_grow1"))}
    else:
        measures = ("test_error", "train_loss", "eager_difference", "parameters")
        rows = rows_of(measures, arm=("trunk", *grow_vgg.ARMS), seed=(0, 1), epoch=(0, 1), macs=(10**12,))
        more = {"drift": rows_of(("mean",), arm=("identity",), seed=(0,), epoch=(0,), block=("a",))}
    lab.Lab(name, sizes, (0, 1), "cifar10", folder).write(rows, **more)
