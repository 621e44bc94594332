"""Stable Diffusion 1.5's U-Net ε_θ(z_t, t, c), with the tensor names of Diffusers.
Shapes: B images, C channels, H x W latent pixels, L = H·W positions, N condition tokens of width d_c."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

class UNet(nn.Module):
    """Predict the noise ε in z_t. The defaults are SD1.5: 859,520,964 parameters in 686 tensors.
    channels: width of each level; all levels but the last have attention. layers: residual blocks per level
    on the way down (one more on the way up). context: d_c, the width of a condition token. heads: heads of
    every attention (what SD1.5's config calls `attention_head_dim: 8`)."""
    def __init__(self, channels=(320, 640, 1280, 1280), layers=2, context=768, heads=8, latent=4):
        super().__init__()
        levels, first, last, time = len(channels), channels[0], channels[-1], 4 * channels[0]
        self.latent, self.context = latent, context
        def level(inputs, c, attentions, **samplers):       # inputs: the widths of its blocks' inputs
            resnets = [ResBlock(c_in, c, time) for c_in in inputs]
            return Level(resnets, [Transformer(c, heads, context) for _ in range(attentions)], **samplers)
        self.conv_in = nn.Conv2d(latent, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width, skips = first, [first]           # the widths that the way down leaves for the way up
        for i, c in enumerate(channels):
            n, down = (0, []) if i == levels - 1 else (layers, [Downsample(c)])
            self.down_blocks.append(level([width, *[c] * (layers - 1)], c, n, downsamplers=down))
            width, skips = c, skips + [c] * (layers + len(down))
        self.mid_block = level([last, last], last, 1)
        for i, c in enumerate(reversed(channels)):
            inputs = [below + skips.pop() for below in (width, *[c] * layers)]
            up = [] if i == levels - 1 else [Upsample(c)]
            self.up_blocks.append(level(inputs, c, 0 if i == 0 else layers + 1, upsamplers=up))
            width = c
        self.conv_norm_out = nn.GroupNorm(32, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, latent, 3, padding=1)

    def forward(self, z, t, c):
        """z (B, 4, H, W), t (B,) integer timesteps, c (B, N, d_c) -> ε (B, 4, H, W).
        Computed in the network's dtype, returned in z's: float32 around a bfloat16 network."""
        dtype = self.conv_in.weight.dtype
        t, c = self.time_embedding(t), c.to(dtype)          # (B, 4 C₀), (B, N, d_c)
        skips = [h := self.conv_in(z.to(dtype))]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, h, t, c)
                skips.append(h)
            for down in level.downsamplers:
                h = down(h)
                skips.append(h)
        h = self.mid_block.block(1, self.mid_block.block(0, h, t, c), t, c)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, torch.cat([h, skips.pop()], dim=1), t, c)
            for up in level.upsamplers:
                h = up(h)
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(z.dtype)

class TimeEmbedding(nn.Module):
    """Integer timesteps (B,) -> (B, width), from cosines, then sines, of t · 10000^(-2i/dim) in float32."""
    def __init__(self, dim, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, width), nn.Linear(width, width)

    def forward(self, t):
        half = self.linear_1.in_features // 2
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))

class Level(nn.Module):
    """The modules of one resolution under Diffusers' names; the network's forward joins them."""
    checkpointing = False       # keep only an attention's input for the backward pass; the rest is recomputed

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(downsamplers), nn.ModuleList(upsamplers)

    def block(self, j, h, t, c):
        """The jth residual block, and the attention that follows where there is one."""
        h = self.resnets[j](h, t)
        for attention in self.attentions[j:j + 1]:
            h = checkpoint(attention, h, c, use_reentrant=False) if self.checkpointing else attention(h, c)
        return h

class Conv(nn.Conv2d):
    """A convolution; a wide one of few positions on the CPU without oneDNN, which takes twice the time."""
    def forward(self, x):
        if x.device.type != "cpu" or self.in_channels < 1280 or x.shape[0] * x[0, 0].numel() > 128:
            return super().forward(x)
        how = self.kernel_size, self.bias, self.stride, self.padding
        return torch.ops.aten.thnn_conv2d(x, self.weight, *how)

class ResBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H, W). time: width of the time embedding, None in the VAE."""
    def __init__(self, c_in, c_out, time=None, eps=1e-5, groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv(c_in, c_out, 3, padding=1)
        if time is not None:
            self.time_emb_proj = nn.Linear(time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, t=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if t is not None:
            h = h + self.time_emb_proj(F.silu(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h

class Transformer(nn.Module):
    """Self-attention over the positions, cross-attention to the condition, feed-forward; each residual."""
    def __init__(self, c, heads, context):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, heads, context)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, c):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)       # (B, L, C)
        h = self.transformer_blocks[0](h, c)
        h = h.transpose(1, 2).reshape(x.shape)              # (B, C, H, W), by strides of (B, H, W, C)
        return x + self.proj_out(h)                         # x first: a sum has the strides of its first term

class TransformerBlock(nn.Module):
    """h (B, L, C), c (B, N, d_c) -> (B, L, C)."""
    def __init__(self, c, heads, context):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, c, heads)
        self.norm2, self.attn2 = nn.LayerNorm(c), Attention(c, context, heads)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, h, c):
        x = self.norm1(h)
        h = self.attn1(x, x) + h
        h = self.attn2(self.norm2(h), c) + h
        return self.ff(self.norm3(h)) + h

class Attention(nn.Module):
    """Queries from x (B, L, C), keys and values from c (B, N, context) -> (B, L, C). bias: of Q, K and V."""
    def __init__(self, dim, context, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k, self.to_v = (nn.Linear(context, dim, bias) for _ in "kv")
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, c):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, heads, L or N, C / heads)
                   for y in (self.to_q(x), self.to_k(c), self.to_v(c)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class FeedForward(nn.Module):
    """h (B, L, C) -> (B, L, C) through GEGLU of inner width 4C, with the exact (erf) GELU."""
    def __init__(self, c):
        super().__init__()
        geglu = nn.ModuleDict({"proj": nn.Linear(c, 8 * c)})
        self.net = nn.ModuleList([geglu, nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, h):
        h, gate = self.net[0]["proj"](h).chunk(2, dim=-1)
        return self.net[2](h * F.gelu(gate))

class Downsample(nn.Module):
    """Halve H and W. The VAE pads right and bottom only: all around, its latents have 0.8 relative error."""
    def __init__(self, c, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv(c, c, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)

class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution."""
    def __init__(self, c):
        super().__init__()
        self.conv = Conv(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
