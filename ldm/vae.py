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


class ImageEncoder(nn.Module):
    def __init__(self, channels, layers, latent):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = channels[0]
        for i, c in enumerate(channels):
            self.down_blocks.append(Level(
                resnets=[ResBlock(width if j == 0 else c, c, eps=EPS) for j in range(layers)],
                downsamplers=[Downsample(c, asymmetric=True)] if i < len(channels) - 1 else []))
            width = c
        self.mid_block = middle(width)
        self.conv_norm_out = nn.GroupNorm(32, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * latent, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down_blocks:
            for part in (*level.resnets, *level.downsamplers):
                h = part(h)
        h = through_middle(self.mid_block, h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class LatentDecoder(nn.Module):
    def __init__(self, channels, layers, latent):
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        self.mid_block = middle(width)
        self.up_blocks = nn.ModuleList()
        for i, c in enumerate(reversed(channels)):
            self.up_blocks.append(Level(
                resnets=[ResBlock(width if j == 0 else c, c, eps=EPS) for j in range(layers + 1)],
                upsamplers=[Upsample(c)] if i < len(channels) - 1 else []))
            width = c
        self.conv_norm_out = nn.GroupNorm(32, width, EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        h = through_middle(self.mid_block, self.conv_in(z))
        for level in self.up_blocks:
            for part in (*level.resnets, *level.upsamplers):
                h = part(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def middle(c):
    return Level(resnets=[ResBlock(c, c, eps=EPS) for _ in range(2)], attentions=[SpatialAttention(c)])


def through_middle(block, h):
    return block.resnets[1](block.attentions[0](block.resnets[0](h)))


class SpatialAttention(Attention):
    """One head over all positions, residual: x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__(c, c, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(32, c, EPS)

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)   # (B, L, C)
        h = super().forward(h, h)
        return x + h.transpose(1, 2).reshape(x.shape)       # x first: a sum has the strides of its first term
