"""Weights from files: read lazily, renamed to Diffusers' names, checked, loaded strictly, tensor by tensor.

Stable Diffusion 1.5 is found as a Diffusers folder or as one CompVis file (`model.*`, `first_stage_model.*`);
the VAE's attention has three sets of names, in either (the official float32 file: `query`).
"""
import copy
import hashlib
import json
import math
import os
import pickle
import re
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .app import RANK0, Fail, file_sha256, first_line, foreign_file, layout
from .schedule import T, alpha_bar
from .unet import UNet
from .vae import SCALE, VAE

BUILT_IN = {"toy": Path(__file__).parent / "toy"}       # names that stand for weights in this repository
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SHA256 = {f"{SD15}/{name}.safetensors": sha256 for name, sha256 in (                    # as published
    ("unet/diffusion_pytorch_model", "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"),
    ("unet/diffusion_pytorch_model.fp16", "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"),
    ("vae/diffusion_pytorch_model", "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"),
    ("vae/diffusion_pytorch_model.fp16", "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"))}
HINT = ("It does not fit Stable Diffusion 1.5, as Stable Diffusion 2, SDXL, inpainting models and parts of a "
        f"model do not; pass one such as {SD15}")

# ---- files of tensors --------------------------------------------------------------------------------------
BLOCK = 2 ** 18         # numbers; so many zeros in a row are a gap in a file, not a weight matrix

class TensorFile:
    """The tensors of a safetensors file or a pickled state dict, mapped, read on demand.

    names: {our name: name in the file}; shapes: {our name: shape}. The first bytes decide the format.
    """

    def __init__(self, path):
        self.path, self.header, self._fingerprint = Path(path), {}, None
        with foreign_file(self.path, "is not a plain file of tensors, or is truncated", "download it again"):
            with open(self.path, "rb") as f:
                start = f.read(9)
            if start[8:] == b"{":
                self._open = lambda: safe_open(self.path, "pt").get_tensor      # name in the file -> tensor
                with safe_open(self.path, "pt") as f:
                    self.shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
                    self.header |= f.metadata() or {}
            elif start[:1] not in (b"P", b"\x80"):         # of a zip archive, of a pickle
                raise ValueError(f"it begins with {start!r}: a Git LFS pointer (run `git lfs pull`), a web "
                                 "page, a quantised GGUF, or zeros?")
            else:
                state = _unpickle(self.path, archive=start[:2] == b"PK")
                self._open = lambda: state.__getitem__
                self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.names = {name: name for name in self.shapes}

    def renamed(self, rename):
        """The same file under other names. rename: name -> our name, or None to omit the tensor."""
        file = copy.copy(self)
        file._fingerprint = None
        file.names = {ours: name for name in self.names if (ours := rename(name)) is not None}
        file.shapes = {ours: self.shapes[name] for ours, name in file.names.items()}
        return file

    def get(self, name):
        """One tensor, mapped from the file."""
        return next(self.read([name]))[1]

    def read(self, names):
        """(name, tensor) of each in turn, mapped; reopens the file every 128 MB, to unmap earlier ones."""
        size = math.inf
        for name in names:
            if size > 2 ** 27:
                get, size = self._open(), 0
            tensor = get(self.names[name]).detach()
            size += tensor.nbytes
            yield name, tensor

    def fingerprint(self):
        """sha256 over our names and the tensors' bytes: the same for every layout of the same network.

        Fails where a number is not finite in float32, or BLOCK numbers or all of a weight matrix are 0.
        """
        if self._fingerprint is None:
            with ThreadPoolExecutor() as pool:
                lines = "\n".join(pool.map(self._digest, self.read(sorted(self.names))))
            self._fingerprint = hashlib.sha256(lines.encode()).hexdigest()
        return self._fingerprint

    def _digest(self, named):
        (ours, tensor), name = named, self.names[named[0]]
        tensor = tensor.contiguous().flatten()
        if tensor.is_floating_point() and tensor.numel():
            numbers = tensor if tensor.itemsize > 1 else tensor.float()
            parts = numbers.tensor_split(max(1, len(numbers) // BLOCK))
            ranges = torch.stack([torch.stack(part.aminmax()) for part in parts]).float()       # (parts, 2)
            matrix = len(self.shapes[ours]) > 1 and name.endswith("weight")
            gap = matrix and (ranges == 0).all(1).any()
            if gap or not ranges.isfinite().all():
                problem = ("is zero in a part where weights must be, as an interrupted copy leaves it" if gap
                           else "contains numbers that are not finite (NaN, infinity, or beyond float32)")
                raise Fail(f"{self.path}: {name} {problem}; download it again, or pass another file")
        return f"{ours} {hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()}"

class _Stub:
    """Stands for a class that is not imported: its objects are dictionaries, which take any state."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()

def _unpickle(path, archive):
    """The state dict in a file of torch.save, which may be one part of a trainer's checkpoint.

    Nothing in the file is run or imported: objects of unknown classes become stubs. archive: whether it is a
    zip file, in which torch can map tensors.
    """
    mapped = archive and path.suffix.lower() != ".safetensors"      # which torch takes for no pickle
    unknown = get_unsafe_globals_in_checkpoint(path) if archive else []
    try:
        with open(path, "rb") as f, safe_globals([(_Stub, name) for name in unknown]):
            state = torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:              # torch's message has many lines and unsafe advice
        raise ValueError("damaged, or a pickle with code: save its state dict alone") from None
    state = {"tensor": state} if isinstance(state, torch.Tensor) else state
    while nested := [state[key] for key in ("state_dict", "model_state_dict", "model")
                     if isinstance(state.get(key), dict)]:
        state = nested[0]
    state = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    if not state:
        raise ValueError("it holds no state dict")
    return state

def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it by name and shape.

    Memory peaks at the network's size in `dtype` plus one tensor; nothing is copied where the file has that
    dtype and the device is the CPU. hint: advice on a mismatch.
    """
    with foreign_file(file.path, "has tensors of another network", hint), torch.device("meta"):
        network = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    fits = {name: file.shapes.get(name) in (shape, (*shape, 1, 1)) for name, shape in wanted.items()}
    wrong = [f"{name} is {file.shapes.get(name, 'missing')} instead of {wanted.get(name, 'unused')}"
             for name in wanted | file.shapes if not fits.get(name)]
    if wrong:
        raise Fail(f"{file.path}: {len(wrong)} tensors do not fit: {', '.join(wrong[:3])}. {hint}")
    if device != "meta":
        file.fingerprint()                      # which checks the numbers
    state, small = {}, ""
    for name, tensor in file.read(wanted):
        if not tensor.dtype.is_floating_point:
            raise Fail(f"{file.path}: {name} is {tensor.dtype}, not floating point (quantised?). {hint}")
        small = tensor.dtype if tensor.itemsize == 1 else small
        # CompVis stores the VAE's attention as 1x1 convolutions
        state[name] = tensor.reshape(wanted[name]).to(device, dtype)
    if small and device != "meta" and RANK0:
        print(f"note: {file.path} is stored as {small}, 2 or 3 bits of precision", file=sys.stderr)
    network.load_state_dict(state, strict=True, assign=True)
    return network.to(memory_format=layout(device, dtype)).eval().requires_grad_(False)

def find_file(argument, source, names):
    """The path of a file of weights: `source` itself, or one of `names` in that folder or hub repository.

    Links are kept: a path of the hub's cache has its name only there.
    """
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    for file in [path / name for name in names] if path.is_dir() else [path]:
        if file.is_file():
            return file
    if re.fullmatch(HUB_NAME, str(source)) and not path.exists():
        # float16 is half the download, and finer than the bfloat16 that it is used in
        return hub_file(str(source), sorted(names, key=lambda name: ".fp16.safetensors" not in name))
    raise Fail(f"{argument} {source}: no such file, nor folder with {names[0]}; pass the file or folder of "
               f"the weights, or a Hugging Face repository such as {SD15}")

# ---- Stable Diffusion 1.5 ----------------------------------------------------------------------------------
def open_sd15(source, vae=None):
    """A Diffusers folder, CompVis file, Hugging Face repository or "toy" -> TensorFiles (U-Net, VAE).

    vae: another source for the VAE. Fails where the files, or configs beside them, declare another model than
    is computed here.
    """
    unet = vae_file = TensorFile(find_file("--sd15", source, _names("unet/")))
    _check_schedule(unet)
    _check_config(unet.path, "config.json", DECLARED_UNET)
    _check_config(unet.path, f"../{SCHEDULER}", DECLARED_SCHEDULE)
    if vae is not None:
        vae_file = TensorFile(find_file("--vae", vae, [*_names("vae/"), *_names("")]))
    elif unet.path != Path(os.path.expanduser(source)):
        vae_file = TensorFile(find_file("--sd15", source, _names("vae/")))
    elif not any(name.startswith("first_stage_model.") for name in unet.names):
        raise Fail(f"{source} contains no VAE; pass --vae with a file, a folder or a repository, such as "
                   "stabilityai/sd-vae-ft-mse")
    _check_config(vae_file.path, "config.json", DECLARED_VAE)
    return _part(unet, "model.diffusion_model."), _part(vae_file, "first_stage_model.")

def _names(folder):
    return [f"{folder}diffusion_pytorch_model{kind}.{suffix}" for suffix in ("safetensors", "bin")
            for kind in ("", ".fp16", ".non_ema")]

def load_unet(file, device="cpu", dtype=torch.float32):
    """The U-Net of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    def build():
        context = file.shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
        return UNet(*_geometry(file, "down_blocks"), context)
    return load(build, file, device, dtype, HINT)

def unet_on_meta(source):
    """The U-Net of an `open_sd15` source without its weights; for SD15 itself no file is needed."""
    with torch.device("meta"):
        return UNet().requires_grad_(False) if source == SD15 else load_unet(open_sd15(source)[0], "meta")

def load_vae(file, device="cpu", dtype=torch.float32):
    """The VAE of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    return load(lambda: VAE(*_geometry(file, "encoder.down_blocks")), file, device, dtype, HINT)

def _geometry(file, prefix):
    """(width of each level, residual blocks per level), from the shapes."""
    channels = []
    while shape := file.shapes.get(f"{prefix}.{len(channels)}.resnets.0.conv1.weight"):
        channels.append(shape[0])
    first = re.compile(rf"{prefix}\.0\.resnets\.\d+\.conv1\.weight")
    return tuple(channels), sum(first.fullmatch(name) is not None for name in file.shapes)

def licence(base, encoder_terms):
    """The terms of an adapter, for its header and its model card. base: its --sd15."""
    base = ("the toy base (MIT)" if base in BUILT_IN else
            "Stable Diffusion 1.5 (CreativeML Open RAIL-M, whose use restrictions carry over)")
    return f"Trained from {base} on embeddings of {encoder_terms} and on your images: their terms apply."

# What is computed here, {key: value, or a tuple of values of one meaning}, where files can declare otherwise.
# Keys are Diffusers'. Those that its networks ignore, or that change rounding only, are not listed.

SCHEDULER = "scheduler/scheduler_config.json"
DECLARED_UNET = dict(
    _class_name="UNet2DConditionModel", act_fn=("silu", "swish"), norm_num_groups=32, norm_eps=1e-5,
    attention_head_dim=8, num_attention_heads=(None, 8), flip_sin_to_cos=True, freq_shift=0,
    downsample_padding=1, mid_block_scale_factor=1, resnet_out_scale_factor=1, transformer_layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], mid_block_type="UNetMidBlock2DCrossAttn",
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, resnet_time_scale_shift="default",
    time_embedding_type="positional", attention_type="default",
    **dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention",
                     "use_linear_projection", "mid_block_only_cross_attention", "cross_attention_norm",
                     "class_embed_type", "num_class_embeds", "class_embeddings_concat", "addition_embed_type",
                     "encoder_hid_dim", "encoder_hid_dim_type", "resnet_skip_time_act", "timestep_post_act",
                     "time_embedding_act_fn", "time_cond_proj_dim")))
DECLARED_VAE = dict(
    _class_name="AutoencoderKL", act_fn=("silu", "swish"), norm_num_groups=32, scaling_factor=SCALE,
    shift_factor=None, latents_mean=None, latents_std=(None, 1), use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True,
    down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D")
DECLARED_SCHEDULE = dict(
    prediction_type="epsilon", rescale_betas_zero_snr=False, num_train_timesteps=T, trained_betas=None,
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, shift=None, use_flow_sigmas=False)
DECLARED_FILE = {       # of one file by empty tensors, by modelspec's or kohya's header, by CompVis's .yaml
    **dict.fromkeys(("v_pred", "ztsnr", "edm_vpred.sigma_max"), False),
    **dict.fromkeys(("modelspec.prediction_type", "modelspec.predict_key"), ("epsilon", "eps")),
    **dict.fromkeys(("ss_v_parameterization", "ss_zero_terminal_snr"), ("False", "false")),
    "parameterization": "eps"}

def read_config(path):
    """The object in a config.json of another program; {} where the file does not exist."""
    if not path.is_file():
        return {}
    with foreign_file(path):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))

def check_declared(path, found, computed):
    """Fail where a value of `found` in the file `path` contradicts that of the same key in `computed`."""
    def same(value, ours):
        if isinstance(value, list):
            ours = ours if isinstance(ours, list) else [ours] * len(value)
            return len(value) == len(ours) and all(map(same, value, ours))
        if isinstance(value, float) and isinstance(ours, (int, float)):
            return math.isclose(value, ours, rel_tol=1e-6)
        return value == ours or not (value or ours)         # null, false and 0 have one meaning

    for key, ours in computed.items():
        values = ours if isinstance(ours, tuple) else (ours,)
        if key in found and not any(same(found[key], value) for value in values):
            raise Fail(f"{path} declares {key} {found[key]!r}, and this program computes with {values[0]!r}; "
                       "pass another model")

def _check_config(path, name, computed):
    """Check the config of Diffusers at `name` from its file of weights, by one of the tables above."""
    if path.name.startswith("diffusion_pytorch_model"):
        config = Path(os.path.normpath(path.parent / name))
        check_declared(config, read_config(config), computed)

def _check_schedule(file):
    """Fail where a file, or the .yaml beside it, declares another prediction than ε or another schedule."""
    check_declared(file.path, file.header | dict.fromkeys(file.names, True), DECLARED_FILE)
    yaml = file.path.with_suffix(".yaml")
    if yaml.is_file():
        keys = re.findall(r"(parameterization)\W+(\w+)", yaml.read_text(errors="replace"))
        check_declared(yaml, dict(keys), DECLARED_FILE)
    if "alphas_cumprod" in file.names:
        theirs = file.get("alphas_cumprod")
        rounding = {1: 0.3, 2: 0.01}.get(theirs.itemsize, 1e-4)
        if theirs.shape != (T,) or not torch.allclose(theirs.double(), alpha_bar(), rounding, atol=0):
            raise Fail(f"{file.path}: alphas_cumprod is another noise schedule than that of Stable Diffusion "
                       f"1.5; pass a base with that one, such as {SD15}")

# Patterns of names in the other layouts -> Diffusers' names, which no pattern changes

_RENAMED = {
    r"^time_embed\.0": "time_embedding.linear_1", r"^time_embed\.2": "time_embedding.linear_2",
    r"^out\.0": "conv_norm_out", r"^out\.2": "conv_out", r"^input_blocks\.0\.0": "conv_in",
    r"^middle_block\.0|mid\.block_1": "mid_block.resnets.0", r"in_layers\.0": "norm1",
    r"^middle_block\.1|mid\.attn_1": "mid_block.attentions.0", r"in_layers\.2": "conv1",
    r"^middle_block\.2|mid\.block_2": "mid_block.resnets.1", r"emb_layers\.1": "time_emb_proj",
    r"out_layers\.0": "norm2", r"out_layers\.3": "conv2", r"skip_connection|nin_shortcut": "conv_shortcut",
    r"(coder\.mid_block\.attentions\.0)\.norm\.": r"\1.group_norm.", r"\.norm_out": ".conv_norm_out",
    r"(coder\.mid_block\.attentions\.0)\.([qkv])(uery|ey|alue)?\.": r"\1.to_\2.",
    r"(coder\.mid_block\.attentions\.0)\.(proj_out|proj_attn)\.": r"\1.to_out.0.",
    r"down\.(\d)": r"down_blocks.\1", r"up\.(\d)": lambda m: f"up_blocks.{3 - int(m[1])}",
    r"\.block\.(\d)": r".resnets.\1", r"\.(down|up)sample\.": r".\1samplers.0."}
for i in range(12):         # three blocks a level, after input block 0, which is conv_in
    level, j = divmod(i, 3)
    for side, block in (("down", rf"^input_blocks\.{i + 1}"), ("up", rf"^output_blocks\.{i}")):
        _RENAMED |= {rf"{block}\.\d\.(op|conv)\.": f"{side}_blocks.{level}.{side}samplers.0.conv.",
                     rf"{block}\.0\.": f"{side}_blocks.{level}.resnets.{j}.",
                     rf"{block}\.1\.": f"{side}_blocks.{level}.attentions.{j}."}

def _part(file, prefix):
    """The tensors under a prefix, or all where there is none, renamed.

    Omits what trainers leave in a VAE: its discriminator, `loss.*`, and the counters of `model_ema.*`.
    """
    single = any(name.startswith(prefix) for name in file.names)

    def rename(name):
        if single and not name.startswith(prefix):
            return None
        name = name.removeprefix(prefix)
        for old, new in _RENAMED.items():
            name = re.sub(old, new, name)
        return None if name.startswith(("loss.", "model_ema.")) else name
    return file.renamed(rename)

# ---- the Hugging Face hub ----------------------------------------------------------------------------------
HUB_NAME = r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b"      # owner/name, by the hub's rules

def hub_file(repository, candidates):
    """The first of the candidates in the hub's cache, or else in the repository: announced, then downloaded,
    after the configs beside them there.
    """
    import huggingface_hub as hub
    for name in candidates:
        if isinstance(path := hub.try_to_load_from_cache(repository, name), str):
            return Path(path)
    configs = {re.sub("[^/]+$", "config.json", name) for name in candidates} | {SCHEDULER}
    try:
        listed = hub.model_info(repository, files_metadata=True, timeout=30).siblings
        files = {f.rfilename: f.size or 0 for f in listed}
        weights = [name for name in candidates if name in files][:1]
        for name in sorted(configs & files.keys()) + weights:
            what = f"{name} of {repository} ({files[name] / 1e9:.2f} GB)"
            print(f"downloading {what} to {hub.constants.HF_HUB_CACHE}", file=sys.stderr)
            path = Path(hub.hf_hub_download(repository, name))      # which resumes a broken one
    except Exception as problem:            # of the hub's client and the libraries beneath it
        if getattr(getattr(problem, "response", None), "status_code", None) in (401, 403):
            remedy = ("It is gated, private or not there: check the name, request access on https://"
                      f"huggingface.co/{repository} with an institutional address, then run `hf auth login`")
        else:
            remedy = ("Check the name, the connection, HTTPS_PROXY and HF_HUB_OFFLINE, and that HF_HOME has "
                      "space and may be written to; or try again later")
        cause = f"{type(problem).__name__}: {first_line(problem)}"
        raise Fail(f"cannot get {candidates[0]} of {repository} ({cause}). {remedy}; or download it "
                   "elsewhere and pass the local path") from None
    if not weights:
        raise Fail(f"{repository} has no {' or '.join(candidates[:2])}; check the name, or pass a local path")
    expected = SHA256.get(f"{repository}/{weights[0]}")
    if expected and file_sha256(path) != expected:
        path.resolve().unlink()
        raise Fail(f"{path} came with another sha256 than {expected[:12]}...; removed, try again")
    return path
