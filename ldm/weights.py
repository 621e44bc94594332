"""Weights from files: read lazily, renamed to Diffusers' names, loaded strictly into a network on the meta
device.

Stable Diffusion 1.5 is found in three layouts: a Diffusers folder whose VAE attention is named `to_q`, the
same with `query` (the official float32 file), and one CompVis file (`model.diffusion_model.*`,
`first_stage_model.*`).
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

from .app import Fail, first_line, foreign_file
from .unet import UNet
from .vae import VAE

BUILT_IN = {"toy": Path(__file__).parent / "toy"}       # names that stand for weights in this repository
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_SHA256 = {     # (part, ".fp16" or ""): of the files of that repository
    ("unet", ""): "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
    ("unet", ".fp16"): "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21",
    ("vae", ""): "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    ("vae", ".fp16"): "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c",
}
SD15_SHA256 = {f"{part}/diffusion_pytorch_model{kind}.safetensors": sha256
               for (part, kind), sha256 in SD15_SHA256.items()}
_HINT = f"It does not fit Stable Diffusion 1.5; the reference files are those of {SD15}"


# ---- files of tensors --------------------------------------------------------------------------------------

class TensorFile:
    """The tensors of a safetensors file or of a pickled state dict, under our names; memory-mapped, read on
    demand.

    rename: name in the file -> our name, or None to omit the tensor. shapes: {our name: shape}. header: {str:
    str}.
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
        """(name, tensor) of each in turn, mapped.

        The file is reopened every 128 MB, so that tensors no longer in use are unmapped.
        """
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
            return hashlib.sha256(data).hexdigest()

        if self._fingerprint is None:
            names = sorted(self.names)
            with ThreadPoolExecutor() as pool:
                lines = "\n".join(f"{name} {hex}" for name, hex in zip(names, pool.map(digest, names)))
            self._fingerprint = hashlib.sha256(lines.encode()).hexdigest()
        return self._fingerprint


def check_download(path):
    """Fail on what is no weights file at all: missing, a Git LFS pointer, or shorter than its own header
    states.
    """
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
    with foreign_file(path, "is not a plain file of tensors, or is truncated",
                      "download it again, or pass a .safetensors file"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as problem:
            if "mmap" not in str(problem):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)     # the format before torch 1.6
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()) \
            or not all(isinstance(name, str) for name in state):
        raise Fail(f"{path} contains no state dict of tensors; pass the file that holds only the weights")
    return state


def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it name by name and shape by
    shape.

    Built on the meta device and filled tensor by tensor: memory peaks at the network's size in `dtype` plus
    one tensor, and nothing is copied where the file has that dtype and the device is the CPU. hint: what to
    do on a mismatch.
    """
    with foreign_file(file.path, "has tensors of impossible shapes", hint), torch.device("meta"):
        network = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [n for n in wanted if n not in file.shapes]
    unexpected = [n for n in file.shapes if n not in wanted]
    wrong = [f"{n} {file.shapes[n]} instead of {shape}" for n, shape in wanted.items()
             if n in file.shapes and file.shapes[n] not in (shape, (*shape, 1, 1))]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise Fail(f"{file.path}: {len(names)} tensors {what}: {', '.join(names[:3])}{more}. {hint}")
    state = {}
    for name, tensor in file.read(wanted):
        if not tensor.dtype.is_floating_point:
            raise Fail(f"{file.path}: {name} is {tensor.dtype}, not floating point (quantised?). {hint}")
        tensor = tensor.reshape(wanted[name])           # CompVis: the VAE's attention is of 1x1 convolutions
        state[name] = tensor.to(device, dtype)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def refuse_scalars(file, hint):
    """Fail where a tensor is a single number: no network here has one."""
    if names := [name for name, shape in file.shapes.items() if not shape]:
        raise Fail(f"{file.path}: {min(names)} has no dimensions. {hint}")


# ---- Stable Diffusion 1.5 ----------------------------------------------------------------------------------

def open_sd15(source):
    """A Diffusers folder, a CompVis .safetensors file, a Hugging Face repository or "toy" -> (U-Net, VAE)
    TensorFiles.
    """
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    parts = {"unet": str, "vae": _vae_attention_name}
    if path.is_file():
        files = [TensorFile(path, _compvis_unet_name), TensorFile(path, _compvis_vae_name)]
        if not files[0].names:
            raise Fail(f"{path} contains no `model.diffusion_model.*` tensors: pass the complete Stable "
                       "Diffusion 1.5 file, or the folder that contains unet/ and vae/")
    elif path.is_dir() or source in BUILT_IN:
        files = [TensorFile(_find(path, part), rename) for part, rename in parts.items()]
    elif is_hub_name(source):
        sha256 = SD15_SHA256 if source == SD15 else {}
        # float16 first: half as large, and finer than the bfloat16 that it is used in
        files = [TensorFile(hub_file(source, _candidates(part)[::-1], sha256), rename)
                 for part, rename in parts.items()]
    else:
        raise Fail(f"--sd15 {source}: no such folder or file; pass a Diffusers folder, a CompVis .safetensors "
                   f"file, or a Hugging Face repository such as {SD15}")
    for file in files:
        refuse_scalars(file, _HINT)
    _refuse_other_models(files[0])
    return files


def load_unet(file, device="cpu", dtype=torch.float32):
    """The U-Net of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    channels, layers = _geometry(file, "down_blocks")
    to_k = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    context = file.shapes.get(to_k, (0, 768))[-1]
    latent = file.shapes.get("conv_in.weight", (0, 4))[1]
    return load(lambda: UNet(channels, layers, context, latent=latent), file, device, dtype, _HINT)


def load_vae(file, device="cpu", dtype=torch.float32):
    """The VAE of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    channels, layers = _geometry(file, "encoder.down_blocks")
    latent = file.shapes.get("post_quant_conv.weight", (4,))[0]
    return load(lambda: VAE(channels, layers, latent), file, device, dtype, _HINT)


def _geometry(file, prefix):
    """(width of each level, residual blocks per level), from the shapes."""
    channels = []
    while shape := file.shapes.get(f"{prefix}.{len(channels)}.resnets.0.conv1.weight"):
        channels.append(shape[0])
    layers = sum(bool(re.fullmatch(rf"{prefix}\.0\.resnets\.\d+\.conv1\.weight", n)) for n in file.shapes)
    if not channels or any(c % 32 for c in channels):
        raise Fail(f"{file.path}: no {prefix}.*.resnets with widths that are multiples of 32. {_HINT}")
    return tuple(channels), layers


def _refuse_other_models(unet):
    attention = [shape for name, shape in unet.shapes.items() if name.endswith("attentions.0.proj_in.weight")]
    if any(name.startswith(("add_embedding", "label_emb")) for name in unet.shapes):
        other = "SDXL"
    elif attention and len(attention[0]) == 2:
        other = "Stable Diffusion 2"
    elif unet.shapes.get("conv_in.weight", (0, 4))[1] in (8, 9):
        other = "an inpainting or image-editing variant"
    else:
        return
    raise Fail(f"{unet.path} looks like {other}; this program needs Stable Diffusion 1.5 ({SD15})")


def _candidates(part):
    return [f"{part}/diffusion_pytorch_model.safetensors", f"{part}/diffusion_pytorch_model.fp16.safetensors"]


def _find(folder, part):
    if found := [folder / name for name in _candidates(part) if (folder / name).is_file()]:
        return found[0]
    raise Fail(f"{folder} contains no {' or '.join(_candidates(part))}; pass a folder with unet/ and vae/")


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
    r"mid\.attn_1": "mid_block.attentions.0", r"0\.norm": "0.group_norm", r"0\.([qkv])\.": r"0.to_\1.",
    r"0\.proj_out": "0.to_out.0", r"nin_shortcut": "conv_shortcut", r"norm_out": "conv_norm_out",
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
    """The first of the candidate files in the hub's cache, or else in the repository: downloaded after an
    announcement.

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
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        advice = access or "Check the name and the connection, or download it and pass the local path."
        raise Fail(f"cannot get {name} of {repository} ({reason}). {advice}") from None
    expected = (sha256 or {}).get(name)
    if expected and expected != (found := file_sha256(path)):
        path.resolve().unlink()
        raise Fail(f"the download of {name} has sha256 {found[:12]}..., not {expected[:12]}...; it was removed, "
                   "try again")
    return path


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
