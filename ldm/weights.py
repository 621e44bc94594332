"""Weights from files: read lazily, renamed to Diffusers' names, loaded strictly, tensor by tensor.

Stable Diffusion 1.5 is found in three layouts: a Diffusers folder whose VAE attention is named `to_q`, the
same with `query` (the official float32 file), and one CompVis file (`model.*`, `first_stage_model.*`).
"""
import hashlib
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
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
        self.path, self._fingerprint = Path(path), None
        check_download(self.path)
        if self.path.suffix == ".safetensors":
            with self._open() as f:
                shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
                self.header = f.metadata() or {}
            self._pickled = None
        else:
            self._pickled, self.header = _unpickle(self.path), {}
            shapes = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        self.names = {ours: name for name in shapes if (ours := rename(name)) is not None}
        self.shapes = {ours: shapes[name] for ours, name in self.names.items()}

    def _open(self):
        with foreign_file(self.path, "is no complete safetensors file", "restore it, or download it again"):
            return safe_open(self.path, "pt")

    def get(self, name):
        """One tensor, mapped from the file."""
        [(_, tensor)] = self.read([name])
        return tensor

    def read(self, names):
        """(name, tensor) of each in turn, mapped; reopens the file every 128 MB, to unmap earlier ones."""
        f, size = None, math.inf
        for name in names:
            if self._pickled is not None:
                tensor = self._pickled[self.names[name]]
            else:
                if size > 2 ** 27:
                    f, size = self._open(), 0
                tensor = f.get_tensor(self.names[name])
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


def check_download(path):
    """Fail where a file is missing, a Git LFS pointer, or shorter than its own header states."""
    if not path.is_file():
        raise Fail(f"{path} does not exist or is not a file")
    with open(path, "rb") as f:
        head = f.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise Fail(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there, or download it")
    size, header = path.stat().st_size, int.from_bytes(head[:8], "little")
    if path.suffix == ".safetensors" and (size < 8 or header + 8 > size):
        raise Fail(f"{path} is truncated or no safetensors file ({size} bytes); download it again")


def _unpickle(path):
    with foreign_file(path, "is not a plain file of tensors, or is truncated", "download it again"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)     # the format before torch 1.6
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise Fail(f"{path} contains no state dict of tensors; pass the file that holds only the weights")
    return state


def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it by name and shape.

    Memory peaks at the network's size in `dtype` plus one tensor; nothing is copied where the file has that
    dtype and the device is the CPU. hint: advice on a mismatch.
    """
    with foreign_file(file.path, "has tensors of impossible shapes", hint), torch.device("meta"):
        network = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in wanted if name not in file.shapes]
    unexpected = [name for name in file.shapes if name not in wanted]
    wrong = [f"{name} {file.shapes[name]} instead of {shape}" for name, shape in wanted.items()
             if name in file.shapes and file.shapes[name] not in (shape, (*shape, 1, 1))]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise Fail(f"{file.path}: {len(names)} tensors {what}: {', '.join(names[:3])}{more}. {hint}")
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
    candidates = {part: [FILE.format(part, kind) for kind in ("", ".fp16")] for part in ("unet", "vae")}
    if path.is_file():
        files = [TensorFile(path, _compvis_unet_name), TensorFile(path, _compvis_vae_name)]
        if not files[0].names:
            raise Fail(f"{path} contains no `model.diffusion_model.*` tensors: pass the complete file, or "
                       "a folder with unet/ and vae/")
        return _refuse_other_models(files)
    if path.is_dir() or source in BUILT_IN:
        paths = [_find(path, names) for names in candidates.values()]
    elif is_hub_name(source):
        # float16 first: half as large, and finer than the bfloat16 that it is used in
        sha256 = SD15_SHA256 if source == SD15 else {}
        paths = [hub_file(source, names[::-1], sha256) for names in candidates.values()]
    else:
        raise Fail(f"--sd15 {source}: no such folder or file; pass a Diffusers folder, a CompVis file, or a "
                   f"Hugging Face repository such as {SD15}")
    return _refuse_other_models([TensorFile(paths[0]), TensorFile(paths[1], _vae_attention_name)])


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
    layers = sum(first.fullmatch(name) is not None for name in file.shapes)
    if not channels or any(c % 32 for c in channels):
        raise ValueError(f"no {prefix}.*.resnets with widths that are multiples of 32")
    return tuple(channels), layers


def _refuse_other_models(files):
    shapes = files[0].shapes
    attention = [shape for name, shape in shapes.items() if name.endswith("attentions.0.proj_in.weight")]
    if any(name.startswith(("add_embedding", "label_emb")) for name in shapes):
        other = "SDXL"
    elif attention and len(attention[0]) == 2:
        other = "Stable Diffusion 2"
    elif shapes.get("conv_in.weight", ())[1:2] in ((8,), (9,)):
        other = "an inpainting or image-editing variant"
    else:
        return files
    raise Fail(f"{files[0].path} looks like {other}; this program needs Stable Diffusion 1.5 ({SD15})")


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

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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
    r"down\.(\d)\.block\.(\d)": r"down_blocks.\1.resnets.\2",
    r"down\.(\d)\.downsample": r"down_blocks.\1.downsamplers.0"}


def _substitute(name, table):
    for old, new in table.items():
        name = re.sub(old, new, name)
    return name


def _vae_attention_name(name):
    return re.sub(r"attentions\.0\.(query|key|value|proj_attn)\.",
                  lambda m: f"attentions.0.{_OLD_ATTENTION[m[1]]}.", name)


def _compvis_unet_name(name):
    """None for the VAE, the text encoder, the schedule and the EMA copy."""
    if not name.startswith("model.diffusion_model."):
        return None
    name = _substitute(name.removeprefix("model.diffusion_model."), _COMPVIS_UNET)
    if m := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", name):
        side, block, slot, rest = m[1], int(m[2]), int(m[3]), m[4]
        if side == "input" and rest.startswith("op."):
            return f"down_blocks.{block // 3 - 1}.downsamplers.0.conv.{rest[3:]}"
        if side == "output" and rest.startswith("conv."):
            return f"up_blocks.{block // 3}.upsamplers.0.{rest}"
        level, j = divmod(block - 1 if side == "input" else block, 3)
        blocks = "down_blocks" if side == "input" else "up_blocks"
        name = f"{blocks}.{level}.{'attentions' if slot else 'resnets'}.{j}.{rest}"
    return name


def _compvis_vae_name(name):
    if not name.startswith("first_stage_model."):
        return None
    name = _substitute(name.removeprefix("first_stage_model."), _COMPVIS_VAE)
    name = re.sub(r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.{m[2]}", name)
    return re.sub(r"up\.(\d)\.upsample\.", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0.", name)


# ---- the Hugging Face hub ----------------------------------------------------------------------------------

def is_hub_name(source):
    """Whether this is a name of a repository, owner/name, by the hub's rules."""
    fits = re.fullmatch(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", str(source))
    return fits is not None and not re.search(r"--|\.\.|\.git$", str(source))


def hub_file(repository, candidates, sha256=None, access=""):
    """The first of the candidates in the hub's cache, or else in the repository: announced, then downloaded.

    sha256: {file: hash} to check a download against. access: advice where the repository refuses.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    for name in candidates:
        if isinstance(path := try_to_load_from_cache(repository, name), str):
            return Path(path)
    name, *others = candidates
    try:
        size = (get_hf_file_metadata(hf_hub_url(repository, name)).size or 0) / 1e9
        print(f"downloading {name} of {repository} ({size:.2f} GB) to {HF_HUB_CACHE}", file=sys.stderr)
        for attempt in range(3, 0, -1):
            try:
                path = Path(hf_hub_download(repository, name))
                break
            except Exception as problem:    # a broken connection: the next attempt resumes the download
                if isinstance(problem, (HfHubHTTPError, OSError)) or attempt == 1:
                    raise
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
