"""Weights from files: read lazily, renamed to Diffusers' names, loaded strictly into a network built on the meta device.

Stable Diffusion 1.5 is met in three layouts: a Diffusers folder with the VAE's attention named `to_q`, the same with it
named `query` (the official float32 file), and one CompVis file (`model.diffusion_model.*`, `first_stage_model.*`).
"""
import hashlib
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .app import Fail, first_line
from .unet import UNet
from .vae import VAE

BUILT_IN = {"toy": Path(__file__).parent / "toy"}       # names that stand for weights in this repository
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_SHA256 = {     # of the files of that repository
    "unet/diffusion_pytorch_model.safetensors": "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
    "unet/diffusion_pytorch_model.fp16.safetensors": "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21",
    "vae/diffusion_pytorch_model.safetensors": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    "vae/diffusion_pytorch_model.fp16.safetensors": "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c",
}


def licence(base, encoder):
    """What an adapter's header and its model card say of the terms that it stands under."""
    base = ("the toy base (MIT)" if base in BUILT_IN else
            "Stable Diffusion 1.5 (CreativeML Open RAIL-M, whose use restrictions carry over)")
    encoder = "the toy encoder (MIT)" if encoder in BUILT_IN else "UNI2-h (CC BY-NC-ND 4.0, gated: non-commercial research only)"
    return f"Trained from {base} on embeddings of {encoder} and on your images: their terms apply."


class TensorFile:
    """The tensors of a safetensors file or of a pickled state dict, under our names; memory-mapped, read when asked for.

    rename: name in the file -> our name, or None to leave the tensor out. shapes: {our name: shape}.
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
        try:
            return safe_open(self.path, "pt")
        except SafetensorError as problem:
            raise Fail(f"{self.path} is not a whole safetensors file ({first_line(problem)}); restore it, or download it again") from None

    def get(self, name):
        """One tensor, mapped from the file."""
        [(_, tensor)] = self.read([name])
        return tensor

    def read(self, names):
        """(name, tensor) of each in turn, mapped.

        The file is opened anew every 128 MB, so that what is no longer used is unmapped.
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
        """sha256 over our names and the tensors' bytes: the same for every layout that holds the same network."""
        if self._fingerprint:
            return self._fingerprint

        def digest(name):
            data = self.get(name).contiguous().flatten().view(torch.uint8).numpy()
            return hashlib.sha256(data).hexdigest()
        with ThreadPoolExecutor() as pool:
            names = sorted(self.names)
            lines = "\n".join(f"{n} {d}" for n, d in zip(names, pool.map(digest, names)))
        self._fingerprint = hashlib.sha256(lines.encode()).hexdigest()
        return self._fingerprint


def check_download(path):
    """Refuse what is no weights file at all: missing, a Git LFS pointer, or shorter than its own header says."""
    if not path.is_file():
        raise Fail(f"{path} does not exist or is not a file")
    with open(path, "rb") as f:
        head = f.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise Fail(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there, or download the file itself")
    if path.suffix != ".safetensors":
        return
    size, header = path.stat().st_size, int.from_bytes(head[:8], "little")
    if size < 8 or header + 8 > size:
        raise Fail(f"{path} is truncated or no safetensors file ({size} bytes); restore it, or download it again")


def _unpickle(path):
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as problem:
            if "mmap" not in str(problem):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)     # the format before torch 1.6
    except Exception as problem:            # whatever an unpickler makes of foreign bytes
        raise Fail(f"{path} is not a plain file of tensors, or is truncated ({first_line(problem)}); "
                   "download it again, or pass a .safetensors file") from None
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()):
        raise Fail(f"{path} holds no state dict of tensors; pass the file that holds only the weights")
    return state


def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it name by name and shape by shape.

    Built on the meta device and filled tensor by tensor: memory peaks at the network's size in `dtype` plus one tensor,
    and nothing is copied where the file has the wanted dtype and the device is the CPU. hint: what to do on a mismatch.
    """
    try:
        with torch.device("meta"):
            network = build()
    except (AssertionError, ValueError, RuntimeError) as problem:
        raise Fail(f"{file.path}: no network has tensors of these shapes ({first_line(problem)}). {hint}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [n for n in wanted if n not in file.shapes]
    unexpected = [n for n in file.shapes if n not in wanted]
    wrong = [f"{n} {file.shapes[n]} instead of {s}" for n, s in wanted.items()
             if n in file.shapes and file.shapes[n] not in (s, (*s, 1, 1))]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise Fail(f"{file.path}: {len(names)} tensors {what}: {', '.join(names[:3])}{more}. {hint}")
    state = {}
    for name, tensor in file.read(wanted):
        if not tensor.dtype.is_floating_point:
            raise Fail(f"{file.path}: {name} is {tensor.dtype}, not floating point (a quantised file?). {hint}")
        state[name] = tensor.reshape(wanted[name]).to(device, dtype)   # CompVis keeps the VAE's attention as 1x1 convolutions
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


# ---- Stable Diffusion 1.5 ------------------------------------------------------------------------------------------

def open_sd15(source, sha256=(None, None)):
    """A Diffusers folder, a CompVis .safetensors file, a Hugging Face repository or "toy" -> (U-Net, VAE) as TensorFiles.

    sha256: the two fingerprints that a run or an adapter names: where float32 and float16 are both there, theirs is taken.
    """
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    parts = [("unet", str, sha256[0]), ("vae", _vae_attention_name, sha256[1])]
    if path.is_file():
        files = [TensorFile(path, _compvis_unet_name), TensorFile(path, _compvis_vae_name)]
        if not files[0].names:
            raise Fail(f"{path} holds no `model.diffusion_model.*` tensors: pass the whole Stable Diffusion 1.5 file, "
                       "or the folder that holds unet/ and vae/")
    elif path.is_dir() or source in BUILT_IN:
        files = [_choose(_find(path, part), rename, wanted) for part, rename, wanted in parts]
    elif is_hub_name(source):
        files = [_choose(hub_files(source, _candidates(part)[::-1], SD15_SHA256 if source == SD15 else {}), rename, wanted)
                 for part, rename, wanted in parts]
    else:
        raise Fail(f"--sd15 {source}: no such folder or file; pass a Diffusers folder, a CompVis .safetensors file, or a "
                   f"Hugging Face repository such as {SD15}")
    for file in files:
        refuse_numbers(file, _HINT)
    _refuse_other_models(files[0])
    return files


def load_unet(file, device="cpu", dtype=torch.float32):
    """The U-Net of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors say."""
    s = file.shapes
    channels, layers = _geometry(file, "down_blocks")
    context = s.get("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", (0, 768))[-1]
    latent = s.get("conv_in.weight", (0, 4))[1]
    return load(lambda: UNet(channels, layers, context, latent=latent), file, device, dtype, _HINT)


def load_vae(file, device="cpu", dtype=torch.float32):
    """The VAE of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors say."""
    channels, layers = _geometry(file, "encoder.down_blocks")
    latent = file.shapes.get("post_quant_conv.weight", (4,))[0]
    return load(lambda: VAE(channels, layers, latent), file, device, dtype, _HINT)


_HINT = f"It does not fit Stable Diffusion 1.5; the reference files are those of {SD15}"


def _geometry(file, prefix):
    """(width of each level, residual blocks per level), read off the shapes."""
    channels = []
    while shape := file.shapes.get(f"{prefix}.{len(channels)}.resnets.0.conv1.weight"):
        channels.append(shape[0])
    layers = sum(bool(re.fullmatch(rf"{prefix}\.0\.resnets\.\d+\.conv1\.weight", n)) for n in file.shapes)
    if not channels or any(c % 32 for c in channels):
        raise Fail(f"{file.path}: no {prefix}.*.resnets with widths that are multiples of 32. {_HINT}")
    return tuple(channels), layers


def refuse_numbers(file, hint):
    """Fail where a tensor is a single number: none of the networks' is."""
    if names := [name for name, shape in file.shapes.items() if not shape]:
        raise Fail(f"{file.path}: {min(names)} has no dimensions. {hint}")


def _refuse_other_models(unet):
    s = unet.shapes
    proj_in = s.get("down_blocks.0.attentions.0.proj_in.weight") or s.get("down_blocks.1.attentions.0.proj_in.weight", ())
    other = ("SDXL" if any(n.startswith(("add_embedding", "label_emb")) for n in s) else
             "Stable Diffusion 2" if len(proj_in) == 2 else
             "an inpainting or image-editing variant" if s.get("conv_in.weight", (0, 4))[1] in (8, 9) else None)
    if other:
        raise Fail(f"{unet.path} looks like {other}; this program needs Stable Diffusion 1.5 ({SD15})")


def _candidates(part):
    return [f"{part}/diffusion_pytorch_model.safetensors", f"{part}/diffusion_pytorch_model.fp16.safetensors"]


def _choose(paths, rename, sha256):
    """Of the files of one network in several precisions the one with this fingerprint, else the first."""
    files = [TensorFile(path, rename) for path in paths]
    return next((file for file in files[1:] if sha256 and file.fingerprint() == sha256), files[0])


def _find(folder, part):
    if found := [folder / name for name in _candidates(part) if (folder / name).is_file()]:
        return found
    how = (f"make it with `python -m ldm.toy.base {folder}` (an hour and a half on 2 cores), or pass --data and --sd15"
           if folder in BUILT_IN.values() else "pass the folder that contains unet/ and vae/")
    raise Fail(f"{folder} holds neither {' nor '.join(_candidates(part))}; {how}")


def _vae_attention_name(name):
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


def _compvis_unet_name(name):
    if not name.startswith("model.diffusion_model."):
        return None                     # the VAE, the text encoder, the schedule, or the EMA copy
    name = name.removeprefix("model.diffusion_model.")
    if m := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", name):
        side, block, slot, rest = m[1], int(m[2]), int(m[3]), m[4]
        if side == "input" and block == 0:
            name = f"conv_in.{rest}"
        elif side == "input" and rest.startswith("op."):
            name = f"down_blocks.{block // 3 - 1}.downsamplers.0.conv.{rest[3:]}"
        elif side == "output" and rest.startswith("conv."):
            name = f"up_blocks.{block // 3}.upsamplers.0.{rest}"
        else:
            level, j = divmod(block - 1 if side == "input" else block, 3)
            blocks = "down_blocks" if side == "input" else "up_blocks"
            name = f"{blocks}.{level}.{'attentions' if slot else 'resnets'}.{j}.{rest}"
    for old, new in ((r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
                     (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
                     (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
                     (r"^middle_block\.2", "mid_block.resnets.1"), (r"\.in_layers\.0\.", ".norm1."),
                     (r"\.in_layers\.2\.", ".conv1."), (r"\.emb_layers\.1\.", ".time_emb_proj."),
                     (r"\.out_layers\.0\.", ".norm2."), (r"\.out_layers\.3\.", ".conv2."),
                     (r"\.skip_connection\.", ".conv_shortcut.")):
        name = re.sub(old, new, name)
    return name


def _compvis_vae_name(name):
    if not name.startswith("first_stage_model."):
        return None
    name = name.removeprefix("first_stage_model.")
    name = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", name)
    name = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", name)
    name = re.sub(r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.{m[2]}", name)
    name = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0", name)
    for old, new in (("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
                     ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"), ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
                     ("mid.attn_1.k", "mid_block.attentions.0.to_k"), ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
                     ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"), ("nin_shortcut", "conv_shortcut"),
                     ("norm_out", "conv_norm_out")):
        name = name.replace(old, new)
    return name


# ---- the Hugging Face hub ------------------------------------------------------------------------------------------

def is_hub_name(source):
    """Whether this is a name of a repository, owner/name, by the hub's rules."""
    name = str(source)
    return re.fullmatch(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", name) is not None and not re.search(r"--|\.\.|\.git$", name)


def hub_files(repository, candidates, sha256=None, gated=""):
    """Those of the candidate files of a repository that are in the hub's cache; where none is, one is downloaded after saying so.

    Of those that the repository has the first one is downloaded (of SD1.5: float16, half as large, and finer than the
    bfloat16 that it is used in). sha256: {file: hash} to check a download against. gated: how to get access.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    if cached := [Path(path) for name in candidates if isinstance(path := try_to_load_from_cache(repository, name), str)]:
        return cached
    name, *others = candidates
    try:
        size = get_hf_file_metadata(hf_hub_url(repository, name)).size
        print(f"downloading {name} of {repository} ({(size or 0) / 1e9:.2f} GB) to {HF_HUB_CACHE}", file=sys.stderr, flush=True)
        for attempt in range(3, 0, -1):
            try:
                path = Path(hf_hub_download(repository, name))
                break
            except Exception as problem:    # a connection that broke: the next attempt goes on where it did
                if isinstance(problem, (HfHubHTTPError, OSError)) or attempt == 1:
                    raise
    except Exception as problem:            # the hub's client has a dozen kinds, and several libraries beneath it
        if others and isinstance(problem, EntryNotFoundError):
            return hub_files(repository, others, sha256, gated)
        kind = type(problem).__name__
        raise Fail(f"cannot get {name} of {repository} ({kind}: {first_line(problem)}). "
                   f"{gated or 'Check the name and the connection, or download it elsewhere and pass the local path.'}") from None
    expected = (sha256 or {}).get(name)
    if expected and expected != (found := file_sha256(path)):
        path.resolve().unlink()
        raise Fail(f"the download of {name} has sha256 {found[:12]}..., not {expected[:12]}...; it was removed, try again")
    return [path]


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
