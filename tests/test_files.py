"""What the three programs share: whole files, one line for a failure, the device, and that all processes see the same."""
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, texture
from safetensors.torch import load_file

import train
from ldm import data, parallel
from ldm.files import Fail, pick_device, run, same_everywhere, save_tensors, save_text
from ldm.runs import public_name


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    """The limit of the system on a file's size stands in for a full disk."""
    code = ("import resource, sys, torch; sys.path.insert(0, sys.argv[1]); from ldm.files import run, save_tensors;"
            "save_tensors('x.safetensors', {'a': torch.ones(3)}, {});"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "run(lambda: save_tensors('x.safetensors', {'a': torch.ones(9999)}, {}))")
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "x.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
def test_a_file_has_the_permissions_that_the_user_asks_for(tmp_path, monkeypatch):
    """Those of a file that `open` makes; and the mask, which is the whole process's, is never touched."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as m:
            m.setattr(os, "umask", lambda mask: pytest.fail("the mask of the process was changed"))
            save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
            save_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640, 0o640]


@pytest.mark.parametrize("problem, words", [
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), "smaller --batch"), (MemoryError(), "smaller --batch"),
    (OSError(28, "No space left on device", "x.csv"), "No space left on device: x.csv"), (Fail("no such\nthing"), "no such thing")])
def test_a_failure_is_one_line(problem, words, capsys):
    def main():
        raise problem
    with pytest.raises(SystemExit) as stop:
        run(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_help_is_printed_on_a_console_without_greek_letters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run(train.main)
    out.flush()
    assert stop.value.code == 0 and b"? of LoRA (default: the rank)" in out.buffer.getvalue()


def test_several_processes_do_without_apples_gpu(monkeypatch):
    """Its tensors cannot be exchanged between processes."""
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "cpu"
    with pytest.raises(Fail, match="one process"):
        pick_device("mps")


def test_a_process_that_sees_other_files_than_the_first_one_says_so(tmp_path, monkeypatch):
    same_everywhere("weights", {"base": "a"})
    monkeypatch.setattr(parallel, "agreed", lambda value: {"base": "b"} if isinstance(value, dict) else [])
    with pytest.raises(Fail, match="other weights"):
        same_everywhere("weights", {"base": "a"})
    texture(0).save(tmp_path / "a.png")
    with pytest.raises(Fail, match="a.png is not in the cache"):        # the first process sees no image that is not cached
        data.Cache(tmp_path / "cache", "vae", "encoder", 64).fill([tmp_path / "a.png"], None, 64)


@pytest.mark.parametrize("source, public", [
    ("owner/name", "owner/name"), ("/gone/to/weights", "weights"), ("--data=/home/someone/patches", "--data=patches"), ("--data=/a=b/c", "--data=c"),
    ("--rank", "--rank"), ("1.5", "1.5"), ("chaoyang/", "chaoyang"), ("toy", "toy"), ("--sd15=owner/name", "--sd15=owner/name")])
def test_of_a_path_no_more_than_its_end_is_told(source, public):
    assert public_name(source) == public


def test_a_folder_of_patches_may_be_called_toy(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--sd15", "toy", "--data", "toy"])
    args = train.parse_args()
    assert args.data == str(tmp_path / "toy") and args.sd15 == "toy"        # found again from any other folder


def test_only_a_runs_own_pictures_of_an_earlier_choice_are_removed_and_only_at_its_beginning(tmp_path):
    """Not the user's, not by way of links, not those of another run that is linked to."""
    def samples(run, references, anew):
        train.ValidationSamples(tmp_path / run, references, [], SimpleNamespace(kind="encoder"), 32, anew)

    def there():
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png") if path.parent.parent.name == "real"}
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    texture(0).save(a), texture(1).save(b)
    samples("x", {"one/a": a}, anew=True)
    samples("other", {"two/a": a}, anew=True)
    texture(3).save(tmp_path / "x/real/one/mine.png")
    os.symlink(tmp_path / "other/real/two", tmp_path / "x/real/two")
    before = there()
    assert {"x/real/one/a.png", "x/real/one/mine.png", "other/real/two/a.png"} <= before
    samples("x", {"one/b": b}, anew=False)
    assert there() == before | {"x/real/one/b.png"}
    samples("x", {"one/b": b}, anew=True)
    assert there() == (before | {"x/real/one/b.png"}) - {"x/real/one/a.png"}
    assert np.array_equal(np.asarray(data.load_rgb(tmp_path / "x/real/one/mine.png")), np.asarray(texture(3)))
