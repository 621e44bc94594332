"""The DDPM noise schedule of Stable Diffusion 1.5, as functions of tensors, in float32 whatever the U-Net is.
In bfloat16 ᾱ rounds to 1 at t = 0 and 1, where no noise is then added; 30 steps of sampling drift by 1 %."""
from functools import cache

import torch

T = 1000

@cache
def alpha_bar():
    """ᾱ (1000,) in float64: the product of 1 - β, with √β linear from √0.00085 to √0.012.
    The paper writes α_t for it. Source: CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml.
    Accumulated in float64 as there; Diffusers does it in float32, and differs by 8e-7."""
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, T, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)

def add_noise(z0, noise, t):
    """z_t = √ᾱ_t z_0 + √(1-ᾱ_t) ε   (eq. 1).   z0, noise (B, 4, h, w); t (B,) integers in 0..999."""
    signal, sigma = _roots(z0.device, z0.dtype)[:, t, None, None, None]
    return signal * z0 + sigma * noise

@cache
def _roots(device, dtype):
    """√ᾱ_t and √(1-ᾱ_t), (2, 1000), on the device."""
    return torch.stack([alpha_bar(), 1 - alpha_bar()]).sqrt().to(device, dtype)

def timesteps(steps=30):
    """Timesteps from noise to image: k · (1000 // steps) + 1, k = steps-1 .. 0; for 30: 958, 925, ..., 34, 1.
    This is Diffusers' `leading` spacing with `steps_offset` 1, which SD1.5's scheduler config asks for."""
    return [k * (T // steps) + 1 for k in reversed(range(steps))]

def ddpm_step(z, eps, noise, t, previous):
    """One step t -> previous (None at the end): z_t, predicted ε -> z_previous, (B, 4, h, w), float32.
    Ho et al. 2020, eqs. (6)-(7), for steps of any length; σ² is the posterior variance (`fixed_small`)."""
    ab = alpha_bar()
    ab_t, ab_p = ab[t].item(), 1.0 if previous is None else ab[previous].item()
    a = ab_t / ab_p
    z0 = (z - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5       # eq. (1), solved for z_0
    c_0 = ab_p ** 0.5 * (1 - a) / (1 - ab_t)
    c_t = a ** 0.5 * (1 - ab_p) / (1 - ab_t)
    sigma = ((1 - a) * (1 - ab_p) / (1 - ab_t)) ** 0.5
    return c_0 * z0 + c_t * z + sigma * noise
