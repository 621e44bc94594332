"""What the programs share: atomic files, one line for a failure, the device, equal files everywhere."""
import errno
import io
import os
import re
import runpy
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, start, texture
from safetensors.torch import load_file

import train
from ldm import app, data
from ldm.app import Fail, check_same, pick_device, run_program, save_tensors, save_text
from ldm.encoder import open_encoder
from ldm.runs import parse_settings, public_name
from ldm.weights import HUB_NAME, TensorFile, load_unet, open_sd15

def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    """The limit of the system on a file's size stands in for a full disk."""
    code = ("import resource, sys, torch; sys.path.insert(0, sys.argv[1]);"
            "from ldm.app import run_program, save_tensors;"
            "save_tensors('x.safetensors', {'a': torch.ones(3)}, {});"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "run_program(lambda: save_tensors('x.safetensors', {'a': torch.ones(9999)}, {}))")
    writing = start("-c", code, ROOT, cwd=tmp_path)
    err = writing.communicate()[1]
    assert writing.returncode == 2 and "x.safetensors" in err and "Traceback" not in err
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1

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
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), "smaller --micro-batch"),
    (MemoryError(), "smaller --micro-batch"),
    (OSError(28, "No space left on device", "x.csv"), "No space left on device: x.csv"),
    (Fail("no such\nthing"), "no such thing")])
def test_a_failure_is_one_line(problem, words, capsys):
    def main():
        raise problem
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1

def test_help_is_printed_on_a_console_without_greek_letters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_program(train.main)
    out.flush()
    assert stop.value.code == 0 and b"? of LoRA (default: the rank)" in out.buffer.getvalue()

@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_may_refuse_to_sync_but_not_fail_to(code, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(code, "refused")
    monkeypatch.setattr(os, "fsync", refuse)
    if code == errno.EIO:
        with pytest.raises(OSError):
            save_text(tmp_path / "a.txt", "a")
    else:
        save_text(tmp_path / "a.txt", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] * (code != errno.EIO)

def test_off_a_terminal_progress_is_a_line_a_minute(monkeypatch, capsys):
    def minutes(n):
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        with app.progress(total=8, desc="training", unit="step") as bar:
            for _ in range(n):
                now[0] += 30
                bar.set_postfix(loss="0.5", refresh=False)
                bar.update()
                bar.write("epoch")
    now = [1000.0]
    minutes(1)
    assert not capsys.readouterr().err
    minutes(5)
    first, second, end = capsys.readouterr().err.splitlines()
    assert first.startswith("training: 2 of 8, loss=0.5") and first.endswith("left") and "4 of 8" in second
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    minutes(8)
    assert not capsys.readouterr().err

@pytest.mark.parametrize("left, alone", [
    (dict(WORLD_SIZE="2", RANK="1"), True), (dict(RANK=""), True), (dict(WORLD_SIZE="x"), True),
    (dict(TORCHELASTIC_RUN_ID="none"), True),
    (dict(TORCHELASTIC_RUN_ID="x", RANK="1", WORLD_SIZE="2"), False)])
def test_only_torchrun_makes_several_processes(left, alone, monkeypatch):
    """The module is read anew, beside the one that all others have imported."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    again = runpy.run_path(app.__file__)
    assert ((again["RANK"], again["WORLD"]) == (0, 1)) == alone

def test_a_wait_for_processes_that_do_not_come_is_ended_by_a_signal():
    """torchrun's variables as another program left them: nobody listens at that port."""
    left = dict(TORCHELASTIC_RUN_ID="x", RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="9")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from ldm import app; print('ready', flush=True);"
            "app.run_program(lambda: app.join_processes(app.pick_device('cpu')))")
    waiting = start("-c", code, ROOT, **left)
    waiting.stdout.readline()
    time.sleep(1)
    waiting.terminate()
    assert waiting.wait(5) in (143, -signal.SIGTERM)

def test_what_is_printed_before_a_wait_is_not_lost_when_a_signal_ends_it():
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from ldm import app;"
            "app.run_program(lambda: (print('begun'), app.SIGNALS.wait(time.sleep, 9)))")
    waiting = start("-c", code, ROOT)
    assert waiting.stdout.readline() == "begun\n"
    time.sleep(0.5)
    waiting.terminate()
    assert waiting.wait(5) == -signal.SIGTERM

def test_a_program_that_is_stopped_says_what_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda kind, handler: None)
    def main():
        app.SIGNALS._handle(signal.SIGINT, None)
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert stop.value.code == 130 and "stopped; repeat the command" in capsys.readouterr().err

def test_several_processes_do_without_apples_gpu(monkeypatch):
    """Its tensors cannot be exchanged between processes."""
    monkeypatch.setattr(app, "WORLD", 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "cpu"
    with pytest.raises(Fail, match="one process"):
        pick_device("mps")

def test_a_process_that_sees_other_files_than_the_first_one_says_so(tmp_path, monkeypatch):
    check_same("weights", {"base": "a"})
    monkeypatch.setattr(app, "broadcast", lambda value: {"base": "b"})
    with pytest.raises(Fail, match="other weights"):
        check_same("weights", {"base": "a"})
    texture(0).save(tmp_path / "a.png")
    with pytest.raises(Fail, match="other images"):
        data.Cache(tmp_path / "cache", "vae", "encoder", 64).fill([tmp_path / "a.png"], None)
    monkeypatch.setattr(app, "broadcast", lambda value: value)
    monkeypatch.setattr(data, "broadcast", lambda value: [])
    # the first process sees no image that is not cached
    with pytest.raises(Fail, match="a.png is not in the cache"):
        data.Cache(tmp_path / "cache", "vae", "encoder", 64).fill([tmp_path / "a.png"], None)

@pytest.mark.parametrize("source, public", [
    ("owner/name", "owner/name"), ("/gone/to/weights", "weights"),
    ("--data=/home/someone/patches", "--data=patches"), ("--data=/a=b/c", "--data=c"),
    ("--rank", "--rank"), ("1.5", "1.5"), ("chaoyang/", "chaoyang/"), ("runs/x", "runs/x"),
    ("~/weights", "weights"), ("toy", "toy"), ("--sd15=owner/name", "--sd15=owner/name"),
    ("/mine/toy", "./toy")])
def test_of_a_path_no_more_than_its_end_is_told(source, public):
    assert public_name(source) == public

def test_the_same_content_makes_the_same_file(tmp_path):
    """The library's own order of a header changes from call to call."""
    for k in range(8):
        save_tensors(tmp_path / f"{k}.safetensors",
                     {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)},
                     {f"key{i}": f"α{i}" for i in range(9)})
    [content] = {path.read_bytes() for path in tmp_path.iterdir()}
    assert int.from_bytes(content[:8], "little") % 8 == 0
    file = TensorFile(tmp_path / "0.safetensors")
    found = dict(file.read(file.names))
    assert file.header["key3"] == "α3" and torch.equal(found["b"], torch.ones(3))
    assert found["a"].dtype == torch.bfloat16

@pytest.mark.parametrize("name, ours", [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", True), ("MahmoodLab/UNI2-h", True), ("../weights", False),
    ("models/sd15..x", False), ("a--b/c", False),
    ("a/b/c", False), ("./x", False), ("x", False), ("a/b.git", False), ("-a/b", False)])
def test_a_mistyped_path_is_not_taken_for_a_repository(name, ours):
    """By the rules of the hub's own client."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(name)
        theirs = "/" in name
    except HFValidationError:
        theirs = False
    assert (re.fullmatch(HUB_NAME, name) is not None) == theirs == ours

@pytest.mark.parametrize("shapes", [{"conv_in.weight": ()}, {"down_blocks.0.resnets.0.conv1.weight": ()},
                                    {"patch_embed.proj.weight": (), "blocks.0.x": (1,)},
                                    {"patch_embed.proj.weight": (64, 3, 14, 14), "blocks.": (1,)}, {0: (1,)}])
def test_weights_with_odd_tensors_are_refused(shapes, tmp_path):
    for path in (tmp_path / "unet/diffusion_pytorch_model.safetensors",
                 tmp_path / "vae/diffusion_pytorch_model.safetensors"):
        path.parent.mkdir()
        save_tensors(path, {str(name): torch.ones(shape) for name, shape in shapes.items()}, {})
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Fail):
        load_unet(open_sd15(str(tmp_path))[0], "meta")
    with pytest.raises(Fail):
        open_encoder(str(tmp_path)).load("meta")

def test_a_folder_of_patches_may_be_called_toy(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--sd15", "toy", "--data", "toy"])
    args, _ = parse_settings("")
    # found again from any other folder
    assert args.data == str(tmp_path / "toy") and args.sd15 == "toy"

@pytest.mark.parametrize("problem", [MemoryError(), torch.OutOfMemoryError("full"),
                                     PermissionError(13, "denied")])
def test_a_file_is_not_blamed_for_memory_or_permission(problem):
    with pytest.raises(type(problem)), app.foreign_file("patch.png"):
        raise problem

def test_json_keeps_names_that_are_no_utf8(tmp_path):
    app.save_json(tmp_path / "x.json", {"data": "a\udcff/é"})
    assert app.read_json(tmp_path / "x.json") == {"data": "a\udcff/é"}
