"""Several processes under torchrun do what one does: losses and adapter to rounding, images, distance."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, process, program, start
from safetensors.torch import load_file

import train
from ldm.app import read_csv

def torchrun(n, name, *args, cwd):
    """The program in n processes -> Popen."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, "--", ROOT / name,
                 *args, cwd=cwd, OMP_NUM_THREADS="1")

def finish(started, code=0):
    try:
        out, err = started.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    assert (started.returncode == 0) == (code == 0), err
    return out, err

@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """The same training by one process and by two -> their working folders. The two have uneven shares: 3 and
    2 images of a batch, 3 and none of validation's loss and samples."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    arguments = [*small, "--batch", 5, "--epochs", 2, "--val-samples", 3, "--run", "runs/x"]
    both = torchrun(2, "train.py", *arguments, cwd=two)
    program("train.py", *arguments, cwd=one)
    out, _ = finish(both)
    assert out.count("Total trainable") == 1            # only the first process speaks
    assert len(list((two / "runs/x/fake").rglob("*.png"))) == len(json.loads(
        (two / "runs/x/split.json").read_text())["val"]) == 3
    return one, two

def test_two_processes_train_the_adapter_of_one(runs):
    one, two = (load_file(cwd / "runs/x/adapter.safetensors") for cwd in runs)
    learnt = torch.cat([one[n].flatten() for n in one if "lora_B" in n])            # B starts at 0
    apart = torch.cat([(one[n] - two[n]).flatten() for n in one])
    assert 0 < apart.norm() < 1e-3 * learnt.norm()
    for a, b in zip(*(read_csv(cwd / "runs/x/log.csv") for cwd in runs)):
        for key in ("train_loss", "val_loss"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)
        assert float(a["fid_encoder"]) == pytest.approx(float(b["fid_encoder"]), rel=1e-2)

def test_two_processes_cache_every_image_once(runs):
    counts = []
    for cwd in runs:
        names = [path.name for path in (cwd / "runs/cache").rglob("*.safetensors")]
        counts.append(sorted(names))
    assert counts[0] == counts[1]

@pytest.mark.slow
def test_two_processes_sample_the_images_of_one_and_measure_the_same_distance(runs, tmp_path):
    run = runs[0] / "runs/x"
    arguments = ["--run", run, "--split", "val", "--limit", 3, "--steps", 3, "--batch", 2, "--cfg", 1, 1.3]
    process("sample.py", *arguments, "--out", "one", cwd=tmp_path, OMP_NUM_THREADS="1")
    finish(torchrun(2, "sample.py", *arguments, "--out", "two", cwd=tmp_path))
    files = [sorted(p.relative_to(tmp_path / k) for p in (tmp_path / k).rglob("*") if p.is_file())
             for k in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 2 + 2 + 3 * 3
    for path in files[0]:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    texts = [program("fid.py", run / "real", run / "fake", "--features", "encoder", cwd=tmp_path).stdout,
             finish(torchrun(2, "fid.py", run / "real", run / "fake", "--features", "encoder",
                             cwd=tmp_path))[0]]
    assert texts[0] == texts[1] and "fid_encoder" in texts[0]

@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_which_goes_on_later(small, tmp_path):
    arguments = [*small, "--epochs", 400, "--val-samples", 0, "--run", "runs/x"]
    job = torchrun(2, "train.py", *arguments, cwd=tmp_path)
    log = tmp_path / "runs/x/log.csv"
    deadline = time.time() + 120
    while len(read_csv(log)) < 2 and time.time() < deadline:
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    finish(job, code=1)
    done = int(read_csv(log)[-1]["epoch"])
    assert done >= 2
    job = torchrun(2, "train.py", *arguments, cwd=tmp_path)
    while len(read_csv(log)) <= done and time.time() < deadline:
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)         # what a scheduler sends: all processes leave after the same step
    out, _ = finish(job, code=1)
    assert "found, resumes after step" in out and len(read_csv(log)) > done

@pytest.mark.slow
@pytest.mark.parametrize("other", ["weights", "settings"])
def test_a_node_with_other_weights_or_settings_than_the_first_one_says_so(small, base, tmp_path, other):
    """Two nodes of one process each, whose --sd15 are two folders, the one a bias apart, or whose --seed
    differs."""
    from safetensors.torch import save_file
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1}, file)
    jobs = []
    for rank in range(2):
        sd15, seed = tmp_path / "other" if rank and other == "weights" else base, rank * (other == "settings")
        arguments = [*small[:2], "--sd15", sd15, *small[4:], "--run", "runs/x", "--max-steps", 2]
        arguments += ["--seed", seed]
        jobs.append(start(
            ROOT / "train.py", *arguments, cwd=tmp_path, OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT="29431", TORCHELASTIC_RUN_ID="x"))
    (_, first), (_, second) = (finish(job, code=2) for job in jobs)
    assert "process 1 of 2 has other settings or weights than rank 0" in second
    assert "another process has ended" in first
    assert not list(tmp_path.rglob("adapter*"))

def test_more_processes_than_images_in_a_batch_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    refused = program("train.py", *small, "--batch", 1, "--run", "runs/x", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "--batch 1" in refused.stderr and not (tmp_path / "runs").exists()
