"""Arguments: every wrong one ends in one line that names it; Settings and Sampling are records."""
import json
import sys
from dataclasses import asdict, fields, replace
from typing import get_args

import pytest
from conftest import process, program
from PIL import Image

from ldm.app import Fail, run_program
from ldm.runs import MAY_DIFFER, THIS_CALL, Settings, check_or_create, parse_settings, read_settings
from ldm.weights import SD15
from sample import Sampling

# SMALL: the arguments of a small run; RUN: a finished run; DATA: a dataset; BYTE: no UTF-8.
WRONG = [
    ("train.py SMALL --data nowhere", "nowhere"), ("train.py SMALL --rank 0", "--rank"),
    ("train.py SMALL --lr nan", "--lr"), ("train.py SMALL --cfg-drop 1.5", "--cfg-drop"),
    ("train.py SMALL --size 100", "multiple of 64"), ("train.py SMALL --sd15 nowhere", "nowhere"),
    ("train.py SMALL --uni2h nowhere", "nowhere"), ("train.py SMALL --split nowhere.json", "nowhere.json"),
    ("train.py SMALL --device abacus", "abacus"), ("train.py SMALL --resume nowhere", "nowhere"),
    ("train.py SMALL --depth 4", "--depth"), ("train.py SMALL --unknown", "--unknown"),
    ("train.py SMALL --features eyes", "--features"),
    ("train.py --sd15 elsewhere", "--data"), ("train.py --data nowhere", "nowhere"),
    ("train.py --data ~nobody-of-this-name/x", "~nobody"),
    ("train.py --data DATA --sd15 ../nowhere", "--sd15"),
    ("train.py --data DATA --uni2h ../nowhere --sd15 toy", "--uni2h"), ("train.py --run runs/BYTE", "UTF-8"),
    ("train.py --hidden 1000000000000000000", "--hidden"), ("train.py --rank 10000000000000000000", "--rank"),
    ("train.py --size 6400000000", "--size"), ("train.py --lr 1e300", "--lr"),
    ("train.py --batch 10000000000000000000", "--batch"),
    ("train.py --uni2h nowhere", "nowhere"), ("train.py --size 100", "multiple of 16"),
    ("train.py --seed 4294967296", "--seed"), ("sample.py --ref x --seed 4294967296", "--seed"),
    ("train.py --split official", "--data"), ("train.py --run a --resume b", "--resume"),
    ("sample.py", "--ref"), ("sample.py --ref missing.png --run RUN", "missing.png"),
    ("sample.py --ref RUN/grids --cfg nan", "--cfg"), ("sample.py --ref RUN/log.csv --run RUN", "log.csv"),
    ("sample.py --ref ~nobody-of-this-name", "no run"), ("sample.py --split val --run nowhere", "nowhere"),
    ("train.py --resume EMPTY", "an argument is empty"), ("train.py --data=", "an argument is empty"),
    ("sample.py --ref EMPTY", "an argument is empty"), ("fid.py EMPTY RUN/real", "an argument is empty"),
    ("sample.py --ref RUN --run RUN", "a run's are in real/"),
    ("fid.py nowhere nowhere", "nowhere"), ("fid.py ~real ~fake", "~real")]

@pytest.mark.parametrize("command, culprit", WRONG)
def test_a_wrong_argument_ends_in_one_line_and_writes_nothing(
        command, culprit, small, trained, dataset, tmp_path):
    name, *words = command.replace("RUN", str(trained)).replace("DATA", str(dataset)).split()
    words = [word.replace("BYTE", "\udcff").replace("EMPTY", "") for word in words]
    arguments = [a for word in words for a in (small if word == "SMALL" else [word])]
    start = process if command == "fid.py nowhere nowhere" else program     # one of them in its own process
    result = start(name, *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and culprit in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]

def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return parse_settings("")[0]

def test_the_defaults_are_the_papers_and_with_the_toy_its_own(monkeypatch, dataset):
    settings = parse(monkeypatch, "--sd15", "toy", "--data", dataset, "--epochs", 3)
    assert (settings.epochs, settings.size, settings.uni2h) == (3, 64, "toy")       # an argument beats them
    settings = parse(monkeypatch, "--data", dataset)
    values = settings.epochs, settings.size, settings.lr, settings.hidden, settings.sd15, settings.alpha
    assert values == (12, 512, 5e-5, 1024, SD15, 8.0)

def test_a_setting_that_an_older_run_lacks_has_its_default(trained, tmp_path, monkeypatch):
    """So that a new setting does not keep earlier runs from resuming."""
    config = json.loads((trained / "config.json").read_text())
    for name in ("token_norm", "val_every", "cfg_drop"):
        del config["args"][name]
    config["args"] |= dict(quiet=True, parameters=False, init="a.pt")              # what older versions saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_settings(tmp_path) == replace(read_settings(trained), quiet=True)
    (tmp_path / "adapter.safetensors").touch()
    check_or_create(tmp_path, parse(monkeypatch, "--resume", tmp_path), config["sha256"])
    config["args"]["no_such_setting"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Fail, match="config.json is damaged or of another version.*--no-such-setting"):
        read_settings(tmp_path)

def test_a_run_is_not_resumed_with_another_setting_but_those_that_may_differ(tmp_path):
    a = Settings(data="x", run="y", alpha=8.0)
    check_or_create(tmp_path, a, {})
    (tmp_path / "adapter.safetensors").touch()
    check_or_create(tmp_path, a, {})
    for f in fields(Settings):
        kind = (*get_args(f.type), f.type)[0]
        b = replace(a, **{f.name: True if kind is bool else kind("7")})
        if f.name in MAY_DIFFER | THIS_CALL:
            check_or_create(tmp_path, b, {})
            continue
        with pytest.raises(Fail, match=f"is a run with {f.name.replace('_', '-')}"):
            check_or_create(tmp_path, b, {})

def test_all_of_a_sampling_is_in_the_png_and_only_the_guidance_in_its_name(trained, dataset, tmp_path):
    patch = next((dataset / "test").iterdir())
    arguments = ["--run", trained, "--ref", patch, "--out", "out"]
    program("sample.py", *arguments, "--steps", 2, "--cfg", 1.5, cwd=tmp_path)
    [path] = (tmp_path / "out/cfg1.5").glob("*.png")
    text = Image.open(path).text
    assert asdict(Sampling()).keys() <= text.keys() and (text["cfg"], text["steps"]) == ("1.5", "2")
    assert text["reference"] == patch.stem and text["seed"] == "0"
    assert path.stem.endswith("_seed0_cfg1.5") and Sampling(2.0).name == "cfg2"
    other = program("sample.py", *arguments, "--steps", 3, cwd=tmp_path, check=False)
    assert other.returncode == 2 and "another steps" in other.stderr
    guard = json.loads((tmp_path / "out/samples.json").read_text())
    assert guard.keys() > asdict(Sampling()).keys() - {"cfg"}
    # as if the option were newer than the folder
    del guard["steps"]
    (tmp_path / "out/samples.json").write_text(json.dumps(guard))
    assert program("sample.py", *arguments, "--steps", 3, cwd=tmp_path, check=False).returncode == 2
    program("sample.py", *arguments, "--steps", Sampling().steps, cwd=tmp_path)

@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_program_prints_failures_alone(quiet, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", *["--quiet"] * quiet])
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def main():
        print("a loss")
        raise Fail("no such folder")
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and "no such folder" in err and ("a loss" in out) != quiet
