"""Noise schedule, sampler and guidance equal the numbers of the reference implementation."""
import itertools
from decimal import Decimal

import pytest
import torch

from ldm import schedule
from ldm.schedule import ddpm_step, timesteps
from ldm.unet import UNet
from projector import Projector
from sample import Sampling, guide, sample

CONFIG = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
              clip_sample=False,
              steps_offset=1, timestep_spacing="leading", prediction_type="epsilon",
              variance_type="fixed_small")

@pytest.fixture
def scheduler():
    from diffusers import DDPMScheduler
    scheduler = DDPMScheduler(**CONFIG)
    scheduler.set_timesteps(30)
    return scheduler

def test_alpha_bar_is_the_product_of_1_minus_beta(scheduler):
    exact = Decimal(1)
    for t in range(1000):       # in 28 decimal digits; Diffusers' own is a float32 product, hence 8e-7 off
        beta = (Decimal("0.00085").sqrt()
                + (Decimal("0.012").sqrt() - Decimal("0.00085").sqrt()) * t / 999) ** 2
        exact *= 1 - beta
        assert schedule.alpha_bar()[t].item() == pytest.approx(float(exact), rel=1e-12)
    assert float(exact) == pytest.approx(0.0046601, abs=5e-8)
    assert (schedule.alpha_bar() / scheduler.alphas_cumprod.double() - 1).abs().max() < 1e-6

def test_thirty_steps_are_958_925_to_1(scheduler):
    assert schedule.timesteps(30) == [33 * k + 1 for k in range(29, -1, -1)] == scheduler.timesteps.tolist()

@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999])
def test_any_number_of_steps_is_spaced_as_diffusers_spaces_it(steps, scheduler):
    scheduler.set_timesteps(steps)
    assert schedule.timesteps(steps) == scheduler.timesteps.tolist()

@pytest.mark.parametrize("t, previous, expected", [
    (958, 925, (0.0321517778, 0.8301566836, 0.5524241307)),
    (34, 1, (0.9477553258, 0.0522380786, 0.0402035616)),
    (1, None, (1, 0, 0))])
def test_step_coefficients_are_the_published_ones(t, previous, expected):
    """Of ẑ_0, z_t and the noise, each alone 1; ẑ_0 = (z_t - √(1-ᾱ_t) ε) / √ᾱ_t."""
    signal, sigma = schedule.alpha_bar()[t].item() ** 0.5, (1 - schedule.alpha_bar()[t].item()) ** 0.5
    units = (0, -signal / sigma, 0), (1, 1 / sigma, 0), (0, 0, 1)
    assert [ddpm_step(*unit, t, previous) for unit in units] == pytest.approx(expected, abs=5e-11)

def test_added_noise_equals_eq_1_and_diffusers(scheduler):
    z0, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 958, 999])
    z_t = schedule.add_noise(z0, noise, t)
    a = schedule.alpha_bar()[t][:, None, None, None]
    assert (z_t - (a.sqrt() * z0 + (1 - a).sqrt() * noise)).abs().max() < 1e-6      # eq. (1) in float64
    assert (z_t - scheduler.add_noise(z0, noise, t)).abs().max() < 1e-5
    # in bfloat16 no noise would be added at t = 0
    assert (z_t[0] - z0[0]).abs().max() > 0

def test_guidance_is_eq_5():
    null, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert guide(null, c, 1.3).tolist() == pytest.approx([1 + 1.3 * 2, 2 - 1.3 * 4])
    assert torch.equal(guide(null, c, 0), null)

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    unet, projector = UNet((32, 64), layers=1), Projector(d_e=16, d_h=32)
    return unet.eval().requires_grad_(False), projector.requires_grad_(False)

def test_the_guided_trajectory_equals_diffusers_fed_the_same_noise(model, scheduler):
    unet, projector = model
    e, seed, w = torch.randn(1, 16), 11, 1.3
    ours = sample(e, projector, unet, Sampling(w, 30), [seed], (4, 8, 8))

    # Diffusers draws from it what our generator of the image draws
    g = torch.Generator().manual_seed(seed)
    c, c_null = projector(e), projector(projector.null)
    z = torch.randn(1, 4, 8, 8, generator=g)
    for t in scheduler.timesteps:
        eps_null, eps_c = unet(z, t[None], c_null), unet(z, t[None], c)
        z = scheduler.step(eps_null + w * (eps_c - eps_null), t, z, generator=g).prev_sample
    assert (ours - z).abs().max() < 1e-5 * z.abs().max()

def test_noise_drawn_before_the_loop_is_bit_for_bit_that_drawn_at_each_step(model):
    g, shape = torch.Generator().manual_seed(3), (4, 1, 3)          # of 12 numbers: torch fills by 16
    ours = sample(torch.randn(1, 16), model[1], lambda z, t, c: 0 * z, Sampling(1, 5), [3], shape)
    z = torch.randn(shape, generator=g)[None]
    for t, previous in itertools.pairwise([*timesteps(5), None]):
        z = ddpm_step(z, 0 * z, torch.randn(shape, generator=g)[None], t, previous)
    assert torch.equal(ours, z)

def test_an_image_depends_on_its_seed_and_not_on_its_batch(model):
    unet, projector = model
    e = torch.randn(3, 16)
    together = sample(e, projector, unet, Sampling(1.5, 4), [7, 8, 9], (4, 8, 8))
    alone = torch.cat([sample(e[i:i + 1], projector, unet, Sampling(1.5, 4), [7 + i], (4, 8, 8))
                       for i in (2, 0, 1)])[[1, 2, 0]]
    assert (together - alone).abs().max() < 1e-4 * together.abs().max()
    assert (together[0] - sample(e[:1], projector, unet, Sampling(1.5, 4), [10],
                                 (4, 8, 8))[0]).abs().max() > 0.1

def test_guidance_1_makes_no_null_pass_and_equals_eq_5_at_1(model):
    unet, projector = model
    batches = []

    def spy(z, t, c):
        batches.append(len(z))
        return unet(z, t, c)
    e = torch.randn(2, 16)
    plain = sample(e, projector, spy, Sampling(1, 3), [1, 2], (4, 8, 8))
    assert batches == [2, 2, 2]
    almost = sample(e, projector, spy, Sampling(1 + 1e-7, 3), [1, 2], (4, 8, 8))
    assert batches[3:] == [4, 4, 4]
    assert (plain - almost).abs().max() < 1e-4 * plain.abs().max()
