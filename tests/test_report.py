"""The metrics beside the distances, each on a case whose answer is known; and the report on
tiny runs."""
import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT, program, texture, timm_folder
from PIL import Image

import fid
from ldm import report
from ldm.app import read_csv, save_csv

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

def test_the_interval_of_the_cosines_difference_excludes_0_where_the_reference_is_used_alone():
    def difference(a, b):
        return float(np.subtract(*fid.fidelity(a, b)))
    references, noise = RNG(6).normal(size=(40, 16)), RNG(7).normal(size=(40, 16))
    low, high = fid.bootstrap_interval(difference, references + noise, references)
    assert 0.5 < low < difference(references + noise, references) < high < 1
    low, high = fid.bootstrap_interval(difference, noise, references)
    assert low < 0 < high

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
    lines = report.as_markdown([dict(a=0, b=0.0, c=None, long="")]).splitlines()
    assert lines == ["| a   | b   | c   | long |", "| --- | --- | --- | ---- |", "| 0   | 0   | -   | -    |"]
    assert report.as_markdown([dict(label="a|b")]).splitlines()[2] == r"| a\|b  |"       # one cell

def test_the_report_of_a_run_writes_every_table_and_picture(trained, monkeypatch):
    assert report.SWEEP == [f"{w / 10:.1f}" for w in range(10, 21)]
    monkeypatch.setattr(report, "SWEEP", ["1.0", "1.3"])
    main = report.sample.main
    monkeypatch.setattr(report.sample, "main", lambda arguments: main([*arguments, "--steps", "2"]))
    result = program("ldm.report", trained, "--limit", 8, cwd=trained)
    out = trained / "report"
    table = {path.stem: list(csv.DictReader(open(path))) for path in out.glob("*.csv")}
    assert set(table) == {"table4", "table5", "table7", "table8", "fidelity", "memorisation", "usefulness",
                          "reader-key"}
    assert [row["guidance"] for row in table["table5"]] == ["1.0", "1.3"]
    for row in table["table7"]:
        assert float(row["fid_low"]) <= float(row["fid"]) <= float(row["fid_high"]) and int(row["n"]) > 1
    for row in table["fidelity"]:
        difference = float(row["cosine_own"]) - float(row["cosine_others"])
        assert float(row["difference_low"]) <= difference <= float(row["difference_high"])
    assert [row["part"] for row in table["table7"]] == ["train", "val", "test"]
    first = table["memorisation"][0]
    assert float(first["closer"]) <= 0.5 and first["images"] == "real val"
    assert [row["train"] for row in table["usefulness"]] == ["real"] + [
        f"real + {k} x {kind}" for kind in ("synthetic", "flips") for k in (1, 2, 5)]
    train, *parts = table["table7"]
    assert train["floor_vae"] == "" and all(0 < float(row["floor_vae"]) for row in parts)
    text = (out / "report.md").read_text()
    assert "## Reader study" in text and (out / "reader.html").read_text().count("data:image/png") > 1
    page = (out / "report.html").read_text()
    assert "## Table 5\n\nvalidation FID" in text and "<h2>Table 5</h2>\n\nvalidation FID" in page
    assert page.count("<pre") == page.count("</pre>") == 7 and page.count("<h2>") == 10
    assert page.count('<img src="data:image/png;base64,') == 3
    for picture in ("epochs.png", "figure5.png", "memorisation.png"):
        assert Image.open(out / picture).width > 32 and f"({picture})" in text and picture not in page
    assert "Table 5" in result.stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*cfg*.png")}
    judge = trained.parent / "judge"
    judge.mkdir()
    timm_folder(judge, "vit_tiny_patch16_224", dict(input_size=[3, 32, 32]), img_size=32, depth=1)
    program("ldm.report", trained, "--limit", 8, "--only", "fidelity", "--judge", judge, cwd=trained)
    assert [row["features"] for row in csv.DictReader(open(out / "fidelity.csv"))] == ["judge", "encoder"]
    # nothing is sampled twice
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*cfg*.png")}

def test_the_picture_of_the_epochs_is_blue_where_the_loss_fell_and_red_where_it_rose(tmp_path):
    """Halved: full blue, the largest change; a quarter up: half red; empty or unchanged: white."""
    rows = [{"epoch": k, "val_loss": 1, **{f"val_loss_{i}": x for i, x in enumerate(losses)}}
            for k, losses in enumerate([(0.4, 0.8, "", 0.1), (0.2, 1.0, "", 0.1)])]
    save_csv(tmp_path / "log.csv", rows)
    table = report.table4(SimpleNamespace(folder=tmp_path, out=tmp_path))
    assert [row["val_loss_0"] for row in table] == [0.4, 0.2]
    pixels = np.asarray(Image.open(tmp_path / "epochs.png"))[16::32, 80 + 24::48]
    white = [255] * 3
    assert pixels.tolist() == [[white, x] for x in (white, [0, 0, 255], [255, 127, 127], white, white)]
    save_csv(tmp_path / "log.csv", [dict(epoch=1, val_loss=0.2)])       # of a version without the tenths
    assert report.table4(SimpleNamespace(folder=tmp_path, out=tmp_path)) == [dict(epoch=1, val_loss=0.2)]

# ---- the reader study --------------------------------------------------------------------------------------

def make_study(folder, labels, cfg="1.3"):
    """reader.html and its key, of a patch for each label -> their folder."""
    files = {}
    for kind in report.KINDS:
        files[kind] = [folder / f"{kind}-{i}.png" for i in range(len(labels))]
        for i, file in enumerate(files[kind]):
            texture(i + len(labels) * (kind == "real"), 64).save(file, icc_profile=b"of the scanner")
    real, fake = (lambda *_, kind=kind: files[kind] for kind in report.KINDS)
    report.reader(SimpleNamespace(out=folder, cfg=cfg, samples=folder / "0f0f", real=real, fake=fake,
                                  labels=lambda *_: np.array(labels)))
    return folder

@pytest.fixture
def study(tmp_path):
    """One of 9 patches of the classes `a` and `b & "c"`."""
    return make_study(tmp_path, ["a"] * 4 + ['b & "c"'] * 5)

def test_two_studies_differ_in_their_order_and_each_of_forty_classes_has_its_key(tmp_path):
    """One order for all would repeat the answers of the first study in the second."""
    truths = []
    for cfg in ("1.3", "1.5", "1.3"):
        make_study(tmp_path, [f"class {i}" for i in range(40)], cfg)
        truths.append([row["truth"] for row in read_csv(tmp_path / "reader-key.csv")])
    assert truths[0] != truths[1] and truths[0] == truths[2]
    # pinned: answers to a page that an older version wrote are judged by the key of a newer one
    assert "".join(truth[0] for truth in truths[0][:12]) == "rrrrssrsrrrs"
    keys = re.findall(r'name=".*?" .* accesskey="(.*?)"', (tmp_path / "reader.html").read_text())
    assert len(keys) == len({*keys}) == 2 + 5 + 40 and min(map(len, keys)) == 1

def test_a_reader_study_has_its_patches_inside_and_not_its_solution(study):
    page, key = (study / "reader.html").read_text(), read_csv(study / "reader-key.csv")
    images = json.loads(re.search(r"const { study, images } = (.*?}})", page)[1])["images"]
    assert list(images) == [row["item"] for row in key] and len(images) == 9
    assert sorted(row["truth"] for row in key) == ["real"] * 5 + ["synthetic"] * 4
    assert [row["truth"] for row in key] != sorted(row["truth"] for row in key)
    for row in key:
        data = base64.b64decode(images[row["item"]].removeprefix("data:image/png;base64,"))
        image = Image.open(io.BytesIO(data))
        assert image.size == (64, 64) and not image.info
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(row["file"])))
        assert row["truth"] in row["file"] and row["file"] not in page and row["reference"] not in page
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not [tag for tag, has in tags if {"src", "href"} & has.keys()] and "http" not in page
    assert [has["value"] for tag, has in tags if has.get("name") == "class"] == ["a", 'b & "c"']

SHOW = "document.body.append(Object.assign(document.createElement('pre'), { textContent: find('csv').href }))"
PRESS = "for (const key of {}) document.dispatchEvent(new KeyboardEvent('keydown', {{ key }}))"

def test_a_browser_takes_answers_by_key_keeps_them_and_gives_them_as_csv(study):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("there is no Chromium")
    page, key = (study / "reader.html").read_text(), read_csv(study / "reader-key.csv")

    def answers(script):
        """The CSV after a script, in one profile: as if the page were closed and opened again."""
        (study / "page.html").write_text(f"{page}<script>{script}; {SHOW}</script>")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={study / 'profile'}", f"file://{study / 'page.html'}"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        uri = html.unescape(re.search("<pre>(.*?)</pre>", dom)[1])
        return list(csv.DictReader(unquote(uri.partition(",")[2]).splitlines()))

    typed = """find('reader').value = 'Ann, "B"'; find('reader').oninput(); """
    keys = ["r", "b", "4", "s", "ArrowRight", "s", "a", "1", "ArrowRight", "5", "ArrowLeft"]
    first, second = answers(typed + PRESS.format(keys))
    assert first.pop("reader") == second.pop("reader") == 'Ann, "B"'
    assert 0 <= float(first.pop("seconds")) < 60 and float(second.pop("seconds")) >= 0
    assert [*first.values()] == [key[0]["item"], "synthetic", 'b & "c"', "4"]
    assert [*second.values()] == [key[1]["item"], "synthetic", "a", "1"]
    assert [row["item"] for row in answers("find('progress')")] == [row["item"] for row in key[:2]]
    denied = "<script>Object.defineProperty(window, 'localStorage', { get() { throw 'no' } })</script>"
    page, kept = denied + page, page
    assert [row["item"] for row in answers(PRESS.format(["ArrowRight", "r"]))] == [key[1]["item"]]
    page = kept
    again = "window.confirm = () => true; buttons.find(b => b.textContent.includes('again')).click(); "
    assert [row["item"] for row in answers(again + PRESS.format(["r"]))] == [key[0]["item"]]

def write_answers(study, name, wrong=(), **more):
    """The answers of a reader who is right but about the items `wrong`."""
    rows = [dict(reader=name, item=row["item"], answer=report.KINDS[(row["truth"] == "real") == (i in wrong)],
                 confidence=3, seconds=1) | {"class": row["label"]} | more
            for i, row in enumerate(read_csv(study / "reader-key.csv"))]
    save_csv(study / f"{name}.csv", rows)
    return study / f"{name}.csv"

def test_readers_are_scored_with_wilsons_interval_and_cohens_kappa(study, capsys):
    key = read_csv(study / "reader-key.csv")
    synthetic = [i for i, row in enumerate(key) if row["truth"] == "synthetic"]
    report.score_readers(study, [write_answers(study, "A"), write_answers(study, "B", synthetic[:2])])
    scores = {(row["reader"], row["patches"]): row for row in read_csv(study / "reader-scores.csv")}
    of_a, of_b = scores["A", "all"], scores["B", "synthetic"]
    # Wilson (1927), z = 1.96; of n: all right, low end n / (n + z²); half right, ½ ± z / 2 / √(n + z²)
    assert float(of_a["low"]) == pytest.approx(9 / (9 + 1.96 ** 2), abs=1e-4) and of_a["high"] == "1.0"
    assert (of_b["n"], of_b["right"]) == ("4", "0.5") and scores["B", "real"]["right"] == "1.0"
    assert float(of_b["high"]) - 0.5 == pytest.approx(0.98 / (4 + 1.96 ** 2) ** 0.5, abs=1e-4)
    assert sum(int(scores["B", f"synthetic {label}"]["n"]) for label in ("a", 'b & "c"')) == 4
    # A: 5 real, 4 synthetic; B: 7 and 2; 7 of 9 equal; by chance (5 · 7 + 4 · 2) / 81
    [pair] = read_csv(study / "reader-agreement.csv")
    assert float(pair["kappa"]) == pytest.approx((7 / 9 - 43 / 81) / (1 - 43 / 81))
    assert "| A      | B     |" in capsys.readouterr().out

def test_cohens_kappa_is_1_of_equal_0_of_independent_and_none_of_constant_answers():
    x = dict(enumerate("rrss"))
    assert fid.cohen_kappa(x, x) == 1 and fid.cohen_kappa(x, dict(enumerate("rsrs"))) == 0
    assert fid.cohen_kappa({0: "r"}, {0: "r", 1: "s"}) is None and fid.cohen_kappa({0: "r"}, {1: "s"}) is None

def test_a_class_that_a_reader_left_out_counts_neither_as_right_nor_as_wrong(study):
    for name, more in dict(A={}, B={"class": ""}).items():
        rows = read_csv(write_answers(study, name))
        save_csv(study / f"{name}.csv", [row | more for row in rows[:4]] + rows[4:])
        report.score_readers(study, [study / f"{name}.csv"])
        assert read_csv(study / "reader-scores.csv")[0]["class_right"] == "1.0"
    report.score_readers(study, [write_answers(study, "C", **{"class": ""})])
    assert read_csv(study / "reader-scores.csv")[0]["class_right"] == ""
    save_csv(study / "C.csv", [{k: row[k] for k in ("reader", "item", "answer")}
                               for row in read_csv(study / "C.csv")])
    report.score_readers(study, [study / "C.csv"])          # a table without the column
    assert read_csv(study / "reader-scores.csv")[0]["class_right"] == ""

def test_answers_that_a_spreadsheet_saved_again_are_read(study):
    text = write_answers(study, "A").read_text()
    (study / "B.csv").write_text(text.replace("A,", "B,").replace(",", ";"), encoding="utf-8-sig")
    report.score_readers(study, [study / "A.csv", study / "B.csv"])
    assert read_csv(study / "reader-agreement.csv")[0]["kappa"] == "1.0"

@pytest.mark.parametrize("changes, words", [
    (dict(item="x"), "no answers to run/report/reader.html"), (dict(reader=""), "not one new reader"),
    (dict(answer="perhaps"), "an answer of another kind"), (dict(reader="B"), "not one new reader"),
    ("two", "not one new reader"), ("empty", "not one new reader"),
    (None, "does not exist; restore it, or pass another")])
def test_answers_to_another_study_or_given_twice_are_refused_in_one_line(changes, words, study, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report").symlink_to(study)
    files = [write_answers(study, "B"), tmp_path / "none.csv"]
    if changes:
        files[1] = write_answers(study, "C", **(changes if isinstance(changes, dict) else {}))
    if isinstance(changes, str):
        lines = files[1].read_text().splitlines(keepends=True)
        files[1].write_text("".join([*lines[:-1], "D" + lines[-1][1:]] if changes == "two" else lines[:1]))
    result = program("ldm.report", "run", "--score", *files, cwd=tmp_path, check=False)
    assert result.returncode == 2 and str(files[1]) in result.stderr and not result.stdout
    assert len(result.stderr.strip().splitlines()) == 1 and words in result.stderr

def test_answers_are_to_the_study_of_one_run(study, tmp_path):
    for run in ("run", "other"):
        (tmp_path / run).mkdir()
    (tmp_path / "run/report").symlink_to(study)
    answers = write_answers(study, "B")
    result = program("ldm.report", "run", "other", "--score", answers, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "other has no answers to run/report/reader.html" in result.stderr

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
