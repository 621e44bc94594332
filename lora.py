#!/usr/bin/env python3
"""Low-rank adaptation of the U-Net's attention, and the adapter file.

    W' = W + (α/r) B A                                                                                          (eq. 6)

on the projections Q, K, V and O of all 32 attentions, self and cross: 128 adapters, 199,296 parameters per unit of rank.

    python lora.py runs/x/adapter-best.safetensors --export kohya       # for ComfyUI, A1111, kohya; or peft, diffusers
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ldm.app import Fail, Parser, first_line, run_program, save_tensors, save_text
from ldm.unet import Attention
from ldm.weights import TensorFile, licence
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


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def targets(unet):
    """{name: linear layer} of Q, K, V and O of every attention, in the order of the network."""
    attentions = {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}
    return {f"{name}.{target}": m.get_submodule(target) for name, m in attentions.items() for target in TARGETS}


def inject(unet, rank, alpha=None):
    """Wrap to_q, to_k, to_v and to_out.0 of every attention in a LoRALinear; α = r if not given. Changes `unet`.

    A is drawn from torch's global generator: seed it first.
    """
    if rank < 1:
        raise Fail(f"LoRA's rank must be 1 or more, not {rank}")
    for name, linear in targets(unet).items():
        unet.set_submodule(name, LoRALinear(linear, rank, float(rank) if alpha is None else alpha))
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
    """Merge for good: every LoRALinear becomes a plain linear layer W', and W is let go of. Changes `unet`."""
    for name, layer in lora_layers(unet).items():
        layer.merge()
        linear = nn.Linear(*reversed(layer.weight.shape), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        unet.set_submodule(name, linear)
    return unet


# ---- adapter.safetensors: LoRA, projector and null embedding, with all that is needed to rebuild them -----------------

FORMAT = "uni2h-sd15-lora-1"


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
    peft = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": TARGETS}
    shape = {"rank": str(rank), "alpha": str(alpha)} | {name: str(value) for name, value in projector.shape.items()}
    save_tensors(path, adapter_tensors(unet, projector), {
        "format": FORMAT, "licence": licence(header.get("base"), header.get("encoder")),
        "lora_adapter_metadata": json.dumps(peft), **shape, **header})


def open_adapter(path):
    """An adapter file -> TensorFile whose `.header` holds what train.py knew of it, and `rank`, `tokens` and so on."""
    file = TensorFile(path)
    if file.header.get("format") != FORMAT:
        raise Fail(f"{path} is not an adapter written by train.py")
    if missing := {"base", "base_sha256", "vae_sha256", "encoder", "encoder_sha256"} - file.header.keys():
        raise Fail(f"{path}: its header lacks {min(missing)}; write it again with train.py")
    for key, high in dict(resolution=8192, step=10 ** 9).items():
        if not re.fullmatch(r"[0-9]{1,10}", file.header.get(key, "")) or int(file.header[key]) > high:
            raise Fail(f"{path}: the {key} in its header is {file.header.get(key)!r}, not 0 to {high}; write it again with train.py")
    return file


def load_projector(file):
    """The Projector of an open adapter, in float32, frozen."""
    try:
        with torch.device("meta"):          # whatever sizes a header names take no memory, unless the tensors have them
            projector = Projector.from_header(file.header)
        names = [name for name in file.names if name.startswith("lora_projector.")]
        projector.load_state_dict({name.removeprefix("lora_projector."): file.get(name).float() for name in names}, assign=True)
        if not all(tensor.isfinite().all() for tensor in projector.state_dict().values()):
            raise ValueError("a number in it is not finite")
    except (KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise Fail(f"{file.path}: its projector is damaged ({first_line(problem)}); write it again with train.py") from None
    return projector.requires_grad_(False)


def load_adapter(file, unet):
    """Inject the LoRA of an open adapter into `unet` and fill it -> the Projector; both in float32, frozen.

    The U-Net's tensors must have the shapes that the adapter was trained on; whether it is the same base in content is
    for the caller to ask of the header's `base_sha256`.
    """
    projector = load_projector(file)
    load_lora(file.path, unet)
    return projector.to(next(unet.parameters()).device)


# ---- the same LoRA in other programs' files ---------------------------------------------------------------------------

_PEFT = re.compile(
    r"(?:unet\.|base_model\.model\.)?((?:down_blocks|up_blocks|mid_block)\.\S+\.attn[12]\.(?:to_[qkv]|to_out\.0))\."
    r"(lora_A|lora_B|lora\.down|lora\.up)\.(?:default\.)?weight")
_KOHYA = re.compile(
    r"lora_unet_(down_blocks|up_blocks|mid_block)(?:_(\d+))?_attentions_(\d+)_transformer_blocks_(\d+)_(attn[12])_"
    r"(to_[qkv]|to_out_0)\.(lora_down\.weight|lora_up\.weight|alpha)")


def _place(name):
    """A tensor's name in a file of PEFT, Diffusers or kohya -> (layer, "A", "B" or "alpha"), or None of any other tensor."""
    if m := _PEFT.fullmatch(name):
        return m[1], "A" if m[2] in ("lora_A", "lora.down") else "B"
    if m := _KOHYA.fullmatch(name):
        block = f"{m[1]}.{m[2]}" if m[2] else m[1]
        layer = f"{block}.attentions.{m[3]}.transformer_blocks.{m[4]}.{m[5]}.{m[6].replace('_0', '.0')}"
        return layer, {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}[m[7]]
    return None


def read_lora(path):
    """A LoRA of SD1.5's attention by train.py, Diffusers, PEFT or kohya -> {layer: {"A": (r, d_in), "B": (d_out, r), "alpha"}}.

    α is in kohya's tensors, in the header or, with PEFT, in adapter_config.json beside the file; else it is r, as there. A
    tensor of any other kind (of a convolution, of the text encoder) is an error: without it the LoRA would be another one.
    """
    file, layers = TensorFile(path), {}
    names = [name for name in file.names if not name.startswith("lora_projector.")]
    if strangers := [name for name in names if _place(name) is None]:
        raise Fail(f"{path} holds more than LoRA on the attention of a U-Net, such as {min(strangers)}; train it on to_q, to_k, "
                   "to_v and to_out.0 alone")
    for name in names:
        layer, part = _place(name)
        layers.setdefault(layer, {})[part] = file.get(name)
    if not layers:
        raise Fail(f"{path} holds no LoRA")
    try:
        config = Path(path).with_name("adapter_config.json")
        beside = config.read_text(encoding="utf-8") if config.is_file() else "{}"
        settings = json.loads(file.header.get("lora_adapter_metadata") or beside)
        settings = {key.removeprefix("unet."): value for key, value in settings.items()}
        if odd := [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if settings.get(key)]:
            raise Fail(f"{path} was trained with {odd[0]}, which is another method than W + (α/r) B A with one rank")
        alpha = settings.get("lora_alpha", file.header.get("alpha"))
        for layer in layers.values():
            layer["alpha"] = float(layer.get("alpha", len(layer["A"]) if alpha is None else alpha))
            if layer["B"].shape[1] != len(layer["A"]) or not math.isfinite(layer["alpha"]):
                raise ValueError("A and B have different ranks, or α is not finite")
            if not layer["A"].isfinite().all() or not layer["B"].isfinite().all():
                raise ValueError("a number in it is not finite")
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as problem:
        raise Fail(f"{path} is no whole LoRA file ({first_line(problem)}); write it again") from None
    return layers


def load_lora(path, unet):
    """Inject a LoRA that `read_lora` reads into `unet`, which must have the very layers; frozen, in float32."""
    found, linears = read_lora(path), targets(unet)
    ranks = {len(layer["A"]) for layer in found.values()}
    if len(ranks) > 1:
        raise Fail(f"{path} has layers of different ranks: {sorted(ranks)}")
    fits = {name: ((*ranks, linear.in_features), (linear.out_features, *ranks)) for name, linear in linears.items()}
    wrong = [n for n in fits.keys() | found.keys() if n not in found or fits.get(n) != (found[n]["A"].shape, found[n]["B"].shape)]
    if wrong:
        base = TensorFile(path).header.get("base", "no name is in the file")
        raise Fail(f"{path} does not fit this base: {len(wrong)} layers of its attention are missing or of another shape, such "
                   f"as {min(wrong)}; pass the one that it was trained on ({base}) with --sd15")
    with torch.no_grad():
        for name, layer in lora_layers(inject(unet, *ranks)).items():
            layer.A.copy_(found[name]["A"])
            layer.B.copy_(found[name]["B"])
            layer.scale = found[name]["alpha"] / len(layer.A)
    return unet.requires_grad_(False)


def export(path, form, out):
    """Write the LoRA of a file that `read_lora` reads as "kohya", "diffusers" or "peft" would. The projector stays behind."""
    found, header = read_lora(path), TensorFile(path).header
    rank, alpha = len(next(iter(found.values()))["A"]), next(iter(found.values()))["alpha"]
    if form != "kohya" and any((len(layer["A"]), layer["alpha"]) != (rank, alpha) for layer in found.values()):
        raise Fail(f"{path} has layers of different rank or α, which a {form} file of ours does not express; export it to kohya")
    config = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS}
    tensors, notes = {}, {"licence": header.get("licence", "")}
    if form == "kohya":
        notes |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha),
                  "ss_base_model_version": "sd_v1"}
    elif form == "diffusers":
        notes["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in config.items()})
    for name, layer in found.items():
        if form == "kohya":
            name = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": layer["A"], f"{name}.lora_up.weight": layer["B"],
                        f"{name}.alpha": torch.tensor(layer["alpha"])}
        else:
            prefix = "unet." if form == "diffusers" else "base_model.model."
            tensors |= {f"{prefix}{name}.lora_{x}.weight": layer[x] for x in "AB"}
    if form == "peft":
        config = {"peft_type": "LORA", "bias": "none"} | config
        save_text(out.with_name("adapter_config.json"), json.dumps(config, indent=1) + "\n")
    save_tensors(out, tensors, notes)


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE",
                        help="an adapter of train.py, or a LoRA file of Diffusers, PEFT or kohya")
    parser.add_argument("--export", choices=("kohya", "diffusers", "peft"), required=True, help="whose names to write")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default: FILE with -kohya and so on in its name; peft: a folder of that name")
    args = parser.parse_args()
    out = args.out or args.file.with_name(f"{args.file.stem}-{args.export}" + ("" if args.export == "peft" else ".safetensors"))
    out = out / "adapter_model.safetensors" if args.export == "peft" else out
    if out.suffix != ".safetensors" or out.is_dir():
        raise Fail(f"--out {out}: it must be the name of a .safetensors file")
    if out.exists() and TensorFile(out).header.get("format") == FORMAT or out.resolve() == args.file.resolve():
        raise Fail(f"--out {out} is an adapter, and what is written holds its LoRA alone; pass another --out")
    export(args.file, args.export, out)
    print(f"{out}: the LoRA alone; what the projector makes of an embedding takes the place of the prompt (README)")


if __name__ == "__main__":
    run_program(main)
