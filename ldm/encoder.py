"""Frozen networks that turn images into features: the pathology encoder, and FID's Inception."""
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .app import Fail, all_gather, first_line, foreign_file, progress, shard
from .data import load_rgb, prefetch, resize_crop
from .weights import BUILT_IN, TensorFile, hub_file, is_hub_name, load

class FeatureSpace:
    """A network with its preprocessing. Subclasses define kind, resize, `file`, `preprocess` and `load`."""

    def fingerprint(self):
        """sha256 of all that features depend on."""
        return self.file.fingerprint()

    @property
    def short_hash(self):
        """The first eight digits of the fingerprint, for messages and file headers."""
        return self.fingerprint()[:8]

    @torch.no_grad()
    def extract(self, images, device, batch=32):
        """Image files or PIL images of any size -> features (n, d), float64.

        Loads the network and frees it afterwards. The next batch is decoded while one is in the network.
        Several processes share whole batches, so that their number does not change the features.
        """
        def read(image):
            return self.preprocess([image if isinstance(image, Image.Image) else load_rgb(image)])[0]

        network, features = self.load(device), []
        batches = shard([images[i:i + batch] for i in range(0, len(images), batch)])
        # convolutions in full float32, as on the CPU
        with ThreadPoolExecutor() as pool, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in progress(prefetch(pool, read, batches), "features", len(batches), leave=False):
                x = network(torch.stack(batch).to(device))
                features.append(x.cpu().double().numpy())       # in this order: Apple's GPUs have no float64
        return np.concatenate(all_gather(features))

# ---- the pathology encoder ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """What turns a file of weights into an encoder, as its publisher's page gives it."""
    repository: str
    terms: str                      # a phrase for the adapter's header and the model card
    licence: str                    # its name on the Hugging Face hub
    model: str                      # timm's name of the architecture
    arguments: dict                 # of timm.create_model; width and depth are those of the tensors
    head_width: int = 64
    size: int = 224
    interpolation: str = "BILINEAR"     # Pillow's, antialiased
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)
    files: tuple = field(default=("pytorch_model.bin", "model.safetensors"), repr=False)
    access: str = field(default="", repr=False)     # advice where a download is refused

    def digest(self):
        """Eight digits that change with architecture or preprocessing."""
        how = (self.model, self.arguments, self.head_width, self.size, self.interpolation, self.mean,
               self.std)
        return hashlib.sha256(repr(how).encode()).hexdigest()[:8]

# Source: https://huggingface.co/MahmoodLab/UNI2-h. For a model built locally timm's own
# `resolve_data_config` gives mean 0.5 and bicubic.
UNI2H = Recipe(
    repository="MahmoodLab/UNI2-h", licence="cc-by-nc-nd-4.0",
    terms="UNI2-h (CC BY-NC-ND 4.0, gated: non-commercial research only)",
    model="vit_giant_patch14_224",
    arguments=dict(img_size=224, patch_size=14, init_values=1e-5, mlp_ratio=2.66667 * 2, num_classes=0,
                   no_embed_class=True, mlp_layer="SwiGLUPacked", act_layer="silu", reg_tokens=8,
                   dynamic_img_size=True, global_pool="token"),
    access="UNI2-h is gated: request access on https://huggingface.co/MahmoodLab/UNI2-h with an "
           "institutional e-mail address, then run `hf auth login` or set HF_TOKEN; or pass --uni2h")
UNI2H_DIGEST = "7e045138"       # pinned: an edited recipe must not read embeddings of the old one
TOY = replace(UNI2H, repository="toy", terms="the toy encoder (MIT)", licence="mit", access="")
RECIPES = {recipe.repository: recipe for recipe in (UNI2H, TOY)}

class Encoder(FeatureSpace):
    """A pathology encoder: PIL RGB images -> embeddings e (B, d_e). Width and depth are those of its tensors.

    UNI2-h is a ViT-H/14 with SwiGLU, 8 registers and 64-wide heads: 681,394,176 parameters, d_e = 1,536.
    """
    kind = "encoder"

    def __init__(self, file, recipe=UNI2H):
        self.file, self.recipe, self.resize = file, recipe, str(recipe.size)
        self.preprocess = partial(preprocess, recipe=recipe)
        self.hint = f"It does not fit {recipe.repository}"
        with foreign_file(file.path, "is no vision transformer with patch_embed and blocks", self.hint):
            self.width = file.shapes["patch_embed.proj.weight"][0]
            self.depth = len({name.split(".")[1] for name in file.shapes if name.startswith("blocks.")})

    def fingerprint(self):
        """sha256 of weights and recipe; for UNI2-h and the toy of the weights alone, as in old adapters."""
        weights = self.file.fingerprint()
        if self.recipe in (UNI2H, TOY) and self.recipe.digest() == UNI2H_DIGEST:
            return weights
        return hashlib.sha256(f"{weights} {self.recipe}".encode()).hexdigest()

    def load(self, device="cpu"):
        """The frozen network in float32: (B, 3, size, size) -> (B, d_e)."""
        build = partial(build_encoder, self.width, self.depth, self.recipe)
        return load(build, self.file, device, hint=self.hint)

    @torch.no_grad()
    def embed(self, network, images):
        """PIL RGB images -> embeddings e (B, d_e), float32, on the CPU. network: from `load`."""
        x = self.preprocess(images).to(next(network.parameters()).device)
        return network(x).float().cpu()

def preprocess(images, recipe=UNI2H):
    """PIL RGB images of any size -> (B, 3, size, size), resized, cropped and normalised by the recipe."""
    filter = Image.Resampling[recipe.interpolation]
    x = np.stack([np.asarray(resize_crop(image, recipe.size, filter)) for image in images])
    x = (x.astype(np.float32) / 255 - np.float32(recipe.mean)) / np.float32(recipe.std)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

def build_encoder(width=1536, depth=24, recipe=UNI2H):
    """The network of a recipe, untrained. The timm call is the one on the publisher's page."""
    import timm             # slow to import, and only encoders need it
    arguments = dict(recipe.arguments)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    heads = width // recipe.head_width
    return timm.create_model(recipe.model, embed_dim=width, depth=depth, num_heads=heads, **arguments)

def open_encoder(source=UNI2H.repository):
    """A folder with weights, such a file, a Hugging Face repository or "toy" -> Encoder."""
    recipe = RECIPES.get(source, UNI2H)
    path = BUILT_IN.get(source, Path(os.path.expanduser(source)))
    if path.is_dir():
        names = [name for name in recipe.files if (path / name).is_file()]
        path = path / (names or recipe.files)[-1]       # TensorFile fails on one that does not exist
    elif not path.is_file():
        if not is_hub_name(source):
            raise Fail(f"--uni2h {source}: no such folder or file; pass UNI2-h's weights, or omit it for "
                       f"{UNI2H.repository} from the hub")
        path = hub_file(source, recipe.files, access=recipe.access if source == recipe.repository else "")
    return Encoder(TensorFile(path), recipe)

# ---- Inception of 2015-12-05, the network of FID and KID ---------------------------------------------------

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
SIDE = 299

class Inception(FeatureSpace):
    """Images -> the 2,048 features "pool3" of TensorFlow's graph. resize: whose resizer, see RESIZERS.

    path: pytorch-fid's weights, .pth or .safetensors (default: torch.hub's cache, else a download).
    """
    kind, hint = "inception", "pass pytorch-fid's Inception weights"

    def __init__(self, path=None, resize="pytorch-fid"):
        def rename(name):           # the classifier and the counters are not used
            return None if name.startswith("fc.") or name.endswith("num_batches_tracked") else name

        self.file, self.resize = TensorFile(path or _download_inception(), rename), resize
        load(build_inception, self.file, "meta", hint=self.hint)      # names and shapes are checked at once

    def preprocess(self, images):
        """PIL RGB images of any size -> (B, 3, 299, 299) in [-1, 1]."""
        return torch.stack([RESIZERS[self.resize](image) for image in images])

    def load(self, device="cpu"):
        """The frozen network, batch norms folded into the convolutions: (B, 3, 299, 299) -> (B, 2048)."""
        network = load(build_inception, self.file, device, hint=self.hint)
        for layer in network.modules():
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), layer.bn.act
        return network.to(memory_format=torch.channels_last)

def build_inception():
    """timm's InceptionV3 with pytorch-fid's three differences in pooling; the tensor names are the same."""
    from timm.models.inception_v3 import InceptionA, InceptionC, InceptionE, InceptionV3
    network = InceptionV3(num_classes=0)
    average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name, block in network.named_children():
        if isinstance(block, (InceptionA, InceptionC, InceptionE)):
            _exchange_pool(block, maximum if name == "Mixed_7c" else average)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.num_batches_tracked, m.track_running_stats = None, False      # the file need not have a counter
    return network

def _exchange_pool(block, pool):
    """Feed `branch_pool` with pool(x) in place of timm's own average of the block's input x."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda *_: pool(inputs.pop()))

def _cached_inception():
    """Where torch.hub, and so pytorch-fid, keeps the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]

def inception_available(path=None):
    """Whether Inception needs no download: a file is named, or torch.hub's cache has it."""
    return path is not None or _cached_inception().is_file()

def _download_inception():
    path = _cached_inception()
    if not path.is_file():
        print(f"downloading {INCEPTION_URL} (96 MB) to {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), path.stem[-8:], sys.stderr.isatty())
        except (OSError, RuntimeError) as problem:      # URLError is an OSError, a wrong hash a RuntimeError
            raise Fail(f"cannot get the Inception weights ({first_line(problem)}); download that file and "
                       "pass it with --inception FILE") from None
    return path

# Resizers: PIL RGB -> (3, 299, 299) in [-1, 1]. The choice moves the FID, so results name it.

def resize_pytorch_fid(image):
    """Bilinear without antialiasing, as pytorch-fid does inside its network."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1

def resize_clean(image):
    """PIL's antialiased bicubic on float channels, as clean-fid does."""
    bicubic = Image.Resampling.BICUBIC
    channels = [channel.convert("F").resize((SIDE, SIDE), bicubic) for channel in image.split()]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128

def resize_tf1(image):
    """TensorFlow 1's bilinear, sampled at the pixels' corners, as torch-fidelity and torchmetrics do."""
    def weights(n):                 # (299, n): row i interpolates at i·n/299
        at = (torch.arange(SIDE) * (n / SIDE)).clamp(max=n - 1)
        return (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0)

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (weights(image.height) @ x @ weights(image.width).T - 128) / 128

RESIZERS = {"pytorch-fid": resize_pytorch_fid, "clean": resize_clean, "tf1": resize_tf1}
