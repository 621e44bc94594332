"""Low-rank adaptation of the U-Net's attention, and the adapter file.

    W' = W + (α/r) B A                                                                                          (eq. 6)

on the projections Q, K, V and O of all 32 attentions, self and cross: 128 adapters, 199,296 parameters per unit of rank.
"""
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

from ldm.files import Fail, save_tensors
from ldm.unet import Attention
from ldm.weights import TensorFile
from projector import Projector


class LoRALinear(nn.Module):
    """A frozen linear layer W (d_out, d_in) with trainable A (r, d_in) and B (d_out, r) in float32.

    B starts at zero, so that the adapted network equals the frozen one exactly. A starts as PEFT's does, uniform within
    ±1/√d_in (the paper does not say). No bias and no dropout of its own.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias             # W, under the name that it had
        device = linear.weight.device                                   # drawn on the CPU, to be the same everywhere
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5)).to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.scale = alpha / rank
        self.frozen = None                                              # W, while `weight` is W'

    def forward(self, x):
        h = F.linear(x, self.weight, self.bias)
        if self.frozen is not None:
            return h
        return h + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))   # (eq. 6), W apart from BA

    @torch.no_grad()
    def merge(self):
        """Put W' = W + (α/r) B A, summed in at least float32, in the place of W."""
        if self.frozen is None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            merged = self.weight.to(dtype) + self.scale * (self.B.to(dtype) @ self.A.to(dtype))     # (eq. 6)
            self.frozen, self.weight = self.weight, nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self):
        """Put W back: the very tensor that `merge` took away, hence exact."""
        if self.frozen is not None:
            self.weight, self.frozen = self.frozen, None


def inject(unet, rank, alpha=None):
    """Wrap to_q, to_k, to_v and to_out.0 of every attention in a LoRALinear; α = r if not given. Changes `unet`.

    A is drawn from torch's global generator: seed it first.
    """
    if rank < 1:
        raise Fail(f"LoRA's rank must be 1 or more, not {rank}")
    alpha = float(rank) if alpha is None else alpha
    for attention in [m for m in unet.modules() if isinstance(m, Attention)]:
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, LoRALinear(getattr(attention, name), rank, alpha))
        attention.to_out[0] = LoRALinear(attention.to_out[0], rank, alpha)
    return unet


def lora_layers(unet):
    """{name: LoRALinear} in the order of the network."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(unet):
    """{name: A or B}, the trainable tensors; a name is the layer's with .A or .B."""
    return {f"{name}.{x}": getattr(layer, x) for name, layer in lora_layers(unet).items() for x in ("A", "B")}


def merge(unet):
    for layer in lora_layers(unet).values():
        layer.merge()


def unmerge(unet):
    for layer in lora_layers(unet).values():
        layer.unmerge()


def fold(unet):
    """Merge for good: every LoRALinear becomes a plain linear layer W', and W is let go of."""
    for name, layer in lora_layers(unet).items():
        layer.merge()
        linear = nn.Linear(*reversed(layer.weight.shape), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, linear)


# ---- adapter.safetensors: LoRA, projector and null embedding, with all that is needed to rebuild them -----------------

FORMAT = "uni2h-sd15-lora-1"
LICENCE = ("Trained from Stable Diffusion 1.5 (CreativeML Open RAIL-M, whose use restrictions carry over) on embeddings of "
           "UNI2-h (CC BY-NC-ND 4.0, non-commercial) and on your images: their terms apply to this file.")


def adapter_tensors(unet, projector):
    """{name in the file: tensor}. LoRA carries PEFT's names under Diffusers' `unet.` prefix.

    Diffusers' pipelines refuse a file in which a name lacks "lora": hence `lora_projector.` for the rest, which they skip.
    """
    tensors = {f"unet.{name[:-1]}lora_{name[-1]}.weight": p for name, p in lora_parameters(unet).items()}
    return tensors | {f"lora_projector.{name}": p for name, p in projector.state_dict().items()}


def save_adapter(path, unet, projector, header):
    """Write the adapter with `header` ({str: str}) and the shape of its parts; the file appears whole or not at all."""
    layers = list(lora_layers(unet).values())
    rank, alpha = layers[0].A.shape[0], layers[0].scale * layers[0].A.shape[0]
    peft = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    shape = {"rank": str(rank), "alpha": str(alpha)} | {name: str(value) for name, value in projector.shape.items()}
    save_tensors(path, adapter_tensors(unet, projector), {
        "format": FORMAT, "licence": LICENCE, "lora_adapter_metadata": json.dumps(peft), **shape, **header})


def open_adapter(path):
    """An adapter file -> TensorFile whose `.header` holds what `save_adapter` was given, and `rank`, `tokens` and so on."""
    file = TensorFile(path)
    if file.header.get("format") != FORMAT:
        raise Fail(f"{path} is not an adapter written by train.py")
    return file


def load_adapter(file, unet):
    """Inject the LoRA of an open adapter into `unet` and fill it -> the Projector; both in float32, frozen.

    The U-Net's tensors must have the shapes that the adapter was trained on; whether it is the same base in content is
    for the caller to ask of the header's `base_sha256`.
    """
    try:
        projector = Projector.from_header(file.header)
        inject(unet, int(file.header["rank"]), float(file.header["alpha"]))
    except (KeyError, ValueError) as problem:
        raise Fail(f"{file.path}: its header is damaged ({problem}); write it again with train.py") from None
    wanted = adapter_tensors(unet, projector)
    wrong = [n for n in wanted.keys() | file.shapes.keys()
             if n not in wanted or file.shapes.get(n) != tuple(wanted[n].shape)]
    if wrong:
        raise Fail(f"{file.path} was trained on another base, {file.header.get('base', 'not named')}: {len(wrong)} tensors "
                   f"do not fit, such as {min(wrong)}; pass that base with --sd15")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(file.get(name))
    device = next(unet.parameters()).device
    unet.requires_grad_(False)
    return projector.to(device).requires_grad_(False)
