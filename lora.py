"""Low-rank adaptation of the U-Net's attention, and the adapter file.

    W' = W + (α/r) B A                                                                                 (eq. 6)

on Q, K, V and O of all 32 attentions, self and cross: 128 layers, 199,296 parameters per unit of rank.

    python lora.py ADAPTER --export kohya       # for ComfyUI, A1111 and kohya; or peft, diffusers"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ldm.app import Fail, Parser, foreign_file, run_program, save_json, save_tensors
from ldm.weights import TensorFile
from projector import SHAPE, Projector

class LoRALinear(nn.Module):
    """A frozen linear layer W (d_out, d_in) with trainable A (r, d_in) and B (d_out, r) in float32.
    B starts at zero, so that the adapted network equals the frozen one exactly. A starts as PEFT's does,
    uniform within ±1/√d_in (the paper does not specify it). No bias and no dropout of its own."""
    def __init__(self, linear, rank, alpha, generator=None):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        A = torch.empty(rank, linear.in_features)               # drawn on the CPU, to be the same everywhere
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B = torch.zeros(linear.out_features, rank)
        self.A, self.B = (nn.Parameter(x.to(linear.weight.device)) for x in (A, B))

    def forward(self, x):
        BAx = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * BAx                       # W' x, by (eq. 6)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]      # Q, K, V, O

def inject(unet, rank, alpha=None, generator=None):
    """Wrap Q, K, V, O of every attention in LoRALinear, in place; α = r if not given. generator: draws A."""
    alpha = float(rank if alpha is None else alpha)
    attentions = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    for name in (f"{attention}.{target}" for attention in attentions for target in TARGETS):
        unet.set_submodule(name, LoRALinear(unet.get_submodule(name), rank, alpha, generator))
    return unet

@torch.no_grad()
def fold(unet):
    """Replace every LoRALinear, in place, by a linear layer with W' (eq. 6), summed in at least float32."""
    for name, layer in lora_layers(unet).items():
        W, dtype = layer.weight, torch.promote_types(layer.weight.dtype, torch.float32)
        folded = W.to(dtype) + layer.scale * (layer.B.to(dtype) @ layer.A.to(dtype))            # (eq. 6)
        linear = nn.Linear(*reversed(W.shape), device="meta")
        linear.weight, linear.bias = nn.Parameter(folded.to(W.dtype), requires_grad=False), layer.bias
        unet.set_submodule(name, linear)
    return unet

def lora_layers(unet):
    """{name: LoRALinear} in the order of the network."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, LoRALinear)}

def lora_parameters(unet):
    """{name: A or B}, the trainable tensors; a name is the layer's with .A or .B."""
    return {f"{name}.{x}": getattr(layer, x) for name, layer in lora_layers(unet).items() for x in "AB"}

# ---- adapter.safetensors: LoRA, projector and null embedding, and what is needed to rebuild them -----------
FORMAT = "uni2h-sd15-lora-1"
REQUIRED = {"base", "base_sha256", "vae_sha256", "encoder", "encoder_sha256"}
REMEDY = "write it again with train.py"

def peft_config(rank, alpha, prefix=""):
    """LoRA's shape under PEFT's names."""
    return {f"{prefix}r": rank, f"{prefix}lora_alpha": alpha, f"{prefix}target_modules": TARGETS}

def save_adapter(path, unet, projector, header):
    """Write the adapter with `header` ({str: str}) and the shape of its parts, atomically.
    LoRA has PEFT's names under Diffusers' prefix `unet.`. Diffusers' pipelines refuse a name without "lora":
    hence `lora_projector.` for the rest, which they skip."""
    layer = next(iter(lora_layers(unet).values()))
    rank, alpha = len(layer.A), layer.scale * len(layer.A)
    tensors = {f"unet.{name[:-1]}lora_{name[-1]}.weight": p for name, p in lora_parameters(unet).items()}
    tensors |= {f"lora_projector.{name}": p for name, p in projector.state_dict().items()}
    shape = {name: str(value) for name, value in (dict(rank=rank, alpha=alpha) | projector.shape).items()}
    config = json.dumps(peft_config(rank, alpha, "unet."))
    save_tensors(path, tensors, {"format": FORMAT, "lora_adapter_metadata": config, **shape, **header})

def open_adapter(path):
    """An adapter file -> TensorFile; its `.header` has what train.py recorded, and the shape of the parts."""
    file = TensorFile(path)
    if file.header.get("format") != FORMAT:
        raise Fail(f"{path} is not an adapter written by train.py")
    with foreign_file(path, "has a damaged header", REMEDY):
        if missing := REQUIRED - file.header.keys():
            raise ValueError(f"it lacks {min(missing)}")
        if not (0 < int(file.header["resolution"]) <= 8192 and 0 <= int(file.header["step"]) < 10 ** 9):
            raise ValueError("its resolution or step is impossible")
    return file

def load_projector(file):
    """The Projector of an open adapter, in float32, frozen."""
    with foreign_file(file.path, "has a damaged projector", REMEDY):
        shape = [int(file.header[key]) for key in SHAPE]
        if min(shape[:4]) < 1 or shape[4] not in (2, 3):
            raise ValueError(f"none has the sizes {shape}")
        with torch.device("meta"):          # sizes in a header take no memory, unless the tensors have them
            projector = Projector(*shape)
        prefix = "lora_projector."
        names = [name for name in file.names if name.startswith(prefix)]
        state = {name.removeprefix(prefix): tensor.float() for name, tensor in file.read(names)}
        projector.load_state_dict(state, assign=True)
    return projector.requires_grad_(False)

def load_adapter(file, unet):
    """Inject the LoRA of an open adapter into `unet` and fill it -> the Projector; both in float32, frozen.
    Fails where a shape differs from the base's; the caller compares its content with `base_sha256`."""
    projector, (rank, alpha, tensors) = load_projector(file), read_lora(file)
    adapted = lora_parameters(inject(unet, rank, alpha))
    wanted, found = ({(name, *t.shape) for name, t in named.items()} for named in (adapted, tensors))
    if wanted != found:
        name, *_ = min(wanted ^ found)
        raise Fail(f"{file.path} does not fit this base ({name}); pass its own, --sd15 {file.header['base']}")
    if not (all(tensor.isfinite().all() for tensor in (*tensors.values(), *projector.parameters()))
            and all(W.any() for W in projector.parameters() if W.ndim > 1)):
        raise Fail(f"{file.path}: a number is not finite, or a matrix of the projector is 0; {REMEDY}")
    unet.load_state_dict(tensors, strict=False)         # which has other parameters too
    return projector.to(next(unet.requires_grad_(False).parameters()).device)

def read_lora(file):
    """The LoRA of an open adapter -> (rank, α, {name: A (r, d_in) or B (d_out, r)}), as `lora_parameters`."""
    with foreign_file(file.path, "has a damaged LoRA", REMEDY):
        rank, alpha, tensors = int(file.header["rank"]), float(file.header["alpha"]), {}
        for name, tensor in file.read(file.names):
            if m := re.fullmatch(r"unet\.(.+\.)lora_([AB])\.weight", name):
                tensors[m[1] + m[2]] = tensor.float()
            elif not name.startswith("lora_projector."):
                raise ValueError(f"{name} is neither LoRA of the attention nor the projector")
        if not tensors or not 0 < alpha < math.inf:
            raise ValueError("there are no layers, or α is not positive and finite")
        if any(t.shape[n[-1] == "B"] != rank or not (n[-1] == "B" or t.any()) for n, t in tensors.items()):
            raise ValueError(f"an A is 0 everywhere, or a layer has another rank than {rank}")
    return rank, alpha, tensors

# ---- the same LoRA in the files of other programs ----------------------------------------------------------
def export(path, form):
    """Write an adapter's LoRA beside it under the names of "kohya", "diffusers" or "peft" -> the new file."""
    file = open_adapter(path)
    rank, alpha, lora = read_lora(file)
    out = path.with_name(f"{path.stem}-{form}.safetensors")
    header = {"licence": file.header.get("licence", "")}
    tensors = dict(file.read(name for name in file.names if name.startswith("unet.")))
    if form == "diffusers":
        header["lora_adapter_metadata"] = json.dumps(peft_config(rank, alpha, "unet."))
    elif form == "peft":            # a folder, with its configuration in a file
        out = out.with_suffix("") / "adapter_model.safetensors"
        tensors = {name.replace("unet", "base_model.model", 1): tensor for name, tensor in tensors.items()}
        config = {"peft_type": "LORA", "bias": "none"} | peft_config(rank, alpha)
        save_json(out.with_name("adapter_config.json"), config)
    else:
        tensors = {}
        for name, tensor in lora.items():
            layer = "lora_unet_" + name[:-2].replace(".", "_")
            tensors[f"{layer}.lora_{dict(A='down', B='up')[name[-1]]}.weight"] = tensor
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
        header |= {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}
    save_tensors(out, tensors, header)
    return out

def main():
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="ADAPTER", help="an adapter of train.py")
    parser.add_argument("--export", required=True, choices=("kohya", "diffusers", "peft"), help="whose names")
    args = parser.parse_args()
    print(f"{export(args.file, args.export)}: the LoRA alone; the projector's tokens are the prompt (README)")

if __name__ == "__main__":
    run_program(main)
