"""Stable Diffusion 1.5 checkpoints of random weights in the three layouts that are found, full-size or
narrow.

Names are written from the published formats, in the direction opposite to ldm/weights.py's; Diffusers' own
converter checks both."""
import math
import re
import zlib
from functools import cache

import torch
from safetensors.torch import save_file

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
COMPVIS_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
COMPVIS_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
                  "conv2": "out_layers.3",
                  "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
COMPVIS_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut"}

def networks(unet=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), layers=2):
    """Diffusers' U-Net and VAE of these widths."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    return {
        "unet": UNet2DConditionModel(sample_size=64, block_out_channels=unet, layers_per_block=layers,
                                     cross_attention_dim=768, attention_head_dim=8),
        "vae": AutoencoderKL(sample_size=512, block_out_channels=vae, layers_per_block=layers,
                             latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                             up_block_types=("UpDecoderBlock2D",) * 4)}

@cache
def normal_numbers():
    """4 million; a prime number of them, so that no two rows of a matrix are alike."""
    return torch.randn(4_194_301, generator=torch.Generator().manual_seed(0))

def random_tensor(name, shape):
    """Weights that keep the variance, norms near one, small biases; a function of the name. They are taken in
    turn from the same numbers: to draw all of SD1.5's takes half a minute."""
    numbers, n = normal_numbers(), math.prod(shape)
    start = zlib.crc32(name.encode()) % len(numbers)
    noise = numbers.repeat(-(-(start + n) // len(numbers)))[start:start + n].reshape(shape).clone()
    if len(shape) == 1:
        return 0.02 * noise + float("norm" in name and name.endswith("weight"))
    return noise * shape[1:].numel() ** -0.5

def replace(name, table):
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name

def compvis_unet_name(name):
    if m := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        block = f"input_blocks.{3 * int(m[2]) + int(m[4]) + 1}" if m[1] == "down" else \
            f"output_blocks.{3 * int(m[2]) + int(m[4])}"
        name = f"{block}.1.{m[5]}" if m[3] == "attentions" else f"{block}.0.{replace(m[5], COMPVIS_RESNET)}"
    elif m := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        name = f"input_blocks.{3 * int(m[1]) + 3}.0.op.{m[2]}"
    elif m := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        name = f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}.conv.{m[2]}"
    elif name.startswith("mid_block.resnets"):
        name = replace(replace(name, COMPVIS_RESNET), COMPVIS_UNET)
    else:
        name = replace(name, COMPVIS_UNET)
    return f"model.diffusion_model.{name}"

def compvis_vae_name(name):
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    return f"first_stage_model.{replace(name, COMPVIS_VAE)}"

def compvis(unet, vae):
    """Tensors under Diffusers' names -> one dictionary under CompVis's, with others that are not needed."""
    one = {compvis_unet_name(name): t for name, t in unet.items()}
    for name, t in vae.items():             # its attention is made of 1x1 convolutions
        one[compvis_vae_name(name)] = t[:, :, None, None] if re.search(r"to_.*weight", name) else t
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    one["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    one["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return one

def make_sd15(path, layout="diffusers", width=320):
    """Write a checkpoint: "diffusers", "diffusers-old" (the VAE's attention as `query`) or "compvis" (one
    file).

    The three layouts of one width hold the same network."""
    v = max(32, width * 2 // 5 // 32 * 32)
    with torch.device("meta"):
        nets = networks(*(tuple(w * k for k in (1, 2, 4, 4)) for w in (width, v)))
    tensors = {part: {name: random_tensor(f"{part}.{name}", t.shape) for name, t in net.state_dict().items()}
               for part, net in nets.items()}
    if layout == "compvis":
        save_file(compvis(**tensors), path, metadata={"format": "pt"})
        return
    if layout == "diffusers-old":
        tensors["vae"] = {replace(name, OLD_ATTENTION) if "attentions" in name else name: t
                          for name, t in tensors["vae"].items()}
    for part, net in nets.items():
        (path / part).mkdir(parents=True, exist_ok=True)
        net.save_config(path / part)
        save_file(tensors[part], path / part / "diffusion_pytorch_model.safetensors",
                  metadata={"format": "pt"})
