"""The condition: UNI2-h embeddings e, and the projector f_φ that turns them into cross-attention tokens c.

    h = σ(LN(W₁ e + b₁)),  h in R^d_h                                                                           (eq. 3)
    c = [W₂ h + b₂] as n_c x d_c,  c in R^(n_c x d_c)                                                           (eq. 4)

σ is SiLU, LN is LayerNorm. The null embedding e_∅ stands in for e before the projection.
"""
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ldm.app import Fail
from ldm.data import resize_crop
from ldm.weights import BUILT_IN, TensorFile, hub_files, is_hub_name, load, refuse_numbers


class Projector(nn.Module):
    """f_φ: embeddings e (B, d_e) -> tokens c (B, n_c, d_c). The defaults are the paper's baseline: 4,724,736 parameters.

    With the null embedding (1, d_e), which is a parameter of this module, that makes 4,726,272, the number that Table 2
    prints for the projector alone. A LayerNorm(d_c) on the tokens, as in IP-Adapter, gives the same number without the
    null embedding: `token_norm` is this other reading. Depth 3 repeats eq. (3) with W (d_h, d_h); the paper does not say.
    """

    def __init__(self, d_e=1536, d_h=1024, n_c=4, d_c=768, depth=2, token_norm=False):
        super().__init__()
        self.shape = dict(embedding=d_e, hidden=d_h, tokens=n_c, context=d_c, depth=depth, token_norm=int(token_norm))
        self.linear = nn.ModuleList(nn.Linear(d_e if k == 0 else d_h, d_h) for k in range(depth - 1))
        self.norm = nn.ModuleList(nn.LayerNorm(d_h) for _ in range(depth - 1))
        self.out = nn.Linear(d_h, n_c * d_c)
        self.token_norm = nn.LayerNorm(d_c) if token_norm else nn.Identity()
        self.null = nn.Parameter(0.01 * torch.randn(1, d_e))

    @classmethod
    def from_header(cls, header):
        """Rebuild from the strings of an adapter's header. Fails (KeyError, ValueError) on what is none."""
        shape = [int(header[key]) for key in ("embedding", "hidden", "tokens", "context", "depth", "token_norm")]
        if min(shape[:4]) < 1 or shape[4] not in (2, 3):
            raise ValueError(f"no projector has the sizes {shape}")
        return cls(*shape)

    def forward(self, e, keep=None):
        """e (B, d_e) -> c (B, n_c, d_c). keep (depth-1, B, d_h): dropout as factors, 0 or 1/(1-p); None outside training."""
        h = e
        for k, (linear, norm) in enumerate(zip(self.linear, self.norm)):
            h = F.silu(norm(linear(h)))                                 # (eq. 3)
            if keep is not None:
                h = h * keep[k]
        c = self.out(h).unflatten(-1, (self.shape["tokens"], -1))       # (eq. 4)
        return self.token_norm(c)


# ---- UNI2-h, frozen ------------------------------------------------------------------------------------------------

UNI2H = "MahmoodLab/UNI2-h"
GATED = (f"UNI2-h is gated: ask for access on https://huggingface.co/{UNI2H} with an institutional e-mail address, then log in "
         "with `hf auth login` or set HF_TOKEN; or pass --uni2h with the folder or file that you have")
_FILES = ["model.safetensors", "pytorch_model.bin"]


def open_encoder(source=UNI2H):
    """A folder with pytorch_model.bin or model.safetensors, such a file, a Hugging Face repository or "toy" -> TensorFile."""
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise Fail(f"{path} holds neither {' nor '.join(_FILES)}; pass the folder or file of UNI2-h's weights")
        path = found[0]
    elif not path.is_file():
        if not is_hub_name(source):
            raise Fail(f"--uni2h {source}: no such folder or file; pass UNI2-h's weights, or leave it out for the hub's {UNI2H}")
        path = hub_files(source, _FILES[::-1], gated=GATED if source == UNI2H else "")[0]
    return TensorFile(path)


def build_encoder(width=1536, depth=24):
    """UNI2-h: ViT-H/14 with SwiGLU, 8 registers and 64-wide heads; by default 681,394,176 parameters, here untrained.

    The timm call is that on MahmoodLab/UNI2-h's page.
    """
    import timm  # with torchvision beneath it; only the encoder needs them
    return timm.create_model(
        "vit_giant_patch14_224", img_size=224, patch_size=14, depth=depth, num_heads=width // 64, init_values=1e-5,
        embed_dim=width, mlp_ratio=2.66667 * 2, num_classes=0, no_embed_class=True, mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU, reg_tokens=8, dynamic_img_size=True)


def load_encoder(file, device="cpu"):
    """The encoder of a TensorFile from `open_encoder` in float32, frozen, as wide and deep as its tensors say."""
    refuse_numbers(file, f"It does not fit {UNI2H}")
    width = file.shapes.get("patch_embed.proj.weight", (0,))[0]
    depth = len({name.split(".")[1] for name in file.shapes if name.startswith("blocks.")})
    if width < 64 or width % 64 or not depth:
        raise Fail(f"{file.path} is not UNI2-h: no patch_embed and blocks of a vision transformer with 64-wide heads")
    return load(partial(build_encoder, width, depth), file, device, hint=f"It does not fit {UNI2H}")


def preprocess(images):
    """PIL RGB images of any size -> (B, 3, 224, 224): bilinear with antialiasing, ImageNet's mean and standard deviation.

    timm's own `resolve_data_config` would say mean 0.5 and bicubic for a model that is built locally.
    """
    x = np.stack([np.asarray(resize_crop(image, 224, Image.Resampling.BILINEAR), dtype=np.float32) for image in images]) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def embed(encoder, images):
    """PIL RGB images -> embeddings e (B, 1536) in float32 on the CPU."""
    return encoder(preprocess(images).to(next(encoder.parameters()).device)).float().cpu()
