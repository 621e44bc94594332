"""Weights from files: read lazily, renamed to Diffusers' names, loaded strictly, tensor by tensor.

Stable Diffusion 1.5 is found in three layouts: a Diffusers folder whose VAE attention is named `to_q`, the
same with `query` (the official float32 file), and one CompVis file (`model.*`, `first_stage_model.*`).
"""
import hashlib
import math
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from .app import Fail, file_sha256, first_line, foreign_file
from .unet import UNet
from .vae import VAE

BUILT_IN = {"toy": Path(__file__).parent / "toy"}       # names that stand for weights in this repository
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FILE = "{}/diffusion_pytorch_model{}.safetensors"
SD15_SHA256 = {     # of the files of that repository
    FILE.format("unet", ""): "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
    FILE.format("unet", ".fp16"): "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21",
    FILE.format("vae", ""): "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    FILE.format("vae", ".fp16"): "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c",
}
HINT = f"It does not fit Stable Diffusion 1.5; the reference files are those of {SD15}"

# ---- files of tensors --------------------------------------------------------------------------------------

class TensorFile:
    """The tensors of a safetensors file or a pickled state dict, under our names; mapped, read on demand.

    rename: name in the file -> our name, or None to omit the tensor. shapes: {our name: shape}.
    """

    def __init__(self, path, rename=lambda name: name):
        self.path, self.header, self._fingerprint = Path(path), {}, None
        with foreign_file(self.path, "is not a plain file of tensors, or is truncated",
                          "restore it, or download it again"):
            with open(self.path, "rb") as f:
                if f.read(23) == b"version https://git-lfs":
                    raise Fail(f"{self.path} is a Git LFS pointer: run `git lfs pull` there, or download it")
            if self.path.suffix == ".safetensors":
                self._open = lambda: safe_open(self.path, "pt").get_tensor      # name in the file -> tensor
                with safe_open(self.path, "pt") as f:
                    shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
                    self.header |= f.metadata() or {}
            else:
                state = _unpickle(self.path)
                self._open = lambda: state.__getitem__
                shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.names = {ours: name for name in shapes if (ours := rename(name)) is not None}
        self.shapes = {ours: shapes[name] for ours, name in self.names.items()}

    def get(self, name):
        """One tensor, mapped from the file."""
        return next(self.read([name]))[1]

    def read(self, names):
        """(name, tensor) of each in turn, mapped; reopens the file every 128 MB, to unmap earlier ones."""
        size = math.inf
        for name in names:
            if size > 2 ** 27:
                get, size = self._open(), 0
            tensor = get(self.names[name])
            size += tensor.nbytes
            yield name, tensor

    def fingerprint(self):
        """sha256 over our names and the tensors' bytes: the same for every layout of the same network."""
        def digest(name):
            data = self.get(name).contiguous().flatten().view(torch.uint8).numpy()
            return f"{name} {hashlib.sha256(data).hexdigest()}"

        if self._fingerprint is None:
            with ThreadPoolExecutor() as pool:
                lines = "\n".join(pool.map(digest, sorted(self.names)))
            self._fingerprint = hashlib.sha256(lines.encode()).hexdigest()
        return self._fingerprint

def _unpickle(path):
    mapped = zipfile.is_zipfile(path)           # torch cannot map its format before version 1.6
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    state = {"tensor": state} if isinstance(state, torch.Tensor) else state
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()):
        raise ValueError("it is no state dict, or holds more than that")
    return state

def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it by name and shape.

    Memory peaks at the network's size in `dtype` plus one tensor; nothing is copied where the file has that
    dtype and the device is the CPU. hint: advice on a mismatch.
    """
    with foreign_file(file.path, "has tensors of impossible shapes", hint), torch.device("meta"):
        network = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = {
        "missing": [name for name in wanted if name not in file.shapes],
        "unexpected": [name for name in file.shapes if name not in wanted],
        "of a wrong shape": [
            f"{name} {file.shapes[name]} instead of {shape}" for name, shape in wanted.items()
            if file.shapes.get(name, shape) not in (shape, (*shape, 1, 1))]}
    for what, names in wrong.items():
        if names:
            raise Fail(f"{file.path}: {len(names)} tensors {what}: {', '.join(names[:3])}. {hint}")
    state = {}
    for name, tensor in file.read(wanted):
        if not tensor.dtype.is_floating_point:
            raise Fail(f"{file.path}: {name} is {tensor.dtype}, not floating point (quantised?). {hint}")
        # CompVis stores the VAE's attention as 1x1 convolutions
        state[name] = tensor.reshape(wanted[name]).to(device, dtype)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)

# ---- Stable Diffusion 1.5 ----------------------------------------------------------------------------------

def open_sd15(source):
    """A Diffusers folder, CompVis file, Hugging Face repository or "toy" -> TensorFiles (U-Net, VAE)."""
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    pairs = [[FILE.format(part, kind) for kind in ("", ".fp16")] for part in ("unet", "vae")]
    if path.is_file():
        unet = TensorFile(path, partial(_rename, "model.diffusion_model.", _COMPVIS_UNET))
        vae = TensorFile(path, partial(_rename, "first_stage_model.", _COMPVIS_VAE))
    elif path.is_dir() or is_hub_name(source):
        # of a repository float16 first: half as large, and finer than the bfloat16 that it is used in
        sha256 = SD15_SHA256 if source == SD15 else {}
        paths = [_find(path, pair) if path.is_dir() else hub_file(source, pair[::-1], sha256)
                 for pair in pairs]
        unet, vae = TensorFile(paths[0]), TensorFile(paths[1], partial(_rename, "", _OLD_ATTENTION))
    else:
        raise Fail(f"--sd15 {source}: no such folder or file; pass a Diffusers folder, a CompVis file, or a "
                   f"Hugging Face repository such as {SD15}")
    if other := _other_model(unet.shapes):
        raise Fail(f"{path} looks like {other}; this program needs Stable Diffusion 1.5 ({SD15})")
    return unet, vae

def load_unet(file, device="cpu", dtype=torch.float32):
    """The U-Net of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    def build():
        channels, layers = _geometry(file, "down_blocks")
        context = file.shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
        return UNet(channels, layers, context, latent=file.shapes["conv_in.weight"][1])
    return load(build, file, device, dtype, HINT)

def unet_on_meta(source):
    """The U-Net of an `open_sd15` source without its weights; for SD15 itself no file is needed."""
    if source != SD15:
        return load_unet(open_sd15(source)[0], "meta")
    with torch.device("meta"):
        return UNet().requires_grad_(False)

def load_vae(file, device="cpu", dtype=torch.float32):
    """The VAE of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    def build():
        channels, layers = _geometry(file, "encoder.down_blocks")
        return VAE(channels, layers, latent=file.shapes["post_quant_conv.weight"][0])
    return load(build, file, device, dtype, HINT)

def _geometry(file, prefix):
    """(width of each level, residual blocks per level), from the shapes."""
    channels = []
    while shape := file.shapes.get(f"{prefix}.{len(channels)}.resnets.0.conv1.weight"):
        channels.append(shape[0])
    first = re.compile(rf"{prefix}\.0\.resnets\.\d+\.conv1\.weight")
    return tuple(channels), sum(first.fullmatch(name) is not None for name in file.shapes)

def _other_model(shapes):
    """What a U-Net's tensors are of, where it is known and not Stable Diffusion 1.5."""
    if not shapes:
        return "a part of a model, without `model.diffusion_model.*`"
    if any(name.startswith(("add_embedding", "label_emb")) for name in shapes):
        return "SDXL"
    if len(shapes.get("down_blocks.0.attentions.0.proj_in.weight", ())) == 2:
        return "Stable Diffusion 2"
    if shapes.get("conv_in.weight", ())[1:2] in ((8,), (9,)):
        return "an inpainting or image-editing variant"

def _find(folder, names):
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found[0]
    raise Fail(f"{folder} contains no {' or '.join(names)}; pass a folder with unet/ and vae/")

def licence(base, encoder_terms):
    """The terms of an adapter, for its header and its model card. base: its --sd15."""
    base = ("the toy base (MIT)" if base in BUILT_IN else
            "Stable Diffusion 1.5 (CreativeML Open RAIL-M, whose use restrictions carry over)")
    return f"Trained from {base} on embeddings of {encoder_terms} and on your images: their terms apply."

# Names in the other layouts -> Diffusers' names

_OLD_ATTENTION = {r"\.query\.": ".to_q.", r"\.key\.": ".to_k.", r"\.value\.": ".to_v.",
                  r"\.proj_attn\.": ".to_out.0."}
_COMPVIS_UNET = {
    r"^time_embed\.0": "time_embedding.linear_1", r"^time_embed\.2": "time_embedding.linear_2",
    r"^out\.0": "conv_norm_out", r"^out\.2": "conv_out", r"^input_blocks\.0\.0": "conv_in",
    r"^middle_block\.0": "mid_block.resnets.0", r"^middle_block\.1": "mid_block.attentions.0",
    r"^middle_block\.2": "mid_block.resnets.1", r"in_layers\.0": "norm1", r"in_layers\.2": "conv1",
    r"emb_layers\.1": "time_emb_proj", r"out_layers\.0": "norm2", r"out_layers\.3": "conv2",
    r"skip_connection": "conv_shortcut"}
_COMPVIS_VAE = {
    r"mid\.block_1": "mid_block.resnets.0", r"mid\.block_2": "mid_block.resnets.1",
    r"mid\.attn_1": "mid_block.attentions.0", r"(attentions\.0)\.norm\.": r"\1.group_norm.",
    r"(attentions\.0)\.([qkv])\.": r"\1.to_\2.", r"(attentions\.0)\.proj_out": r"\1.to_out.0",
    r"nin_shortcut": "conv_shortcut", r"norm_out": "conv_norm_out",
    r"down\.(\d)": r"down_blocks.\1", r"up\.0": "up_blocks.3", r"up\.1": "up_blocks.2",
    r"up\.2": "up_blocks.1", r"up\.3": "up_blocks.0", r"\.block\.(\d)": r".resnets.\1",
    r"\.(down|up)sample\.": r".\1samplers.0."}
for i in range(12):         # three blocks a level, after input block 0, which is conv_in
    level, j = divmod(i, 3)
    for side, block in (("down", rf"^input_blocks\.{i + 1}"), ("up", rf"^output_blocks\.{i}")):
        _COMPVIS_UNET |= {rf"{block}\.\d\.(op|conv)\.": f"{side}_blocks.{level}.{side}samplers.0.conv.",
                          rf"{block}\.0\.": f"{side}_blocks.{level}.resnets.{j}.",
                          rf"{block}\.1\.": f"{side}_blocks.{level}.attentions.{j}."}

def _rename(prefix, table, name):
    """The name without the prefix, each pattern of the table replaced; None for a name of another part."""
    if not name.startswith(prefix):
        return None
    name = name.removeprefix(prefix)
    for old, new in table.items():
        name = re.sub(old, new, name)
    return name

# ---- the Hugging Face hub ----------------------------------------------------------------------------------

def is_hub_name(source):
    """Whether this is a name of a repository, owner/name, by the hub's rules."""
    rules = r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b"
    return re.fullmatch(rules, str(source)) is not None

def hub_file(repository, candidates, sha256=None, access=""):
    """The first of the candidates in the hub's cache, or else in the repository: announced, then downloaded.

    sha256: {file: hash} to check a download against. access: advice where the repository refuses.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError
    for name in candidates:
        if isinstance(path := try_to_load_from_cache(repository, name), str):
            return Path(path)
    name, *others = candidates
    try:
        size = (get_hf_file_metadata(hf_hub_url(repository, name)).size or 0) / 1e9
        print(f"downloading {name} of {repository} ({size:.2f} GB) to {HF_HUB_CACHE}", file=sys.stderr)
        path = Path(hf_hub_download(repository, name))      # which resumes after a broken connection
    except Exception as problem:            # of the hub's client and the libraries beneath it
        if others and isinstance(problem, EntryNotFoundError):
            return hub_file(repository, others, sha256, access)
        advice = access or "Check the name and the connection, or download it and pass the local path."
        raise Fail(f"cannot get {name} of {repository} ({type(problem).__name__}: {first_line(problem)}). "
                   f"{advice}") from None
    expected = (sha256 or {}).get(name)
    if expected and expected != (found := file_sha256(path)):
        path.resolve().unlink()
        raise Fail(f"{name} came with sha256 {found[:12]}..., not {expected[:12]}...; removed, try again")
    return path
