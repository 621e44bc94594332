"""The maker of the embedded base: its pictures, its training loop, and a short run of all of it."""
import math
from types import SimpleNamespace

import make_base
import numpy as np
import pytest
import torch
from conftest import process
from pictures import SIZE, Random, draw_masks, draw_pictures, draw_shapes, draw_worlds, outline
from torch import nn

from ldm.encoder import UNI2H, open_encoder, preprocess
from ldm.data import to_images
from ldm.vae import SCALE, VAE
from ldm.weights import load_unet, load_vae, open_sd15

CPU = torch.device("cpu")

def test_pictures_are_a_function_of_world_and_seed():
    worlds = draw_worlds(4, Random(CPU, 1))
    a, b = (draw_pictures(worlds, Random(CPU, 2)) for _ in range(2))
    other = draw_pictures(worlds, Random(CPU, 3))
    assert a.shape == (4, 3, SIZE, SIZE) and torch.equal(a, b) and -1 <= a.min() and a.max() <= 1
    assert (a != other).flatten(1).float().mean(1).min() > 0.5

def test_four_successive_worlds_share_their_colours_and_no_more():
    dyes = draw_worlds(8, Random(CPU, 1))["dyes"]
    assert torch.equal(dyes[0], dyes[3]) and torch.equal(dyes[4], dyes[7])
    assert not torch.equal(dyes[3], dyes[4])
    pitch = draw_worlds(8, Random(CPU, 1))["shapes"]["pitch"]
    assert len(pitch.unique()) == 8

def test_an_outline_is_1_on_average_and_a_star_has_its_points():
    phi = (torch.arange(3600) + 0.5) / 3600 * 2 * math.pi
    for pointed in (True, False):
        radius = outline(phi, torch.tensor(5), torch.tensor(0.4), torch.tensor(pointed))
        assert abs(radius.mean() - 1) < 1e-3
        assert abs(radius.max() - 1.4) < 0.01 and abs(radius.min() - 0.6) < 0.01
        assert ((radius > 1) != (radius.roll(1) > 1)).sum() == 2 * 5

def test_round_shapes_on_a_lattice_cover_their_share_of_the_area():
    """Discs of radius ρ in square cells of side p cover πρ²/p²."""
    n = 64
    layer = {name: torch.zeros(n) for name in draw_shapes(n, Random(CPU, 0))}
    layer |= dict(pitch=torch.full((n,), 16.0), radius=torch.full((n,), 6.0), share=torch.ones(n),
                  aspect=torch.ones(n), stretch=torch.ones(n), pointed=torch.zeros(n).bool(),
                  core_pointed=torch.zeros(n).bool(), aligned=torch.ones(n).bool(),
                  core=torch.full((n,), 0.5), bead_length=torch.ones(n), bead_width=torch.ones(n))
    r = Random(CPU, 1)
    body, core, beads = draw_masks(layer, r.uniform(0, 6, n), r.uniform(0, 6, n), r)
    assert abs(body.mean() - math.pi * 36 / 256) < 0.01
    assert abs(core.mean() - math.pi * 9 / 256) < 0.01 and not beads.any()

def test_the_encoder_sees_what_train_py_shows_it():
    """The maker enlarges and normalises tensors, train.py PIL images: the same to half a grey level."""
    x = draw_pictures(draw_worlds(2, Random(CPU, 1)), Random(CPU, 2))
    theirs = preprocess(to_images(x))
    ours = make_base.normalise(make_base.enlarged(x))
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(UNI2H.std)

def test_turning_keeps_the_pixels():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    seen = {tuple(make_base.turned(x, Random(CPU, seed))[0, 0].flatten().tolist()) for seed in range(64)}
    assert len(seen) == 8 and all(sorted(s) == list(range(16)) for s in seen)

def test_staining_by_0_changes_nothing_and_is_multiplicative_in_density():
    x = torch.rand(4, 3, 8, 8) * 1.8 - 0.9
    assert torch.allclose(make_base.stained(x, Random(CPU, 1), 0), x, atol=1e-6)
    y = make_base.stained(x, Random(CPU, 1), 0.1)
    density, other = (-torch.log(v / 2 + 0.5) for v in (x, y))
    inside = (y > -0.99) & (y < 0.99)
    slope = np.polyfit(density[0, 0][inside[0, 0]], other[0, 0][inside[0, 0]], 1)
    fitted = np.polyval(slope, density[0, 0][inside[0, 0]])
    assert np.abs(fitted - other[0, 0][inside[0, 0]].numpy()).max() < 1e-4

def toy_fit(out, steps, stop=None, rate=1e-2):
    """Fit a matrix to the identity -> its weights. stop: raise at this step."""
    torch.manual_seed(0)
    network = nn.Linear(4, 4)

    def loss(step, batch):
        if step == stop:
            raise KeyboardInterrupt
        x = Random(CPU, step).normal(batch, 4)
        return (network(x) - x).square().mean()

    out.mkdir(exist_ok=True)
    args = SimpleNamespace(out=out, device=CPU, stages={"x": (steps, 16, rate)})
    make_base.fit("x", {"network": network}, loss, args)
    return network

def test_an_interrupted_part_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(make_base, "SAVE_SECONDS", -1)
    whole = toy_fit(tmp_path / "a", 12)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path / "b", 12, stop=7)
    resumed = toy_fit(tmp_path / "b", 12)
    assert torch.equal(whole.weight, resumed.weight)
    assert not torch.equal(whole.weight, toy_fit(tmp_path / "c", 13).weight)
    assert (tmp_path / "a/log-x.csv").read_text() == (tmp_path / "b/log-x.csv").read_text()

def test_fitting_learns_and_keeps_a_moving_average(tmp_path):
    network = toy_fit(tmp_path, 400, rate=3e-2)
    assert (network.weight - torch.eye(4)).abs().max() < 0.1 and not network.weight.requires_grad

def test_whitening_changes_the_latents_alone():
    torch.manual_seed(0)
    vae = VAE(**make_base.VAE_SHAPE).eval().requires_grad_(False)
    vae.quant_conv.weight[1] += 2 * vae.quant_conv.weight[0]            # correlated
    x = draw_pictures(draw_worlds(64, Random(CPU, 1)), Random(CPU, 2))
    before = vae.reconstruct(x)
    make_base.whiten(vae, vae.encode(x)[0])
    z0 = SCALE * vae.encode(x)[0].transpose(0, 1).flatten(1)
    assert z0.mean(1).abs().max() < 1e-3 and (z0.cov() - torch.eye(4)).abs().max() < 1e-2
    assert (vae.reconstruct(x) - before).abs().max() < 1e-3 * before.abs().max()

@pytest.mark.slow
def test_a_short_run_makes_a_base_that_loads(tmp_path, dataset):
    """Two steps of each part, on pictures and on patches."""
    args = ("--scale", 0.0001, "--batch", 8)
    process("tests/make_base.py", tmp_path, *args, "--patches", dataset, cwd=tmp_path)
    unet_file, vae_file = open_sd15(str(tmp_path))
    assert load_unet(unet_file).context == 128
    assert "training cases only" in unet_file.header["trained_on"]
    assert open_encoder(str(tmp_path)).width == make_base.ENCODER_SHAPE["width"]
    x = draw_pictures(draw_worlds(8, Random(CPU, 1)), Random(CPU, 2))
    coarse = load_vae(type(vae_file)(tmp_path / make_base.FILES["vae"]))
    with torch.no_grad():
        a, b = coarse.encode(x)[0], load_vae(vae_file).encode(x)[0]
    assert torch.equal(a, b)                            # the decoder part leaves the latents as they are
    assert 0.3 < (a * SCALE).std() < 3
    before = (tmp_path / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    process("tests/make_base.py", tmp_path, *args, "--patches", dataset, cwd=tmp_path)
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
