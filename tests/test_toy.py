"""The embedded default: tissue, base and the README's three lines, without data, weights or network."""
import json

import numpy as np
import pytest
import torch
from conftest import program
from PIL import Image

from ldm.data import (CLASSES, load_rgb, read_dataset, split_patches, to_images, to_tensor, write_toy_tissue)
from ldm.encoder import open_encoder
from ldm.schedule import alpha_bar
from ldm.vae import SCALE
from ldm.weights import BUILT_IN, load_unet, load_vae, open_sd15
from tissue import PATCHES, SLIDES, draw_patch, draw_slide, write_dataset

WEIGHTS = BUILT_IN["toy"]
needs_weights = pytest.mark.skipif(not (WEIGHTS / "unet").is_dir(), reason="the toy base is not there")

@pytest.fixture(scope="module")
def tissue():
    """Eight patches of each class, each of a slide of its own."""
    return [draw_patch(draw_slide(label, seed)) for label in range(4) for seed in range(8)]

def test_a_slide_is_a_function_of_class_and_seed_and_its_patches_differ():
    a, b, other = draw_slide(1, 5), draw_slide(1, 5), draw_slide(1, 6)
    first = draw_patch(a)
    assert first.size == (64, 64) and np.array_equal(first, draw_patch(b))
    assert not np.array_equal(first, draw_patch(a)) and not np.array_equal(first, draw_patch(other))
    assert draw_patch(a, 128).size == (128, 128)

def test_stains_mix_by_beer_and_lambert():
    """Without tissue there is white light; the stains absorb green most, as hematoxylin and eosin do."""
    for label in range(4):
        for seed in range(24):
            stains = draw_slide(label, seed)["stains"]
            assert np.allclose(np.linalg.norm(stains, axis=1), 1) and (stains > 0).all()
    bright, dark = (np.asarray(draw_patch(draw_slide(2, 0) | dict(strength=np.full(2, s))), float)
                    for s in (0, 1.0))
    assert bright.mean() > 250 and dark.mean() < 220
    mean = np.mean([np.asarray(draw_patch(draw_slide(label, 9))) for label in range(4)], axis=(0, 1, 2))
    assert mean[1] < mean[0] and mean[1] < mean[2]

def test_the_embedded_patches_are_those_drawn_and_written_once(tmp_path):
    """To JPEG's error: two 8-bit levels of noise on every pixel; a patch of another place would be 30 off."""
    write_toy_tissue(tmp_path)
    assert len(read_dataset(tmp_path)) == 4 * SLIDES * PATCHES
    for label, name in enumerate(CLASSES):
        slide = draw_slide(label, 5)
        for k in range(PATCHES):
            path = tmp_path / name / f"{name}-005" / f"{k:02d}.png"
            assert np.abs(np.asarray(load_rgb(path), float) - np.asarray(draw_patch(slide), float)).mean() < 6
    before = path.stat().st_mtime_ns
    write_toy_tissue(tmp_path)
    assert path.stat().st_mtime_ns == before

def test_the_dataset_is_split_by_slide_and_written_once(tmp_path):
    write_dataset(tmp_path, slides=3, patches=2)
    patches = read_dataset(tmp_path)
    assert len(patches) == 24 and {p.label for p in patches} == set(CLASSES)
    assert len({p.case for p in patches}) == 12
    split = split_patches(patches)
    case = {p.name: p.case for p in patches}
    parts = [{case[name] for name in names} for names in split.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    victim = tmp_path / "adenoma/adenoma-002/01.png"
    pixels = np.asarray(load_rgb(victim))
    victim.unlink()
    write_dataset(tmp_path, slides=3, patches=2)
    assert np.array_equal(load_rgb(victim), pixels)
    others = {p: t for p, t in times.items() if p.parent != victim.parent}
    assert {p: p.stat().st_mtime_ns for p in others} == others

@needs_weights
def test_the_weights_are_small_and_of_the_very_classes():
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 3 and sum(p.stat().st_size for p in files) <= 25e6
    unet_file, vae_file = open_sd15("toy")
    unet, vae = load_unet(unet_file, "meta"), load_vae(vae_file, "meta")
    assert vae.factor == 4 and unet.latent == 4 and unet.context == 128
    rows = (WEIGHTS / "log.csv").read_text().splitlines()
    assert rows[0] == "network,step,loss"
    assert {r.split(",")[0] for r in rows[1:]} == {"vae", "encoder", "decoder", "unet"}

@needs_weights
def test_the_vae_keeps_tissue_of_slides_that_it_never_saw(tissue):
    vae = load_vae(open_sd15("toy")[1])
    with torch.no_grad():
        mean, logvar = vae.encode(to_tensor(tissue, 64))
        images = to_images(vae.decode(mean * SCALE))
    error = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(tissue, images)]
    assert np.mean([10 * np.log10(255 ** 2 / e) for e in error]) >= 27
    assert 0.6 < (mean * SCALE).std() < 1.6 and (logvar / 2).exp().mean() < 0.3 * mean.std()

@needs_weights
def test_the_encoder_tells_the_classes_apart(tissue):
    """A ridge classifier on its embeddings, fitted on other slides."""
    encoder = open_encoder("toy")
    assert encoder.recipe.terms == "the toy encoder (MIT)"      # and not one of another shape
    network = encoder.load()
    train = [draw_patch(draw_slide(label, seed)) for label in range(4) for seed in range(100, 115)]
    a, b = encoder.embed(network, train).double().numpy(), encoder.embed(network, tissue).double().numpy()
    mu, spread, y = a.mean(0), a.std(0), np.eye(4)[np.repeat(np.arange(4), 15)]
    a, b = (a - mu) / spread, (b - mu) / spread
    guess = (b @ np.linalg.solve(a.T @ a + 100 * np.eye(a.shape[1]), a.T @ (y - 0.25))).argmax(1)
    assert (guess == np.repeat(np.arange(4), 8)).mean() >= 0.9

@needs_weights
def test_the_toy_unets_cross_attention_is_alive():
    """Other tokens move ẑ_0 by a twentieth of the latents' deviation, which is 1, at least. (At t = 700 the
    noise is nearly z_t itself whatever the tokens say, and moves less.)"""
    unet = load_unet(open_sd15("toy")[0])
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(8, 4, 16, 16, generator=g), torch.full((8,), 700)
    a, b = (torch.randn(8, 4, unet.context, generator=g) for _ in range(2))
    with torch.no_grad():
        difference = unet(z, t, a) - unet(z, t, b)
    a_t = alpha_bar()[700].item()
    change = difference.square().mean().sqrt() * ((1 - a_t) / a_t) ** 0.5       # ẑ_0 = (z_t - √(1-ᾱ) ε) / √ᾱ
    assert change > 0.05

@needs_weights
def test_the_readmes_three_lines_work_on_what_they_leave_behind(tmp_path, monkeypatch):
    """With no network: a connection that is tried ends the program."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    train = ("train.py", "--rank", 4, "--tokens", 4, "--max-steps", 2, "--limit", 16, "--val-samples", 4,
             "--val-steps", 4)
    out = program(*train, cwd=tmp_path).stdout
    assert out.startswith("No --data") and "--data FOLDER" in out
    [run] = (tmp_path / "runs").glob("toy-tissue-64px-r4-t4")
    config = json.loads((run / "config.json").read_text())["args"]
    assert (config["sd15"], config["uni2h"], config["size"], config["rank"]) == ("toy", "toy", 64, 4)
    program("sample.py", "--ref", "patch.png", "--cfg", 1.3, cwd=tmp_path)
    [made] = run.glob("samples/*/cfg1.3/*.png")
    assert Image.open(made).size == (64, 64)
    result = program("fid.py", "real/", "fake/", cwd=tmp_path)
    assert float(result.stdout.split("fid_encoder ")[1].split()[0]) > 0 and "not Inception's" in result.stdout
    written = [p for folder in ("toy-tissue", "cache") for p in (tmp_path / "runs" / folder).rglob("*.*")]
    before = [p.stat().st_mtime_ns for p in written]
    assert "resumes after step 2 of 2" in program(*train, cwd=tmp_path).stdout
    assert [p.stat().st_mtime_ns for p in written] == before
