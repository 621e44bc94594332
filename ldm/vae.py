"""Stable Diffusion 1.5's autoencoder: z_0 = E(x), x = D(z_0), with the tensor names of Diffusers."""
import torch
import torch.nn.functional as F
from torch import nn

from .unet import Attention, Downsample, Level, ResBlock, Upsample

# Brings z_0 to unit variance. Source: CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml
SCALE = 0.18215
EPS = 1e-6          # of every GroupNorm here; the U-Net's residual blocks have 1e-5

class VAE(nn.Module):
    """KL autoencoder, 8 x 8 pixels to one latent pixel; as in SD1.5, 83,653,863 parameters in 248 tensors.
    channels: width of each level. layers: blocks per level of the encoder, one more in the decoder. groups of
    every GroupNorm: where each has one channel, the norm removes its mean, and an image loses its tone."""
    PIXELS = 2 ** 19        # in one pass, two images of 512 px: 1.5 GiB, counted by `tests/bench.py memory`

    def __init__(self, channels=(128, 256, 512, 512), layers=2, latent=4, groups=32):
        super().__init__()
        self.latent, self.factor = latent, 2 ** (len(channels) - 1)
        self.encoder = Coder(channels, layers, 3, 2 * latent, groups)
        self.decoder = Coder(channels[::-1], layers + 1, latent, 3, groups, decoder=True)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance, (B, 4, H/8, W/8), unscaled."""
        device, parts = self.quant_conv.weight.device, x.split(max(1, self.PIXELS // x[0, 0].numel()))
        moments = torch.cat([self.quant_conv(self.encoder(part.to(device))) for part in parts])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z0):
        """z_0 (B, 4, h, w), scaled -> x (B, 3, 8h, 8w), about [-1, 1]; four images at a time at most."""
        parts = z0.split(min(4, max(1, self.PIXELS // (self.factor ** 2 * z0[0, 0].numel()))))
        return torch.cat([self.decoder(self.post_quant_conv(part / SCALE)) for part in parts])

    def reconstruct(self, x):
        """x (B, 3, H, W) -> D(E(x)), by the posterior's mean."""
        return self.decode(SCALE * self.encode(x)[0])

def draw_latent(mean, logvar, noise):
    """z_0 = 0.18215 (mean + std · noise): one sample of the posterior, scaled; all shapes (B, 4, h, w)."""
    return SCALE * (mean + torch.exp(0.5 * logvar) * noise)

class Stage(Level):
    """n residual blocks from c_in to c channels, attention after the first of them; then the resampling."""
    def __init__(self, c_in, c, n, groups, **others):
        super().__init__([ResBlock(c_in if j == 0 else c, c, None, EPS, groups) for j in range(n)], **others)

    def forward(self, h):
        first, *others = self.resnets
        for part in (first, *self.attentions, *others, *self.downsamplers, *self.upsamplers):
            h = part(h)
        return h

class Coder(nn.Module):
    """The encoder E: images to latents, stages of halved size, the middle last; or D, its mirror image."""
    def __init__(self, channels, layers, c_in, c_out, groups, decoder=False):
        super().__init__()
        first, last = channels[0], channels[-1]
        middle, kind = (first, "up") if decoder else (last, "down")
        self.conv_in = nn.Conv2d(c_in, first, 3, padding=1)
        self.mid_block = Stage(middle, middle, 2, groups, attentions=[SpatialAttention(middle, groups)])
        stages = nn.ModuleList()
        for i, (before, c) in enumerate(zip((first, *channels), channels), 1):      # the last keeps its size
            resample = [Upsample(c) if decoder else Downsample(c, asymmetric=True)] * (i < len(channels))
            stages.append(Stage(before, c, layers, groups, **{f"{kind}samplers": resample}))
        setattr(self, f"{kind}_blocks", stages)
        self.order = [self.mid_block, *stages] if decoder else [*stages, self.mid_block]
        self.conv_norm_out = nn.GroupNorm(groups, last, EPS)
        self.conv_out = nn.Conv2d(last, c_out, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.order:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

class SpatialAttention(Attention):
    """One head over all positions, residual: x (B, C, H, W) -> (B, C, H, W)."""
    def __init__(self, c, groups):
        super().__init__(c, c, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, c, EPS)

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)   # (B, L, C)
        h = super().forward(h, h)
        return x + h.transpose(1, 2).reshape(x.shape)       # x first: a sum has the strides of its first term
