"""sample.py as a program: stored embeddings, balance, labels.csv, provenance, and where it writes."""
import csv
import gc
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, program
from PIL import Image
from safetensors.torch import save_file

import sample
from ldm.app import Fail
from ldm.data import is_generated, load_rgb, save_image
from ldm.encoder import open_encoder
from ldm.runs import Lock

TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

@pytest.fixture(scope="module")
def embeddings(trained, uni2h, dataset, tmp_path_factory):
    """Two references, their embeddings (2, 192), the arguments of a quick call, and its --out for the two."""
    paths, out = sorted((dataset / "test").iterdir())[:2], tmp_path_factory.mktemp("references") / "a"
    rows = torch.from_numpy(open_encoder(uni2h).extract(paths, "cpu")).float()
    arguments = ["--run", trained, "--steps", 2]
    program("sample.py", *arguments, "--ref", *paths, "--out", out, cwd=out.parent)
    return paths, rows, arguments, out

def pixels(folder):
    return {path.name.split("_seed")[1]: np.asarray(load_rgb(path)).astype(int)
            for path in Path(folder).rglob("*.png")}

def test_stored_embeddings_give_the_images_of_their_references_without_encoder(
        embeddings, tmp_path, monkeypatch):
    _, rows, arguments, out = embeddings
    monkeypatch.setattr(sample, "open_encoder", None)
    np.save(tmp_path / "e.npy", rows.numpy())
    result = program("sample.py", *arguments, "--embedding", "e.npy", "--out", "b", cwd=tmp_path)
    a, b = pixels(out / "cfg1.3"), pixels(tmp_path / "b/cfg1.3")
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]).max() <= 1 for k in a)
    assert (tmp_path / "b/cfg1.3/e-0001_seed1_cfg1.3.png").exists() and not (tmp_path / "b/real").exists()
    assert "To compare" not in result.stdout

def test_the_readmes_lines_store_embeddings_that_sample_py_takes(embeddings, uni2h, tmp_path, monkeypatch):
    paths, rows, arguments, _ = embeddings
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- tested: features -->\n```python\n")[1].split("```")[0]
    load_rgb(paths[0]).save(tmp_path / "patch.png")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("open_encoder()", f"open_encoder({str(uni2h)!r})"), {})
    assert np.allclose(np.load("features.npy"), rows[:1], atol=1e-5)
    program("sample.py", *arguments, "--embedding", "features.npy", "--out", "b", cwd=tmp_path)
    assert (tmp_path / "b/cfg1.3/features-0000_seed0_cfg1.3.png").exists()

@pytest.mark.parametrize("name, save", [
    ("a.npy", np.save), ("b.npy", lambda path, x: np.save(path, x.astype(">f8"))),
    ("c.npz", lambda path, x: np.savez(path, names=np.array(["a", "b"]), features=x, n=np.array(2.0))),
    ("e.pt", lambda path, x: torch.save(torch.from_numpy(x), path)),
    ("f.pt", lambda path, x: torch.save({"e": torch.from_numpy(x), "label": torch.arange(2)}, path)),
    ("g.safetensors", lambda path, x: save_file({"e": torch.from_numpy(x), "xy": torch.ones(2, 2)}, path))])
@pytest.mark.parametrize("shape", [(2, 6), (6,)])
def test_embeddings_are_read_from_what_people_store_them_in(name, save, shape, tmp_path):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    save(tmp_path / name, x)
    rows = sample.read_embeddings(tmp_path / name, 6)
    assert rows.dtype == torch.float32 and np.allclose(rows, x.reshape(-1, 6), atol=1e-6)

@pytest.mark.parametrize("x, words", [
    (np.zeros((2, 5)), r"\(2, 5\); the adapter needs one array \(n, 6\)"), (np.zeros((0, 6)), "needs one"),
    (np.full((2, 6), np.inf), "embedding 0 is zero, or not"), (np.zeros((2, 6), int), "needs one array"),
    (np.array([[1] * 6, [1e300] * 6]), "embedding 1 is zero, or not"), (np.float64(1), "needs one array"),
    (np.array([[1.0] * 6, [0.0] * 6]), "embedding 1 is zero, or not"),
    (np.array([{"a": 1}]), "holds no embeddings"), (b"", "holds no embeddings"), (None, "no such file")])
def test_what_is_no_embedding_is_refused_in_one_line(x, words, tmp_path):
    path = tmp_path / "e.npy"
    if isinstance(x, bytes):
        path.write_bytes(x)
    elif x is not None:
        np.save(path, x)
    with pytest.raises(Fail, match=words):
        sample.read_embeddings(path, 6)
    torch.save([torch.ones(6)], tmp_path / "list.pt")
    with pytest.raises(Fail, match="holds no state dict"):
        sample.read_embeddings(tmp_path / "list.pt", 6)
    (tmp_path / "e.h5").touch()
    with pytest.raises(Fail, match="of another kind; pass .npy, .npz"):
        sample.read_embeddings(tmp_path / "e.h5", 6)

def test_two_models_and_an_adapter_that_is_replaced_meanwhile_are_refused(embeddings, tmp_path, monkeypatch):
    paths, _, arguments, _ = embeddings
    with pytest.raises(Fail, match="--adapter: not allowed with argument --run"):
        sample.parse_args([*map(str, arguments), "--adapter", "x", "--ref", "y"])
    adapter = Path(shutil.copy(arguments[1] / "adapter-best.safetensors", tmp_path))
    build = sample.load_model
    def slow(*args):
        model = build(*args)
        adapter.write_bytes(adapter.read_bytes()[:-4] + bytes(4))
        return model
    monkeypatch.setattr(sample, "load_model", slow)
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "split.json"):
        shutil.copy(arguments[1] / name, tmp_path)
    with pytest.raises(Fail, match="was replaced meanwhile"):
        sample.main(["--adapter", str(adapter), "--ref", str(paths[0]), "--steps", "2", "--out", "out"])
    assert not Path("out").exists()

def test_two_calls_into_one_folder_do_not_take_each_others_names(embeddings, tmp_path, monkeypatch):
    """Both would see no samples there, and name references of equal names alike: one waits or is repeated."""
    paths, _, arguments, _ = embeddings
    out, build = tmp_path / "out", sample.load_model
    arguments = [*map(str, arguments), "--ref", str(paths[0]), "--steps", "1", "--out", str(out)]
    def meanwhile(*args):
        (out / "samples.json").parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "samples.json", out)
        return build(*args)
    sample.main(arguments)
    saved = json.loads((out / "samples.json").read_text())
    saved["references"]["another"] = "0"
    (tmp_path / "samples.json").write_text(json.dumps(saved))
    shutil.rmtree(out)
    monkeypatch.setattr(sample, "load_model", meanwhile)
    with pytest.raises(Fail, match="added samples meanwhile; repeat the command"):
        sample.main(arguments)
    gc.collect()                # the failed call's lock
    lock = Lock(out)
    with pytest.raises(Fail, match=f"another process is using {out}"):
        sample.main(arguments)
    assert not list(out.rglob("*.png"))
    del lock
    sample.main(arguments)
    assert len(list(out.rglob("cfg*/**/*.png"))) == 1

def test_samples_inside_a_folder_of_patches_are_refused_and_one_that_cannot_be_looked_up_is_ignored(tmp_path):
    """A run's images may lie in a folder that is private or gone; here its name is too long."""
    assert sample.read_samples(tmp_path / "out", {}, ["x" * 300]) == {}
    with pytest.raises(Fail, match="is inside"):
        sample.read_samples(tmp_path / "out", {}, [tmp_path])

def table(out):
    return list(csv.DictReader(open(out / "labels.csv")))

def test_labels_csv_and_the_marks_in_the_images_stay_right_over_several_calls(trained, tmp_path):
    arguments = ["--run", trained, "--steps", 2, "--split", "val", "--out", "out"]
    result = program("sample.py", *arguments, "--cfg", 1, cwd=tmp_path)
    [first, *_] = (tmp_path / "out/cfg1").rglob("*.png")
    label = first.parent.name
    program("sample.py", *arguments, "--cfg", 1.5, "--label", label, "--n", 8, cwd=tmp_path)
    rows, made = table(tmp_path / "out"), sorted((tmp_path / "out").glob("cfg*/*/*.png"))
    assert [row["file"] for row in rows] == [p.relative_to(tmp_path / "out").as_posix() for p in made]
    assert {(p.parent.name, p.stem.split("_seed")[1]) for p in made} == {
        (row["label"], f"{row['seed']}_cfg{row['guidance'].removesuffix('.0')}") for row in rows}
    adapter = sample.file_sha256(sample.find_adapter(trained, None).path)
    assert {row["adapter"] for row in rows} == {adapter}
    assert all(f"{row['label']}/" in row["reference"] for row in rows)
    text = Image.open(made[0]).info
    assert text["adapter"] == adapter and f'DigitalSourceType="{TERM}"' in text["XML:com.adobe.xmp"]
    real, fake = (next(folder.rglob("*.png")) for folder in (tmp_path / "out/real", trained / "fake"))
    assert is_generated(made[0]) and is_generated(fake) and not is_generated(real)
    made[0].unlink()
    program("sample.py", *arguments, "--cfg", 1.5, "--label", label, "--n", 8, cwd=tmp_path)
    assert table(tmp_path / "out") == [row for row in rows if row["file"] != rows[0]["file"]]
    # nine tiles of 256 a row, the reference and its eight samples
    assert Image.open(tmp_path / "out/sheet-cfg1.5.png").width == 9 * 260
    command = shlex.split(result.stdout.split("To compare: ")[1])
    assert Path(command[1]).is_file() and command[2:] == ["out/real", "out/cfg1", "--per-class"]

def test_an_image_of_any_program_that_says_it_is_generated_is_recognised(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.save(tmp_path / "a.jpg", xmp=f"<x>{TERM}</x>".encode())
    save_image(tmp_path / "b.png", image, reference="x", seed=0, cfg=1.3)          # of an earlier version
    save_image(tmp_path / "c.png", image, reference="x")
    (tmp_path / "d.png").write_bytes(b"")
    assert [is_generated(tmp_path / name) for name in ("a.jpg", "b.png", "c.png", "d.png", "e.png")] == [
        True, True, False, False, False]

def test_balance_fills_each_class_up_to_the_largest_spread_over_its_references():
    labels = {f"a{i}": "a" for i in range(7)} | {"b0": "b", "b1": "b"} | {f"c{i}": "c" for i in range(5)}
    args = SimpleNamespace(n=1, seed=5, label=None, limit=None, balance=True, split="train")
    chosen = sample.choose(args, labels)
    assert {name: len(seeds) for name, seeds in chosen.items()} == {"b0": 2, "b1": 3, "c2": 1, "c4": 1}
    assert sorted(s for seeds in chosen.values() for s in seeds) == list(range(5, 12))
    args.label = ["c"]
    assert sample.choose(args, labels) == {name: chosen[name] for name in ("c2", "c4")}
    with pytest.raises(Fail, match="omit --balance"):
        sample.choose(args, {"a": "a", "c": "c"})

def test_a_sheet_shows_every_class_and_eight_samples_of_each(tmp_path, monkeypatch):
    """56 references of four classes, sorted: eight of each are shown."""
    names = [f"{label}/{i}" for label in "abcd" for i in range(14)]
    jobs = [sample.Job(Path(f"{name}-{seed}"), name, seed, None) for name in names for seed in range(9)]
    seen = []
    monkeypatch.setattr(sample, "save_sheet", lambda path, groups, texts: seen.extend([groups, texts]))
    sample.write_sheet(None, {name: Path(name) for name in names}, jobs)
    groups, texts = seen
    assert len(groups) == 32 and {len(group) for group in groups} == {9} and len(texts) == 32 * 9

def test_an_image_that_is_not_finite_is_refused_and_not_written(embeddings, tmp_path):
    np.save(tmp_path / "e.npy", np.full(192, 3e38, np.float32))
    result = program("sample.py", *embeddings[2], "--embedding", "e.npy", "--out", "b", cwd=tmp_path,
                     check=False)
    assert result.returncode == 2 and "not finite" in result.stderr and "adapter" in result.stderr
    assert not list((tmp_path / "b").rglob("*.png")) and len(result.stderr.strip().splitlines()) == 1

@pytest.mark.parametrize("out", ["data/new", "data", "run", "run/real"])
def test_samples_do_not_go_where_they_would_be_taken_for_patches_or_lie_among_other_files(
        out, trained, dataset, tmp_path):
    (tmp_path / "data").symlink_to(dataset)
    (tmp_path / "run").symlink_to(trained)
    before = sorted(p for folder in (dataset, trained) for p in folder.rglob("*"))
    result = program("sample.py", "--run", trained, "--split", "val", "--out", out, cwd=tmp_path, check=False)
    assert result.returncode == 2 and f"--out {out}" in result.stderr, result.stderr
    assert before == sorted(p for folder in (dataset, trained) for p in folder.rglob("*"))
