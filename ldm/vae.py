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

    channels: width of each level. layers: residual blocks per level of the encoder (one more in the decoder).
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, latent=4):
        super().__init__()
        self.latent, self.factor = latent, 2 ** (len(channels) - 1)
        self.encoder = ImageEncoder(channels, layers, latent)
        self.decoder = LatentDecoder(channels, layers, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance, (B, 4, H/8, W/8), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z0):
        """z_0 (B, 4, h, w), scaled -> x (B, 3, 8h, 8w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z0 / SCALE))

    def reconstruct(self, x):
        """x (B, 3, H, W) -> D(E(x)), by the posterior's mean."""
        return self.decode(SCALE * self.encode(x)[0])

def draw_latent(mean, logvar, noise):
    """z_0 = 0.18215 (mean + std · noise): one sample of the posterior, scaled; all shapes (B, 4, h, w)."""
    return SCALE * (mean + torch.exp(0.5 * logvar) * noise)

class Stage(Level):
    """n residual blocks from c_in to c channels, attention after the first of them; then the resampling."""

    def __init__(self, c_in, c, n, **others):
        super().__init__([ResBlock(c_in if j == 0 else c, c, eps=EPS) for j in range(n)], **others)

    def forward(self, h):
        first, *others = self.resnets
        for part in (first, *self.attentions, *others, *self.downsamplers, *self.upsamplers):
            h = part(h)
        return h

class ImageEncoder(nn.Module):
    def __init__(self, channels, layers, latent):
        super().__init__()
        first, last = channels[0], channels[-1]
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for c_in, c in zip((first, *channels), channels):
            self.down_blocks.append(Stage(c_in, c, layers, downsamplers=[Downsample(c, asymmetric=True)]))
        del self.down_blocks[-1].downsamplers[0]        # the last level keeps its size
        self.mid_block = Stage(last, last, 2, attentions=[SpatialAttention(last)])
        self.conv_norm_out = nn.GroupNorm(32, last, EPS)
        self.conv_out = nn.Conv2d(last, 2 * latent, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

class LatentDecoder(nn.Module):
    def __init__(self, channels, layers, latent):
        super().__init__()
        first, last = channels[-1], channels[0]
        self.conv_in = nn.Conv2d(latent, first, 3, padding=1)
        self.mid_block = Stage(first, first, 2, attentions=[SpatialAttention(first)])
        self.up_blocks = nn.ModuleList()
        for c_in, c in zip((first, *channels[::-1]), channels[::-1]):
            self.up_blocks.append(Stage(c_in, c, layers + 1, upsamplers=[Upsample(c)]))
        del self.up_blocks[-1].upsamplers[0]
        self.conv_norm_out = nn.GroupNorm(32, last, EPS)
        self.conv_out = nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

class SpatialAttention(Attention):
    """One head over all positions, residual: x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__(c, c, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(32, c, EPS)

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)   # (B, L, C)
        h = super().forward(h, h)
        return x + h.transpose(1, 2).reshape(x.shape)       # x first: a sum has the strides of its first term
