"""Training: the recipe, what it moves, how it resumes; and the way from a run to samples and scores."""
import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SETTINGS, process, program, start, trainer
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from ldm.data import Cache, Patch, describe_split, read_dataset
from ldm.encoder import open_encoder
from ldm.runs import (Settings, check_or_create, find, model_card, name_references, newest_run,
                      parse_settings, read_settings)
from ldm.schedule import alpha_bar
from ldm.weights import SHA256, hub_file, load_unet, load_vae, open_sd15
from lora import inject, lora_parameters
from projector import Projector
from sample import Sampling, find_adapter, sample
from train import (Trainer, batch_of_step, draw_batch, draw_validation, generator, learning_rate_factor,
                   noise_prediction_loss)

def test_every_step_of_an_epoch_has_a_whole_batch_and_every_image_comes_once():
    steps = [batch_of_step(0, step, 16, 5398) for step in range(338)]
    assert {len(s) for s in steps} == {16}
    seen = [i for s in steps for i in s]
    assert sorted(seen[:5398]) == list(range(5398)) and seen[5398:] == seen[:10]
    assert batch_of_step(0, 338, 16, 5398) != steps[0] != batch_of_step(1, 0, 16, 5398)
    assert batch_of_step(0, 5, 16, 5398) == steps[5]
    assert sorted(set(batch_of_step(0, 0, 16, 5))) == list(range(5))

def test_draws_are_a_function_of_seed_and_step_and_have_the_papers_distributions():
    n = 20_000
    r, again, other = (draw_batch(generator(3, 0, step), n, (1, 2, 2), 0.1, 1, 4) for step in (7, 7, 8))
    assert all(torch.equal(vars(r)[k], vars(again)[k]) and not torch.equal(vars(r)[k], vars(other)[k])
               for k in vars(r))
    assert r.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert r.null.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (r.t.min(), r.t.max()) == (0, 999) and r.t.float().mean().item() == pytest.approx(499.5, abs=10)
    assert (r.dropout == 0).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert r.dropout.max().item() == pytest.approx(1 / 0.95)
    assert r.eps.std().item() == pytest.approx(1, abs=0.02)
    assert abs((r.eps * r.posterior).mean().item()) < 0.02

def test_every_key_of_the_generator_gives_a_stream_of_its_own():
    keys = [(2,), (2, 0), (2, 0, 0), (0, 2), (2, 1), (1, 2), (2 ** 32,), (0, 1)]
    assert len({torch.randn(4, generator=generator(*key)).sum().item() for key in keys}) == len(keys)

def test_validation_draws_are_fixed_and_spread_over_all_timesteps():
    r, again = draw_validation(10, (4, 2, 2)), draw_validation(10, (4, 2, 2))
    assert sorted(r.t.tolist()) == list(range(50, 1000, 100)) and torch.equal(r.eps, again.eps)
    assert not r.null.any() and not r.mirrored.any() and r.dropout is None

def test_the_learning_rate_rises_over_the_first_epoch_and_follows_a_cosine_to_zero():
    factor = [learning_rate_factor(step, 338, 4056) for step in range(4056)]
    assert factor[0] == pytest.approx(1 / 338) and factor[337] == 1 and factor[338] == 1
    assert factor[338 + (4056 - 338) // 2] == pytest.approx(0.5) and 0 < factor[-1] < 1e-6
    assert factor[1000] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1000 - 338) / (4056 - 338))))

def test_the_loss_is_algorithm_1_written_out():
    torch.manual_seed(0)
    projector, calls = Projector(d_e=6, d_h=8, n_c=2, d_c=5), []

    def unet(z_t, t, c):
        calls.append((z_t, t, c))
        return 0.3 * z_t
    mean, logvar, e = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.randn(3, 6)
    r = draw_batch(generator(1), 3, (4, 2, 2), 0, 1, 8)
    r.null[1], r.dropout = True, None
    loss = noise_prediction_loss(unet, projector, mean, logvar, e, r)
    [(z_t, t, c)] = calls
    a = alpha_bar()[r.t].float().view(3, 1, 1, 1)
    z0 = 0.18215 * (mean + (logvar / 2).exp() * r.posterior)
    assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * r.eps, atol=1e-6) and torch.equal(t, r.t)
    assert torch.allclose(c, projector(torch.stack([e[0], projector.null[0], e[2]])), atol=1e-6)
    assert torch.allclose(loss, ((r.eps - 0.3 * z_t) ** 2).flatten(1).mean(1), atol=1e-6)

def test_the_optimizer_has_the_papers_two_groups():
    t = trainer()
    t.train_step()
    lora, rest = t.optimizer.param_groups
    # two steps of warm-up
    assert [lora["lr"], rest["lr"]] == [5e-5 / 2, pytest.approx(5e-4 / 2)]
    assert isinstance(t.optimizer, torch.optim.AdamW) and lora["betas"] == rest["betas"] == (0.9, 0.999)
    assert (lora["base"], lora["weight_decay"]) == (5e-5, 1e-3)
    assert (rest["base"], rest["weight_decay"]) == (pytest.approx(5e-4), 1e-4)
    assert {id(p) for p in lora["params"]} == {id(p) for p in lora_parameters(t.unet).values()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in t.projector.parameters()}
    assert any(p is t.projector.null for p in rest["params"])

def test_a_step_is_adamw_on_the_gradient_clipped_to_norm_1():
    """After the first step the moments are m = (1-β₁) g and v = (1-β₂) g²: the update is that of sign(g)."""
    t = trainer(cfg_drop=0.5)
    before, _ = values(t)
    scale = torch.full((), 1e3)
    t.network = lambda z, s, c: scale * t.unet(z, s, c)         # a gradient far above 1
    _, norm = t.train_step()
    assert norm > 10
    clipped = torch.sqrt(sum(p.grad.square().sum() for p in t.parameters))
    assert clipped.item() == pytest.approx(1, rel=1e-3)
    for name, p in t.named.items():
        rate, decay = (5e-5 / 2, 1e-3) if name.startswith("unet.") else (5e-4 / 2, 1e-4)
        assert torch.allclose(p, before[name] * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8),
                              atol=1e-7), name

def values(t):
    """Copies of what a Trainer trains, {name: tensor}, and of all else in its U-Net."""
    frozen = {n: p.clone() for n, p in t.unet.state_dict().items() if not n.endswith((".A", ".B"))}
    return {n: p.detach().clone() for n, p in t.named.items()}, frozen

def test_training_moves_lora_projector_and_null_embedding_and_nothing_else():
    t = trainer(cfg_drop=0.5)
    before, frozen = values(t)
    for _ in range(3):
        t.train_step()
    unmoved = [n for n, p in t.named.items() if torch.equal(p, before[n])]
    assert unmoved == [] and "projector.null" in before
    assert all(torch.equal(p, t.unet.state_dict()[n]) for n, p in frozen.items())
    trainable = {id(p) for p in t.unet.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora_parameters(t.unet).values()}

@pytest.mark.slow
def test_eight_real_patches_are_learnt_by_heart(shared, base, uni2h, tmp_path, monkeypatch):
    """On one fixed draw of noise and timesteps. (The frozen network is random: with new draws at every step,
    it predicts noise only so far, and the loss falls by half.)"""
    root, encoder_file = shared("data/ebhi-colon"), open_encoder(uni2h)
    unet_file, vae_file = open_sd15(str(base))
    names = [p.name for p in read_dataset(root)][::200][:8]
    cache = Cache(tmp_path, "vae", "encoder", 64)
    hashes = cache.fill([root / n for n in names],
                        lambda: (load_vae(vae_file).encode, partial(encoder_file.embed, encoder_file.load())))
    torch.manual_seed(0)
    unet = inject(load_unet(unet_file), 16)
    settings = replace(SETTINGS, lr=5e-3, lr_ratio=1.0, batch=8, cfg_drop=0.5, epochs=200)
    projector = Projector(encoder_file.width, 256, 4)
    t = Trainer(settings, unet, projector, cache, list(zip(names, hashes)), (4, 8, 8), torch.device("cpu"))
    before, frozen = values(t)
    monkeypatch.setattr(train, "generator", lambda *key: generator(0, 0, 0))
    for _ in range(200):
        t.train_step()
    print(f"loss {t.losses[0]:.4f} -> {t.losses[-1]:.4f}")
    assert t.losses[-1] < t.losses[0] / 5
    # of one position at 64 px: Q and K have no gradient
    constant = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
    assert all(not torch.equal(p, before[n]) for n, p in t.named.items() if f"{constant}q" not in n
               and f"{constant}k" not in n)
    assert all(torch.equal(p, unet.state_dict()[n]) for n, p in frozen.items())

def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    t = trainer()
    t.save(tmp_path, {})
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    t.parameters[5].data[0] = float("nan")
    with pytest.raises(train.Fail, match="step 0.*not finite"):
        t.save(tmp_path, {})
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before and len(before) == 2

@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(rate):
    t = trainer()
    t.train_step()
    t.cache.rows["h3"][0].fill_(rate)
    with pytest.raises(train.Fail, match=r"step \d+.*timesteps.*3\.png"):
        for _ in range(4):
            before, _ = values(t)
            t.train_step()
    assert all(torch.equal(p, before[n]) for n, p in t.named.items())

def test_a_restored_run_ends_with_the_same_bits(tmp_path):
    whole = trainer()
    for _ in range(6):
        whole.train_step()
    first = trainer()
    for _ in range(3):
        first.train_step()
    first.began -= 300          # an earlier stretch of five minutes
    first.save(tmp_path, {})
    second = trainer()
    second.restore(tmp_path / "state.safetensors")
    of_second, of_first = ((time.perf_counter() - t.began) / 60 for t in (second, first))       # minutes
    assert 5 < of_second <= of_first < 6
    assert second.step == 3 and second.losses == first.losses
    for _ in range(3):
        second.train_step()
    assert all(torch.equal(p, whole.named[n]) for n, p in second.named.items())
    assert second.losses == whole.losses

def test_a_validation_loss_does_not_depend_on_the_batch_size():
    a, b = trainer(batch=4), trainer(batch=3)
    hashes = [f"h{i}" for i in range(7)]
    losses = zip(a.validation_loss(hashes).values(), b.validation_loss(hashes).values(), strict=True)
    assert all(x == (None if x is None else pytest.approx(y, rel=1e-5)) for x, y in losses)

def test_the_validation_loss_is_also_given_for_each_tenth_of_the_timesteps():
    """Of 20 images two fall into each tenth: the loss is the mean of the ten. Of 4, six tenths have none."""
    t = trainer(n=20)
    loss = t.validation_loss([f"h{i}" for i in range(20)])
    tenths = [loss.pop(f"val_loss_{k}") for k in range(10)]
    assert loss["val_loss"] == pytest.approx(sum(tenths) / 10, rel=1e-5) and len(loss) == 1
    few = t.validation_loss([f"h{i}" for i in range(4)])
    assert [few[f"val_loss_{k}"] is None for k in range(10)] == [k not in (1, 3, 6, 8) for k in range(10)]

# ---- as programs -------------------------------------------------------------------------------------

def test_a_run_leaves_what_the_readme_says(trained, tmp_path):
    rows = list(csv.DictReader(open(trained / "log.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2] and all(float(row["val_loss"]) > 0 for row in rows)
    distances = [float(row["fid_encoder"]) for row in rows]
    split = json.loads((trained / "split.json").read_text())
    assert all(split[part] for part in ("train", "val", "test"))
    assert Image.open(trained / "grids/epoch02.png").size == (4 * 260, 276)         # two pairs
    best, last = load_file(trained / "adapter-best.safetensors"), load_file(trained / "adapter.safetensors")
    # A and B of the eight layers of ten attention blocks; the projector
    assert best.keys() == last.keys() and len(last) == 2 * 8 * 10 + 2 + 2 + 2 + 1
    config = json.loads((trained / "config.json").read_text())
    assert config["args"]["rank"] == 2
    assert set(config["sha256"]) == {"vae", "encoder", "base", "images", "features"}
    program("fid.py", trained / "real", trained / "fake", "--features", "encoder", "--json", "out.json",
            cwd=tmp_path)
    # the logged number is fid.py's; of two validation images the best adapter is the last
    assert json.loads((tmp_path / "out.json").read_text())[0]["fid"] == pytest.approx(distances[-1], rel=1e-6)
    adapters = {(trained / f"{name}.safetensors").read_bytes() for name in ("adapter", "adapter-best")}
    assert len(adapters) == 1
    card = (trained / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other" and "an encoder of your own" in card
    assert "Open RAIL-M" in card
    assert "the same after epoch 2 of 2" in card and f"**{distances[-1]:.4g}**" in card
    assert f"python {' '.join(['train.py', '--data'])}" in card
    assert "split: paper (" in card and "; cases in more than one part: 0." in card
    assert config["environment"]["torch"] in card
    assert not list(trained.rglob(".*"))                                           # no temporary files

def test_a_model_card_says_no_more_than_is_known(trained, tmp_path):
    """An official split with a case in two parts, before the first samples; and patches of unknown cases."""
    copy = shutil.copytree(trained, tmp_path / "x")
    (copy / "adapter-best.safetensors").unlink()
    config, split = (json.loads((copy / name).read_text()) for name in ("config.json", "split.json"))
    config["args"] |= dict(split="official", data="/gone/home/patches")
    config["command"] = ["train.py", "--data=/gone/home/patches", "--uni2h", "/gone/home/uni2h"]
    split = {part: split[part] for part in ("train", "val", "test")}
    patches = [Patch(name, "a", name.split("_")[0]) for names in split.values() for name in names]
    shared = split | {"test": split["test"] + split["train"][:1]}
    for how, described in (("cases in more than one part: 1.", describe_split(shared, patches)),
                           ("which patches share a case is unknown",
                            describe_split(split, [Patch(p.name, "a", p.name) for p in patches]))):
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "split.json").write_text(described)
        card = model_card(copy)
        assert how in card and "split: official" in card and "/gone" not in card
        assert "adapter-best.safetensors`: not yet" in card

def test_the_cache_is_used_again_and_repeating_the_command_goes_on(trained, small):
    cwd = trained.parent.parent
    shards = {p: p.stat().st_mtime_ns for p in (cwd / "runs/cache").rglob("*.safetensors")}
    before = (trained / "adapter.safetensors").read_bytes()
    result = program("train.py", *small, "--epochs", 2, "--val-samples", 2, "--run", "runs/x", cwd=cwd)
    assert "found, resumes after step" in result.stdout and "complete" in result.stdout
    assert (trained / "adapter.safetensors").read_bytes() == before
    assert shards == {p: p.stat().st_mtime_ns for p in (cwd / "runs/cache").rglob("*.safetensors")}

@pytest.mark.slow
def test_a_run_that_is_killed_and_one_that_is_asked_to_stop_end_as_if_nothing_had_been(small, tmp_path):
    """SIGTERM in training commits and exits with 143; SIGKILL loses at most what was not committed."""
    arguments = [*small, "--epochs", 6, "--val-samples", 0]
    process("train.py", *arguments, "--run", "runs/whole", cwd=tmp_path)
    expected = load_file(tmp_path / "runs/whole/adapter.safetensors")
    codes = []
    for kind in (signal.SIGTERM, signal.SIGKILL):
        running = start(ROOT / "train.py", *arguments, "--run", "runs/broken", cwd=tmp_path)
        state, then = tmp_path / "runs/broken/state.safetensors", None
        for _ in range(2000):           # until a commit of its own is there
            now = state.stat().st_mtime_ns if state.exists() else None
            then = now if _ == 0 else then
            if now != then:
                break
            time.sleep(0.02)
        running.send_signal(kind)
        codes.append(running.wait())
    assert codes == [143, -signal.SIGKILL]
    result = process("train.py", "--resume", "runs/broken", cwd=tmp_path)
    assert "complete" in result.stdout
    assert all(torch.equal(t, expected[n])
               for n, t in load_file(tmp_path / "runs/broken/adapter.safetensors").items())

@pytest.mark.slow
def test_two_processes_share_a_cache_and_not_a_run(small, tmp_path):
    """The first is stopped in its tracks while two others come: one for the same run, one for another."""
    def begin(run):         # more threads than cores would wait for each other
        return start(ROOT / "train.py", *small, "--epochs", 1, "--val-samples", 0, "--run", run, cwd=tmp_path,
                     OMP_NUM_THREADS="1")
    first = begin("runs/a")
    while not (tmp_path / "runs/a/config.json").exists() and first.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    same, other = begin("runs/a"), begin("runs/b")
    assert same.wait() == 2 and "another process is using runs/a" in same.stderr.read()
    first.send_signal(signal.SIGCONT)
    assert first.wait() == other.wait() == 0
    a, b = (load_file(tmp_path / f"runs/{run}/adapter.safetensors") for run in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a) and len(list((tmp_path / "runs/cache").iterdir())) == 1

@pytest.mark.slow
def test_a_sampler_that_is_asked_to_stop_leaves_whole_images_and_goes_on(trained, tmp_path):
    command = ["sample.py", "--run", trained, "--split", "train", "--limit", 8, "--batch", 1, "--steps", 9,
               "--out", "out"]
    running = start(ROOT / command[0], *command[1:], cwd=tmp_path)
    while not list(tmp_path.glob("out/cfg1.3/*/*.png")) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 143 and not list(tmp_path.glob("out/**/.*"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/cfg1.3/*/*.png")}
    assert made and all(Image.open(path).load() for path in made)
    assert "images exist already" in process(*command, cwd=tmp_path).stdout
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())
    assert len(list(tmp_path.glob("out/cfg1.3/*/*.png"))) > len(made)

@pytest.fixture
def cached(trained, tmp_path):
    """Runs in tmp_path find the images encoded, as a second run beside a first does."""
    shutil.copytree(trained.parent / "cache", tmp_path / "runs/cache")

@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("moment", ["step", "validation", "samples"])
def test_a_request_to_stop_loses_no_step(moment, small, tmp_path, monkeypatch):
    """SIGTERM in the third step, or after the first epoch: the steps till then are saved, and no more."""
    owner, name = {"step": (Trainer, "train_step"), "validation": (Trainer, "validation_loss"),
                   "samples": (train.Validation, "distance")}[moment]
    original = getattr(owner, name)

    def interrupted(self, *args):
        if moment != "step" or self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)
    monkeypatch.setattr(owner, name, interrupted)
    result = program("train.py", *small, "--epochs", 2, "--val-samples", 1, "--run", "runs/x", cwd=tmp_path,
                     check=False)
    assert result.returncode == 143
    state = train.TensorFile(tmp_path / "runs/x/state.safetensors").header
    assert int(state["step"]) == len(json.loads(state["losses"])) == (3 if moment == "step" else 4)

@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("samples, owner, name, few, best", [
    (0, Trainer, "validation_loss", 2, 2), (2, train.Validation, "distance", 2, 2),
    pytest.param(0, Trainer, "validation_loss", 10, 3, marks=pytest.mark.slow),
    pytest.param(2, train.Validation, "distance", 10, 3, marks=pytest.mark.slow)])
def test_the_best_adapter_has_the_lowest_fid_or_loss_unless_few_images_choose_and_fake_shows_it(
        few, best, samples, owner, name, small, tmp_path, monkeypatch):
    values, shown, original = iter([2.0, 1.0, 3.0]), [], getattr(owner, name)

    def measured(*args):
        original(*args)
        shown.append({p.name: p.read_bytes() for p in (tmp_path / "runs/x/.fake").rglob("*.png")})
        value = next(values)
        return {"val_loss": value} if owner is Trainer else value
    monkeypatch.setattr(owner, name, measured)
    monkeypatch.setattr(train, "FEW", few)
    program("train.py", *small, "--epochs", 3, "--val-samples", samples, "--run", "runs/x", cwd=tmp_path)
    steps = [train.TensorFile(tmp_path / f"runs/x/{name}.safetensors").header["step"]
             for name in ("adapter", "adapter-best")]
    assert int(steps[0]) / 3 == int(steps[1]) / best
    fake = {p.name: p.read_bytes() for p in (tmp_path / "runs/x/fake").rglob("*.png")}
    assert fake == shown[best - 1] and len(fake) == samples and not list(tmp_path.glob("runs/x/.*"))
    assert find_adapter(tmp_path / "runs/x", None).path.name == "adapter-best.safetensors"

@pytest.mark.usefixtures("cached")
def test_samples_are_drawn_at_every_kth_epoch_and_at_the_last(small, tmp_path):
    program("train.py", *small, "--epochs", 3, "--val-samples", 2, "--val-every", 2, "--run", "runs/x",
            cwd=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "runs/x/log.csv")))
    assert [bool(row["fid_encoder"]) for row in rows] == [False, True, True]
    assert sorted(p.name for p in (tmp_path / "runs/x/grids").iterdir()) == ["epoch02.png", "epoch03.png"]

def test_samples_are_named_seeded_and_not_made_twice(trained, tmp_path):
    cwd = trained.parent.parent
    out = tmp_path / "out"
    arguments = ["--run", trained, "--split", "val", "--cfg", 1, 1.5, "--n", 2, "--steps", 3, "--seed", 5,
                 "--out", out]
    program("sample.py", *arguments, cwd=cwd)
    split = json.loads((trained / "split.json").read_text())
    real = sorted(p.relative_to(out / "real").with_suffix("").as_posix()
                  for p in (out / "real").rglob("*.png"))
    assert len(real) == len(split["val"])
    made = sorted((out / "cfg1.5").rglob("*.png"))
    assert len(made) == 2 * len(real) and Image.open(made[0]).size == (64, 64)
    seeds = sorted(int(p.stem.split("_seed")[1].split("_")[0]) for p in made)
    assert seeds == list(range(5, 5 + 2 * len(real))) and all(p.stem.endswith("_cfg1.5") for p in made)
    assert (out / "sheet-cfg1.png").exists() and (out / "sheet-cfg1.5.png").exists()
    times = {p: p.stat().st_mtime_ns for p in made}
    made[0].unlink()
    again = program("sample.py", *arguments, "--batch", 1, cwd=cwd)
    assert "exist already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in made[1:]} == {p: t for p, t in times.items() if p != made[0]}

def test_one_reference_gives_the_same_image_as_among_others(trained, dataset, tmp_path):
    """Another batch size may round differently, by one grey level at most."""
    cwd, references = trained.parent.parent, sorted((dataset / "test").iterdir())[:3]
    for name, which, seed in (("many", references, 0), ("one", references[1:2], 1)):
        program("sample.py", "--run", trained, "--ref", *which, "--steps", 3, "--seed", seed, "--out",
                tmp_path / name, cwd=cwd)
    [one] = (tmp_path / "one/cfg1.3").glob("*.png")
    many = tmp_path / "many/cfg1.3" / one.name
    pixels = [np.asarray(Image.open(p)).astype(int) for p in (one, many)]
    assert abs(pixels[0] - pixels[1]).max() <= 1

@pytest.mark.parametrize("other", [["--epochs", "3"], ["--split", "official"],
                                   ["--resume", "runs/x", "--rank", "3"]])
def test_a_run_with_other_settings_is_not_overwritten(other, trained, small, monkeypatch):
    before = (trained / "config.json").read_bytes()
    monkeypatch.chdir(trained.parent.parent)
    run_of = [] if "--resume" in other else [*map(str, small), "--epochs", "2", "--val-samples", "2", "--run",
                                             "runs/x"]
    monkeypatch.setattr(sys, "argv", ["train.py", *run_of, *other])
    with pytest.raises(train.Fail, match=other[-2][2:]):
        train.main()
    assert (trained / "config.json").read_bytes() == before

def test_a_run_that_saved_nothing_yet_gives_way_and_a_strangers_folder_does_not(trained, tmp_path):
    settings = replace(read_settings(trained), rank=4)
    check_or_create(tmp_path, settings, {"vae": "1"})
    check_or_create(tmp_path, replace(settings, rank=8), {"vae": "1"})
    assert read_settings(tmp_path).rank == 8
    (tmp_path / "adapter-best.safetensors").touch()
    settings = replace(settings, rank=16)
    with pytest.raises(train.Fail, match="rank 8, and not 16"):
        check_or_create(tmp_path, settings, {"vae": "1"})
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(train.Fail, match="no run of train.py"):
        check_or_create(tmp_path, settings, {"vae": "1"})
    (tmp_path / "config.json").write_text(json.dumps({"args": asdict(settings), "sha256": None}))
    with pytest.raises(train.Fail, match="damaged"):
        check_or_create(tmp_path, settings, {"vae": "1"})

def test_a_finished_run_is_not_extended(trained):
    refused = program("train.py", "--resume", trained, "--epochs", 20, cwd=trained.parent, check=False)
    assert refused.returncode == 2 and "ends at 0, and not 20; pass another --run" in refused.stderr

@pytest.mark.parametrize("given, expected", [
    ([], None), (["--inception", "f"], "inception"),
    (["--inception", "f", "--features", "encoder"], "encoder")])
def test_an_inception_file_that_is_passed_decides_the_features(given, expected, trained, monkeypatch):
    """Also for a run that began with the encoder's, which then refuses: the file would have no effect."""
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "x", *given])
    assert parse_settings("")[0].features == expected
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(trained), *given])
    assert parse_settings("")[0].features == (expected or "encoder")
    settings, sha256 = read_settings(trained), json.loads((trained / "config.json").read_text())["sha256"]
    with pytest.raises(train.Fail, match="features encoder, and not inception"):
        check_or_create(trained, replace(settings, features="inception"), sha256)

def test_a_limit_is_in_the_counts_and_the_card(small, tmp_path):
    result = program("train.py", *small, "--max-steps", 1, "--val-samples", 0, "--limit", 2,
                     "--run", "runs/x", cwd=tmp_path)
    rest = len(json.loads((tmp_path / "runs/x/split.json").read_text())["test"])
    assert f"train 2, val 2, test {rest}\n" in result.stdout and rest > 2       # which has no limit
    assert "used (`--limit`): 2." in (tmp_path / "runs/x/README.md").read_text()

@pytest.mark.parametrize("val, samples, chosen", [(10, 10, "its features"), (9, 9, "the last"),
                                                  (10, 1, "val_loss")])
def test_what_chooses_the_best_adapter_is_said(small, dataset, tmp_path, val, samples, chosen):
    """A word of the encoder's features only where they choose, of the last epoch where that is taken."""
    names = [row["name"] for row in json.loads((dataset / "train.json").read_text())]
    split = {"train": names[:12], "val": names[12:12 + val], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    said = program("train.py", *small, "--max-steps", 1, "--val-samples", samples, "--split", "split.json",
                   "--run", "runs/x", cwd=tmp_path).stdout
    assert ("the encoder's own features choose" in said) == (chosen == "its features")
    assert ("adapter-best and fake/ are of the last epoch" in said) == (chosen == "the last")
    assert ("best val_loss" in said) == (chosen == "val_loss")

def test_other_data_under_the_name_of_a_run_is_called_so(trained, small, dataset, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "runs/x")
    arguments = [*small, "--epochs", 2, "--val-samples", 2, "--run", "runs/x"]
    other = shutil.copytree(dataset, tmp_path / "other")
    for image in other.rglob("*.JPG"):
        image.write_bytes(image.read_bytes() + b"0")                # the same names, other files
    refused = program("train.py", *arguments, "--data", other, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and f"is a run with images of {dataset}" in refused.stderr
    split = json.loads((copy / "split.json").read_text())
    (copy / "split.json").write_text(json.dumps(split | {"test": ["elsewhere.png"]}))
    refused = program("train.py", *arguments, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "is no split of these patches (elsewhere.png" in refused.stderr

def test_a_folder_of_someone_elses_is_not_made_a_run(small, tmp_path):
    """A run keeps only its own pictures in real/ and fake/: so it takes no folder in which others may be."""
    (tmp_path / "mine/real").mkdir(parents=True)
    (tmp_path / "mine/real/precious.png").write_bytes(b"x")
    result = program("train.py", *small, "--max-steps", 1, "--run", "mine", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "holds other files" in result.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "mine/real/precious.png"]

def test_references_of_a_call_that_saved_nothing_do_not_stay(trained, small, tmp_path):
    """They would be compared with fake/, and the FID of the folders would not be the run's."""
    old = tmp_path / "x/real/a/old.png"
    old.parent.mkdir(parents=True)
    shutil.copy(next((trained / "real").rglob("*.png")), old)
    shutil.copy(trained / "config.json", tmp_path / "x")
    program("train.py", *small, "--max-steps", 1, "--val-samples", 2, "--run", "x", cwd=tmp_path)
    real, fake = ({p.relative_to(tmp_path / "x" / kind) for p in (tmp_path / "x" / kind).rglob("*.png")}
                  for kind in ("real", "fake"))
    assert real == fake and len(real) == 2

def test_a_run_without_its_split_or_with_a_damaged_state_is_refused(trained, small, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "runs/x")
    shutil.copytree(trained.parent / "cache", tmp_path / "runs/cache")
    arguments = [*small, "--epochs", 2, "--val-samples", 2, "--run", "runs/x"]
    train.save_tensors(copy / "state.safetensors", {"a": torch.ones(1)}, {"step": "1"})
    assert "is damaged" in program("train.py", *arguments, cwd=tmp_path, check=False).stderr
    (copy / "state.safetensors").unlink()
    before = (copy / "adapter.safetensors").read_bytes()
    assert "state.safetensors is missing" in program("train.py", *arguments, cwd=tmp_path, check=False).stderr
    assert (copy / "adapter.safetensors").read_bytes() == before
    shutil.copy(trained / "state.safetensors", copy)
    (copy / "split.json").unlink()
    assert "split.json does not exist" in program("train.py", *arguments, cwd=tmp_path, check=False).stderr

@pytest.mark.parametrize("change", [
    lambda c: c["args"].update(epochs=None), lambda c: c["args"].update(data=5),
    lambda c: c["args"].update(sd15=[1]), lambda c: c["args"].update(split=None),
    lambda c: c["args"].update(limit="a"), lambda c: c.pop("environment"),
    lambda c: c.update(command="train.py"), lambda c: c.update(args=[]),
    lambda c: c["args"].update(lr="fast"), lambda c: c["args"].update(depth=9)])
def test_a_run_with_a_damaged_config_is_refused_in_one_line(change, trained, dataset, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "runs/x")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    result = program("train.py", "--resume", "runs/x", cwd=tmp_path, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr

def test_a_state_whose_log_does_not_fit_its_step_is_refused(tmp_path):
    t, path = trainer(), tmp_path / "state.safetensors"
    for _ in range(3):
        t.train_step()
    t.history, t.losses = [{"epoch": 1, "step": 2, "val_loss": 1.0, "minutes": 0.1}], t.losses[2:]
    t.save(tmp_path, {})
    file = train.TensorFile(path)
    tensors = {name: tensor.clone() for name, tensor in file.read(file.names)}
    t.restore(path)
    for change in (dict(losses="[]", history="[]"), dict(losses='["a"]'), dict(step="99"), dict(step="1"),
                   dict(history='[{"step": 2}]'), dict(history="[1]"), dict(losses="[NaN]"),
                   dict(minutes="x"), dict(minutes="nan")):
        train.save_tensors(path, tensors, file.header | change)
        with pytest.raises(train.Fail, match="is damaged"):
            t.restore(path)
    name = next(name for name in t.named if name.endswith(".A"))
    moment = next(name for name in tensors if name.endswith("exp_avg_sq"))
    for changed in (name, "projector.out.weight", moment):
        value = tensors[changed] - 1 if changed == moment else 0 * tensors[changed]
        train.save_tensors(path, tensors | {changed: value}, file.header)
        with pytest.raises(train.Fail, match="a matrix is 0, or a number is impossible"):
            t.restore(path)
    train.save_tensors(path, tensors | {moment: tensors[moment] * math.nan}, file.header)
    with pytest.raises(train.Fail, match="a number is impossible"):
        t.restore(path)

def test_a_run_whose_state_is_older_than_its_best_adapter_goes_on(trained, tmp_path):
    """As where the state was restored from a backup: its log has no row yet of the best adapter's step."""
    copy = shutil.copytree(trained, tmp_path / "x")
    path = copy / "adapter-best.safetensors"
    file = train.TensorFile(path)
    later = file.header | {"step": "99"}
    train.save_tensors(path, {name: tensor.clone() for name, tensor in file.read(file.names)}, later)
    assert "not yet" in model_card(copy)

def test_a_resumed_run_has_its_own_settings_to_the_last_digit(small, tmp_path, monkeypatch):
    """Zeros and what is left out among them; what is of one call only is not taken over."""
    monkeypatch.chdir(tmp_path)
    given = [*small, "--seed", 0, "--lr", 0.1 + 0.2, "--lr-ratio", 0, "--cfg-drop", 0, "--val-samples", 0,
             "--token-norm", "--no-compile", "--run", "runs/x"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
    first, _ = parse_settings("")
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/config.json").write_text(json.dumps({"args": asdict(first)}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "runs/x"])
    assert parse_settings("")[0] == replace(first, no_compile=False)

def test_the_network_is_compiled_once_for_training_and_once_for_validation_and_sampling():
    """A backend that counts the graphs that it gets: shapes are static, so no later batch brings another."""
    t, graphs = trainer(n=6, widths=(32,), batch=4), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward
    t.network = torch.compile(t.unet, dynamic=False, fullgraph=True, backend=counting)
    t.compiled, t.micro_batch = True, 3         # a step is 3 images and then 1, which is filled up
    for _ in range(3):
        t.train_step()
    t.validation_loss([f"h{i}" for i in range(6)])
    first = len(graphs)
    t.train_step()
    t.validation_loss([f"h{i}" for i in range(5)])
    sample(torch.randn(3, 12), t.projector, t.network, Sampling(steps=2), range(3), t.z_shape)
    assert len(graphs) == first <= 2

def test_the_newest_run_is_a_finished_one_and_what_is_passed_over_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name, epoch in ((20, "old", 2), (10, "new", 1)):
        folder = tmp_path / "runs" / name
        check_or_create(folder, Settings(data="d", epochs=2, alpha=8.0), {})
        train.save_csv(folder / "log.csv", [{"epoch": epoch, "step": 10 * epoch}])
        (folder / "adapter.safetensors").touch()
        os.utime(folder / "adapter.safetensors", (1e9 - age, 1e9 - age))
    assert newest_run() == Path("runs/old")
    assert capsys.readouterr().err == "note: runs/new is not finished (epoch 1 of 2)\n"
    train.save_csv(tmp_path / "runs/new/log.csv", [{"epoch": 2, "step": 20}])
    assert newest_run() == Path("runs/new") and not capsys.readouterr().err

def test_paths_that_are_not_there_are_looked_for_in_the_newest_run_all_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in ((20, "old"), (10, "new")):
        (tmp_path / "runs" / name / "real").mkdir(parents=True)
        (tmp_path / "runs" / name / "adapter.safetensors").touch()
        os.utime(tmp_path / "runs" / name / "adapter.safetensors", (1e9 - age, 1e9 - age))
    assert find(["real"]) == [Path("runs/new/real")] and find(["real"], "runs/old") == [Path("runs/old/real")]
    assert find(["real", "fake"]) == [Path("runs/new/real"), Path("runs/new/fake")]     # where fake is missed
    assert find(["one", "two"]) == [Path("one"), Path("two")]
    (tmp_path / "runs/new/fake").mkdir()
    assert find(["real/", "fake/"]) == [Path("runs/new/real"), Path("runs/new/fake")]
    (tmp_path / "real").mkdir()
    assert find(["real", "fake"]) == [Path("real"), Path("fake")]

def test_two_references_of_one_name_are_two_references(tmp_path):
    paths = [tmp_path / folder / "patch.png" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    first, known = name_references([("patch", paths[0])], {})
    second, known = name_references([("patch", paths[1])], known)
    both, _ = name_references([("patch", p) for p in reversed(paths)], known)
    assert first == {"patch": paths[0]} and second == {"patch-2": paths[1]}
    assert both == {"patch-2": paths[1], "patch": paths[0]}

def test_an_adapter_is_refused_on_another_base(trained, base, dataset, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    path = other / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    path.unlink()
    save_file(tensors, path)
    arguments = ["--adapter", trained / "adapter.safetensors", "--ref", next((dataset / "test").iterdir()),
                 "--steps", 1,
                 "--out", tmp_path / "out", "--sd15", other]
    refused = program("sample.py", *arguments, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "another base" in refused.stderr and "--other-base" in refused.stderr
    assert not (tmp_path / "out").exists()
    encoder = train.open_encoder(json.loads((trained / "config.json").read_text())["args"]["uni2h"]).file
    (tmp_path / "encoder").mkdir()
    save_file({n: t + (n == "norm.bias") for n, t in encoder.read(encoder.names)},
              tmp_path / "encoder/model.safetensors")
    refused = program("sample.py", *arguments, "--other-base", "--uni2h", tmp_path / "encoder", cwd=tmp_path,
                      check=False)
    assert refused.returncode == 2 and "another encoder" in refused.stderr and not (tmp_path / "out").exists()
    program("sample.py", *arguments, "--other-base", cwd=tmp_path)
    assert list((tmp_path / "out/cfg1.3").glob("*.png"))

def damage(base, target, change):
    """A copy of the base whose U-Net file is changed by `change(path)`."""
    shutil.copytree(base, target)
    change(target / "unet/diffusion_pytorch_model.safetensors")
    return target

def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")

def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])

def headless(path):
    path.write_bytes(path.read_bytes()[:100])

def edited(change):
    def apply(path):
        tensors = {n: t.clone() for n, t in load_file(path).items()}
        path.unlink()
        change(tensors)
        save_file(tensors, path)
    return apply

def flatten_proj_in(tensors):
    for name in [n for n in tensors if n.endswith("proj_in.weight")]:
        tensors[name] = tensors[name][:, :, 0, 0].contiguous()

@pytest.mark.parametrize("change, words", [
    (pointer, "Git LFS pointer"), (truncated, "download it again"), (headless, "download it again"),
    (edited(lambda t: t.update({"add_embedding.linear_1.weight": t["conv_in.bias"].clone()})), "SDXL"),
    (edited(flatten_proj_in), "Stable Diffusion 2"),
    (edited(lambda t: t.pop("conv_out.bias")), "conv_out.bias is missing"),
    (edited(lambda t: t.update(stranger=t["conv_in.bias"].clone())), "stranger is (32,) instead of unused"),
    (edited(lambda t: t.update({"conv_in.bias": t["conv_in.bias"][:5].clone()})),
     "conv_in.bias is (5,) instead of (32,)"),
    (edited(lambda t: t.update({"conv_in.bias": t["conv_in.bias"].int()})), "not floating point")])
def test_a_checkpoint_that_is_none_is_refused_by_name(change, words, base, tmp_path):
    with pytest.raises(train.Fail) as problem:
        load_unet(open_sd15(str(damage(base, tmp_path / "sd", change)))[0])
    assert words in str(problem.value) and "\n" not in str(problem.value)

class Hub:
    """A stand-in for the hub's client: a repository of these files, of which these are cached."""

    def __init__(self, monkeypatch, folder, files, cached=()):
        import huggingface_hub as hub

        def model_info(repository, files_metadata, timeout):
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=len(data))
                                             for name, data in files.items()])

        def download(repository, name):
            (folder / name).write_bytes(files[name])
            return str(folder / name)
        monkeypatch.setattr(hub, "try_to_load_from_cache",
                            lambda repository, name: str(folder / name) if name in cached else None)
        monkeypatch.setattr(hub, "model_info", model_info)
        monkeypatch.setattr(hub, "hf_hub_download", download)

def test_a_file_of_the_hub_is_named_checked_and_taken_from_its_cache(monkeypatch, tmp_path, capsys):
    names = ["a16", "a32"]
    Hub(monkeypatch, tmp_path, {"a32": b"1234", "a16": b"12"}, cached=["a32"])
    assert hub_file("x/y", names) == tmp_path / "a32" and capsys.readouterr().err == ""
    Hub(monkeypatch, tmp_path, {"a32": b"1234", "a16": b"12"})
    assert hub_file("x/y", names).read_bytes() == b"12"
    assert "downloading a16 of x/y" in capsys.readouterr().err
    Hub(monkeypatch, tmp_path, {"a32": b"1234"})
    assert hub_file("x/y", names).read_bytes() == b"1234"
    with monkeypatch.context() as m, pytest.raises(train.Fail, match="sha256.*removed"):
        m.setitem(SHA256, "x/y/a32", "0" * 64)
        hub_file("x/y", ["a32"])
    assert not (tmp_path / "a32").exists()
    Hub(monkeypatch, tmp_path, {"a32": b"1234", "config.json": b"{}"})
    assert hub_file("x/y", names).read_bytes() == b"1234"
    assert "downloading config.json" in capsys.readouterr().err
    with pytest.raises(train.Fail, match="x/y has no b; check the name"):
        hub_file("x/y", ["b"])

def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    witness = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)
    torch.save({"patch_embed.proj.weight": Attack()}, tmp_path / "pytorch_model.bin")
    for content in (None, b"", bytes(range(256)), b"\x80\x02" + bytes(300)):
        if content is not None:
            (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(train.Fail, match="not a plain file of tensors"):
            open_encoder(tmp_path)
    assert not witness.exists()
