"""The metrics beside the distances, each on a case whose answer is known; and the report on
tiny runs."""
import csv
import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, program, timm_folder
from PIL import Image

import fid
from ldm import report

RNG = np.random.default_rng

def test_fidelity_of_copies_is_1_and_of_orthogonal_others_0():
    x = np.eye(5) * np.arange(1, 6)[:, None]
    assert fid.fidelity(x, x) == pytest.approx((1, 0))
    # the own one is among the four others
    assert fid.fidelity(np.roll(x, 1, 0), x) == pytest.approx((0, 0.25))

def test_the_nearest_centroid_is_the_class_of_the_nearest_direction():
    train, labels = np.array([[1.0, 0], [1, 0.2], [0, 1], [0.2, 1]]), np.array(["a", "a", "b", "b"])
    assert list(fid.nearest_centroid(train, labels, np.array([[9.0, 1], [0.1, 0.3]]))) == ["a", "b"]

def test_the_interval_holds_the_estimate_and_narrows_with_n():
    """For the distance of means of one number each, the bootstrap's spread is the standard error of their
    difference."""
    def distance(a, b):
        return float(a.mean() - b.mean())
    for n in (100, 1600):
        x, y = RNG(2).normal(size=(n, 1)), RNG(3).normal(3, 1, size=(n, 1))
        low, high = fid.bootstrap_interval(distance, x, y, repeats=2000)
        assert low < distance(x, y) < high and high - low == pytest.approx(2 * 1.96 * (2 / n) ** 0.5, rel=0.1)

def test_the_interval_of_a_frechet_distance_is_put_around_it():
    x, y = RNG(4).normal(size=(60, 30)), RNG(5).normal(0.3, 1, size=(60, 30))
    low, high = fid.bootstrap_interval(fid.frechet_distance, x, y)
    assert low < fid.frechet_distance(x, y) < high

def test_separable_classes_are_told_apart_and_inseparable_ones_are_not():
    labels = np.array(["a", "b", "c"]).repeat(200)
    centre = np.eye(3)[np.arange(3).repeat(200)]
    for scale, low, high in ((8.0, 0.99, 1.0), (0.0, 0.2, 0.47)):
        x, test = (scale * centre + RNG(s).normal(size=(600, 3)) for s in (6, 7))
        score = fid.balanced_accuracy(labels, fid.fit_linear(x, labels)(test))
        assert low <= score <= high

def test_the_boundary_of_two_classes_that_differ_in_their_mean_alone_lies_in_the_middle():
    x = np.concatenate([RNG(8).normal(-1, 1, (500, 1)), RNG(9).normal(1, 1, (500, 1))])
    guess = fid.fit_linear(x, np.array(["a"] * 500 + ["b"] * 500))
    assert (guess(np.array([[-0.1], [0.1]])) == ["a", "b"]).all()

def test_balanced_accuracy_is_the_mean_recall_of_the_classes():
    a, b = np.array(list("a" * 25 + "b" * 10)), np.array(list("a" * 20 + "b" * 5 + "a" * 4 + "b" * 6))
    assert fid.balanced_accuracy(a, b) == pytest.approx((0.8 + 0.6) / 2)

def test_a_table_shows_zero_as_zero_and_what_is_missing_as_a_dash():
    lines = report.as_markdown([dict(a=0, b=0.0, c=None, d="")]).splitlines()
    assert lines == ["| a | b | c | d |", "| --- | --- | --- | --- |", "| 0 | 0 | - | - |"]

def test_the_report_of_a_run_writes_every_table_and_picture(trained, monkeypatch):
    assert report.SWEEP == [f"{w / 10:.1f}" for w in range(10, 21)]
    monkeypatch.setattr(report, "SWEEP", ["1.0", "1.3"])
    main = report.sample.main
    monkeypatch.setattr(report.sample, "main", lambda arguments: main([*arguments, "--steps", "2"]))
    result = program("ldm.report", trained, "--limit", 8, cwd=trained)
    out = trained / "report"
    table = {path.stem: list(csv.DictReader(open(path))) for path in out.glob("*.csv")}
    assert set(table) == {"table4", "table5", "table7", "table8", "fidelity", "memorisation", "usefulness"}
    assert [row["guidance"] for row in table["table5"]] == ["1.0", "1.3"]
    for row in table["table7"]:
        assert float(row["fid_low"]) <= float(row["fid"]) <= float(row["fid_high"]) and int(row["n"]) > 1
    assert [row["part"] for row in table["table7"]] == ["train", "val", "test"]
    first = table["memorisation"][0]
    assert float(first["closer"]) <= 0.5 and first["images"] == "real val"
    assert [row["train"] for row in table["usefulness"]] == ["real"] + [
        f"real + {k} x {kind}" for kind in ("synthetic", "flips") for k in (1, 2, 5)]
    train, *parts = table["table7"]
    assert train["floor_vae"] == "" and all(0 < float(row["floor_vae"]) for row in parts)
    text = (out / "report.md").read_text()
    for picture in ("figure5.png", "memorisation.png"):
        assert Image.open(out / picture).width > 64 and f"({picture})" in text
    assert "Table 5" in result.stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*cfg*.png")}
    judge = trained.parent / "judge"
    judge.mkdir()
    timm_folder(judge, "vit_tiny_patch16_224", dict(input_size=[3, 32, 32]), img_size=32, depth=1)
    program("ldm.report", trained, "--limit", 8, "--only", "fidelity", "--judge", judge, cwd=trained)
    assert [row["features"] for row in csv.DictReader(open(out / "fidelity.csv"))] == ["judge", "encoder"]
    # nothing is sampled twice
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*cfg*.png")}

def test_the_twelve_rows_are_table_3_each_one_factor_from_the_baseline():
    rows = report.read_csv(ROOT / "ldm/table6.csv")
    factors = [tuple(map(int, list(row.values())[:5])) for row in rows]
    assert len(factors) == 12 and factors[0] == (8, 4, 2, 1024, 10)
    assert all(sum(x != y for x, y in zip(row, factors[0])) == 1 for row in factors[1:])
    values = [sorted(set(column)) for column in zip(*factors)]
    assert values == [[4, 8, 16], [1, 2, 4, 8], [2, 3], [512, 1024, 2048], [1, 5, 10, 20]]

def test_the_readmes_loop_gives_train_py_the_twelve_rows():
    loop = (ROOT / "README.md").read_text().split("cut into jobs:\n\n")[1].split("\n\n## ")[0]
    script = f"python() {{ echo $*; }}\n{loop}"
    lines = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 12 and lines[1] == (
        "train.py --data chaoyang/ --rank 4 --tokens 4 --depth 2 --hidden 1024 --lr-ratio 10 --val-cfg 1.3 "
        "--run runs/ablation/r4-t4-d2-w1024-x10")

def test_several_runs_are_compared_by_what_differs_and_only_the_finished_ones(trained, tmp_path):
    runs = [shutil.copytree(trained, tmp_path / name) for name in "abcd"]
    for run, changes in zip(runs, (dict(rank=4), dict(lr=1e-4), {}, dict(epochs=9))):
        config = json.loads((run / "config.json").read_text())
        config["args"] |= changes
        (run / "config.json").write_text(json.dumps(config))
    log = report.read_csv(runs[1] / "log.csv")
    report.save_csv(runs[1] / "log.csv", [row | {"fid_encoder": 1e-6} for row in log])
    (runs[2] / "config.json").unlink()
    first, second = report.table6(runs)
    assert (first["run"], first["rank"], first["lr"], first["lowest"]) == ("b", 2, 1e-4, 1e-6)
    assert (second["run"], second["rank"], second["lr"]) == ("a", 4, 5e-5)
    assert {first["score"], second["score"]} == {"fid_encoder"}
    with pytest.raises(report.Fail, match="finished run"):
        list(report.table6(runs[2:3]))
