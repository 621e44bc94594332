"""Weights from files: read lazily, renamed to Diffusers' names, checked, and loaded strictly."""
import copy
import hashlib
import math
import os
import pickle
import re
import tomllib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .app import Fail, announce, file_sha256, first_line, foreign_file, layout, read_json
from .schedule import T, alpha_bar
from .unet import UNet
from .vae import VAE

BUILT_IN = {"toy": Path(__file__).parent / "toy"}       # names that stand for weights in this repository
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FACTS = tomllib.loads(Path(__file__).with_name("sd15.toml").read_text(encoding="utf-8"))
SHA256 = {f"{SD15}/{name}": sha256 for name, sha256 in FACTS["sha256"].items()}
SCHEDULER = "scheduler/scheduler_config.json"
HINT = f"Stable Diffusion 2, SDXL, inpainting models and parts of one do not fit; pass one such as {SD15}"

# ---- files of tensors --------------------------------------------------------------------------------------
BLOCK = 2 ** 18         # numbers; so many zeros in a row are a gap in a file, not a weight matrix

class TensorFile:
    """The tensors of a safetensors file or a pickled state dict, mapped, read on demand.
    names: {our name: name in the file}; shapes: {our name: shape}. The first bytes decide the format."""
    def __init__(self, path):
        self.path, self.header, self._fingerprint = Path(path), {}, None
        with foreign_file(self.path, "is not a plain file of tensors, or is truncated", "download it again"):
            with open(self.path, "rb") as f:
                start = f.read(9)
            if start[8:] == b"{":
                self._open = lambda: safe_open(self.path, "pt").get_tensor      # name in the file -> tensor
                file = safe_open(self.path, "pt")
                self.header = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            elif start[:1] not in (b"P", b"\x80"):         # of a zip archive, of a pickle
                raise ValueError(f"it begins with {start!r}: a Git LFS pointer (run `git lfs pull`), a web "
                                 "page, a quantised GGUF, or zeros?")
            else:
                state = _unpickle(self.path, archive=start[:2] == b"PK")
                self._open = lambda: state.__getitem__
                self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.names = {name: name for name in self.shapes}

    def renamed(self, names):
        """The tensors of {new name: name} alone, in the same file."""
        file = copy.copy(self)
        file.names = {new: self.names[name] for new, name in names.items()}
        file.shapes, file._fingerprint = {new: self.shapes[name] for new, name in names.items()}, None
        return file

    def read(self, names):
        """(name, tensor) of each in turn, mapped; reopens the file every 64 MB, to unmap earlier ones."""
        size = math.inf
        for name in names:
            if size > 2 ** 26:
                get, size = self._open(), 0
            tensor = get(self.names[name]).detach()
            size += tensor.nbytes
            yield name, tensor

    def fingerprint(self):
        """sha256 over our names and the tensors' bytes: the same for every layout of the same network."""
        if self._fingerprint is None:
            with ThreadPoolExecutor() as pool:
                lines = "\n".join(pool.map(self._digest, self.read(sorted(self.names))))
            self._fingerprint = hashlib.sha256(lines.encode()).hexdigest()
        return self._fingerprint

    def _digest(self, named):
        """Name and sha256 of one. Fails on numbers not finite in float32, and on BLOCK zeros in a matrix."""
        name, tensor = named
        numbers = tensor.contiguous().flatten()
        if numbers.is_floating_point() and len(numbers):
            floats = numbers if numbers.itemsize > 1 else numbers.float()
            parts = floats.tensor_split(max(1, len(floats) // BLOCK))
            ranges = torch.stack([torch.stack(part.aminmax()) for part in parts]).float()       # (parts, 2)
            matrix = tensor.ndim > 1 and self.names[name].endswith("weight")
            if not ranges.isfinite().all() or (matrix and (ranges == 0).all(1).any()):
                raise Fail(f"{self.path}: {self.names[name]} contains numbers that are not finite, or a "
                           "gap of zeros; download it again, or pass another file")
        return f"{name} {hashlib.sha256(numbers.view(torch.uint8).numpy()).hexdigest()}"

class _Stub:
    """Stands for a class that is not imported: its objects are dictionaries, which take any state."""
    def __new__(cls, *args, **kwargs):
        return OrderedDict()

def _unpickle(path, archive):
    """The state dict in a file of torch.save, which may be one part of a trainer's checkpoint.
    Nothing in it is run or imported: objects of unknown classes become stubs. archive: it is a zip."""
    mapped = archive and path.suffix.lower() != ".safetensors"      # which torch takes for no pickle
    unknown = get_unsafe_globals_in_checkpoint(path) if archive else []
    try:
        with open(path, "rb") as f, safe_globals([(_Stub, name) for name in unknown]):
            state = torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:              # torch's message has many lines and unsafe advice
        raise ValueError("damaged, or a pickle with code: save its state dict alone") from None
    state = state if isinstance(state, dict) else {"tensor": state}
    for key in 3 * ("state_dict", "model_state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    if not state:
        raise ValueError("it holds no state dict")
    return state

def load(build, file, device="cpu", dtype=torch.float32, hint=""):
    """build() -> a frozen network with the tensors of `file`, which must match it by name and shape.
    Memory peaks at its size in `dtype` plus one tensor; a CPU copies nothing of that dtype."""
    with foreign_file(file.path, "has tensors of another network", hint), torch.device("meta"):
        network = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # CompVis stores the VAE's attention as 1x1 convolutions
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
        state[name] = tensor.reshape(wanted[name]).to(device, dtype)
    if small and device != "meta":
        announce(f"note: {file.path} is stored as {small}, 2 or 3 bits of precision")
    network.load_state_dict(state, strict=True, assign=True)
    state.clear()                           # which would keep each tensor beside its copy in another layout
    return network.to(memory_format=layout(device, dtype)).eval().requires_grad_(False)

def find_file(argument, source, names):
    """The path of a file of weights: `source` itself, or one of `names` in that folder or hub repository."""
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))       # links are kept, whose names count
    for file in [path / name for name in names] if path.is_dir() else [path]:
        if file.is_file():
            return file
    if re.fullmatch(HUB_NAME, str(source)) and not path.exists():
        # float16 is half the download, and finer than the bfloat16 that it is used in
        return hub_file(str(source), sorted(names, key=lambda name: ".fp16.safetensors" not in name))
    raise Fail(f"{argument} {source}: no file, folder with {names[0]} or Hugging Face repository; pass one")

# ---- Stable Diffusion 1.5 ----------------------------------------------------------------------------------
def open_sd15(source, vae=None):
    """A Diffusers folder, CompVis file, Hugging Face repository or "toy" -> TensorFiles (U-Net, VAE).
    vae: another source for the VAE. Fails where a file or config declares another model than SD1.5."""
    unet = vae_file = TensorFile(find_file("--sd15", source, _names("unet/")))
    _check_model(unet, {"unet": "config.json", "scheduler": f"../{SCHEDULER}"})
    if vae is not None:
        vae_file = TensorFile(find_file("--vae", vae, [*_names("vae/"), *_names("")]))
    elif unet.path != Path(os.path.expanduser(source)):
        vae_file = TensorFile(find_file("--sd15", source, _names("vae/")))
    elif not any(name.startswith("first_stage_model.") for name in unet.names):
        raise Fail(f"{source} contains no VAE; pass --vae (stabilityai/sd-vae-ft-mse), or a whole SD1.5 file")
    _check_model(vae_file, {"vae": "config.json"})
    return _part(unet, "model.diffusion_model."), _part(vae_file, "first_stage_model.")

def _names(folder):
    return [f"{folder}diffusion_pytorch_model{kind}.{suffix}" for suffix in ("safetensors", "bin")
            for kind in ("", ".fp16", ".non_ema")]

def load_unet(file, device="cpu", dtype=torch.float32):
    """The U-Net of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"       # (width, context)
    return load(lambda: UNet(*_geometry(file, "down_blocks"), file.shapes[key][1]), file, device, dtype, HINT)

def load_vae(file, device="cpu", dtype=torch.float32):
    """The VAE of a TensorFile from `open_sd15`, frozen, as wide and deep as its tensors are."""
    groups = int(file.header.get("norm_num_groups", 32))        # which only the toy's file declares
    return load(lambda: VAE(*_geometry(file, "encoder.down_blocks"), 4, groups), file, device, dtype, HINT)

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

def check_declared(path, found, computed):
    """Fail where a value of `found` in the file `path` is none of the key's values in `computed`."""
    def same(value, ours):
        if isinstance(value, list):
            ours = ours if isinstance(ours, list) else [ours] * len(value)
            return len(value) == len(ours) > 0 and all(map(same, value, ours))
        if isinstance(value, float) and isinstance(ours, (int, float)):
            return math.isclose(value, ours, rel_tol=1e-6)
        return value == ours or not (value or ours)         # null, false and 0 have one meaning
    for key, values in computed.items():
        if key in found and not any(same(found[key], value) for value in values):
            raise Fail(f"{path} declares {key} {found[key]!r}, and this program computes with {values[0]!r}; "
                       "pass another model")

def _check_model(file, configs):
    """Fail where a file, its .yaml or a Diffusers config {part: path} declares another model than SD1.5."""
    yaml = file.path.with_suffix(".yaml")
    text = yaml.read_text(errors="replace") if yaml.is_file() else ""
    check_declared(yaml, dict(re.findall(r"(parameterization)\W+(\w+)", text)), FACTS["file"])
    check_declared(file.path, file.header | dict.fromkeys(file.names, True), FACTS["file"])
    for part, name in configs.items():
        config = Path(os.path.normpath(file.path.parent / name))
        if file.path.name.startswith("diffusion_pytorch_model") and config.is_file():
            check_declared(config, FACTS["defaults"].get(part, {}) | read_json(config), FACTS[part])
    if "alphas_cumprod" in file.names:
        [(_, theirs)] = file.read(["alphas_cumprod"])
        rounding = {1: 0.3, 2: 0.01}.get(theirs.itemsize, 1e-4)
        if theirs.shape != (T,) or not torch.allclose(theirs.double(), alpha_bar(), rounding, atol=0):
            raise Fail(f"{file.path}: alphas_cumprod is not SD1.5's; pass a base such as {SD15}")

def _part(file, prefix):
    """The tensors under a prefix, or all where there is none, under Diffusers' names."""
    names = {}
    for name in [name for name in file.names if name.startswith(prefix)] or file.names:
        new = name.removeprefix(prefix)
        for pattern, ours in FACTS["names"].items():
            new = re.sub(pattern, ours, new)
        if not new.startswith(("loss.", "model_ema.")):         # which trainers leave in a VAE
            names[new] = name
    return file.renamed(names)

# ---- the Hugging Face hub ----------------------------------------------------------------------------------
HUB_NAME = r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b"      # owner/name, by the hub's rules

def hub_file(repository, candidates):
    """The first of the candidates in the hub's cache or, downloaded after the configs, in the repository."""
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
            announce(f"downloading {what} to {hub.constants.HF_HUB_CACHE}")
            path = Path(hub.hf_hub_download(repository, name))      # which resumes a broken one
    except Exception as problem:            # of the hub's client and the libraries beneath it
        remedy = ("the connection, HTTPS_PROXY and HF_HUB_OFFLINE, and that HF_HOME has space and may be "
                  "written to; or try again later")
        if getattr(getattr(problem, "response", None), "status_code", None) in (401, 403):
            remedy = f"request access on https://huggingface.co/{repository}, then run `hf auth login`"
        raise Fail(f"cannot get {candidates[0]} of {repository} ({first_line(problem)}). Check the name, "
                   f"{remedy}; or download it elsewhere and pass the local path") from None
    if not weights:
        raise Fail(f"{repository} has no {' or '.join(candidates[:2])}; check the name, or pass a local path")
    expected = SHA256.get(f"{repository}/{weights[0]}")
    if expected and file_sha256(path) != expected:
        path.resolve().unlink()
        raise Fail(f"{path} came with another sha256 than {expected[:12]}...; removed, try again")
    return path
