"""A run that is killed twenty times, wherever it is, ends with the bits of one that was not.

    python -m pytest -m slow tests/test_resume.py -s"""
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from ldm.app import read_csv

pytestmark = pytest.mark.slow

# Runs train.py, and kills it at a random moment after the nth call of a function, or after its start.
RUN = """
import os, random, runpy, signal, sys, threading, time
sys.path.insert(0, {root!r})
place, nth, delay, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
sys.argv = [{root!r} + "/train.py", *sys.argv[5:]]
import fid, ldm.encoder, ldm.app, sample, train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def watch(owner, name):
    original, calls = getattr(owner, name), 0
    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            threading.Timer(delay, kill).start()
        return original(*args, **kwargs)
    setattr(owner, name, watched)

mine = os.environ.get("RANK", "0") == seed          # under torchrun one of the processes is killed
if mine and place == "clock":
    threading.Timer(delay, kill).start()
elif mine and place != "nowhere":
    watch(*dict(caching=(ldm.data, "to_tensor"), step=(train.Trainer, "train_step"),
                validation=(train.Trainer, "validation_loss"),
                samples=(train, "make_images"), write=(ldm.app, "save"), rename=(os, "replace"))[place])
ldm.app.run_program(train.main)
"""
PLACES = ("caching", "step", "validation", "samples", "write", "rename", "clock")

def start(processes, cwd, place, nth, delay, rank, *arguments):
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run",
                                                        "--standalone", "--nproc-per-node", str(processes),
                                                        "--"]
    (cwd / "run.py").write_text(RUN.format(root=str(ROOT)))
    return subprocess.run([*launcher, "run.py", place, str(nth), str(delay), str(rank), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_nothing(processes, small, tmp_path):
    chance, kills, places = random.Random(processes), 0, {}
    arguments = [*small, "--epochs", 3, "--val-samples", 2]
    whole = start(processes, tmp_path, "nowhere", 0, 0, 0, *arguments, "--run", "whole/runs/x")
    assert whole.returncode == 0, whole.stderr
    arguments += ["--run", "runs/x"]
    attempts = 0
    while kills < 20:
        attempts += 1
        assert attempts < 60
        # of which there is not much
        place = PLACES[attempts % len(PLACES)] if attempts > 3 else "caching"
        longest = dict(write=0.01, rename=0.01, clock=8).get(place, 0.3)
        delay = chance.uniform(0, longest)
        result = start(processes, tmp_path, place, chance.randint(1, 2 if place == "caching" else 5), delay,
                       chance.randrange(processes), *arguments)
        if result.returncode:
            if processes == 1:
                assert result.returncode == -9, result.stderr
            else:
                assert "SIGKILL" in result.stderr, result.stderr
            kills += 1
            places[place] = places.get(place, 0) + 1
        elif len(read_csv(tmp_path / "runs/x/log.csv")) == 3 and kills < 20:
            # complete before its kills: compare it, and begin anew
            (tmp_path / "runs/x").rename(tmp_path / f"runs/done{attempts}")
            compare(tmp_path / "whole/runs/x", tmp_path / f"runs/done{attempts}")
    last = start(processes, tmp_path, "nowhere", 0, 0, 0, *arguments)
    assert last.returncode == 0, last.stderr
    compare(tmp_path / "whole/runs/x", tmp_path / "runs/x")
    print(f"{processes} processes: {kills} kills survived, by place {places}")

def compare(whole, broken):
    for name in ("adapter", "adapter-best", "state"):
        a, b = (load_file(run / f"{name}.safetensors") for run in (whole, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name
    for name in ("adapter", "adapter-best"):        # the state has the minutes in its header
        a, b = ((run / f"{name}.safetensors").read_bytes() for run in (whole, broken))
        assert a == b, name
    a, b = (read_csv(run / "log.csv") for run in (whole, broken))
    for row, other in zip(a, b, strict=True):
        for key in row.keys() - {"images_per_second", "minutes", "peak_memory_gb"}:
            assert row[key] == other[key], key
    assert (broken / "README.md").is_file()
    for path in (whole / "fake").rglob("*.png"):
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes()
