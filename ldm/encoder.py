"""Frozen networks that turn images into features: the pathology encoder, and FID's Inception."""
import hashlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from .app import Fail, all_gather, foreign_file, progress, read_json, shard
from .data import load_rgb, prefetch, resize_crop
from .weights import TensorFile, check_declared, find_file, load

class FeatureSpace:
    """A network with its preprocessing. Subclasses define kind, resize, `file`, `preprocess` and
    `load(device="cpu")` -> the frozen network in float32: (B, 3, size, size) -> (B, d)."""
    def fingerprint(self):
        """sha256 of all that features depend on."""
        return self.file.fingerprint()

    @torch.no_grad()
    def run(self, network, x):
        """Preprocessed images x (B, 3, size, size) -> features (B, d) in float32, on the CPU."""
        # convolutions in full float32 on a GPU too
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(x.to(next(network.parameters()).device)).float().cpu()

    def extract(self, images, device, batch=32):
        """Image files or PIL images of any size -> features (n, d), float64. Frees the network afterwards.
        Several processes share whole batches, so that their number does not change the features."""
        def read(image):
            return self.preprocess([image if isinstance(image, Image.Image) else load_rgb(image)])[0]
        network, features = self.load(device), []
        batches = shard([images[i:i + batch] for i in range(0, len(images), batch)])
        for batch in progress(prefetch(read, batches), "features", len(batches), leave=False):
            features.append(self.run(network, torch.stack(batch)).double().numpy())
        return np.concatenate(all_gather(features))

# ---- the pathology encoder ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """What turns a file of weights into an encoder, as its publisher's page gives it."""
    name: str                       # what --encoder calls it
    repository: str
    terms: str                      # a phrase for the adapter's header and the model card
    licence: str                    # its name on the Hugging Face hub
    model: str                      # timm's name of the architecture
    arguments: dict                 # of timm.create_model; width and depth of a ViT are those of the tensors
    source: str = ""                # reference for these values
    shape: tuple = ()               # (d_e, width, depth) of the published weights
    head_width: int = 64            # 0: width and depth are timm's
    size: int = 224
    interpolation: str = "BILINEAR"     # Pillow's, antialiased
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)
    resize: int = 0                 # of the shorter side, before the crop to `size`; 0: to `size`
    joined: bool = False            # e is the class token joined with the mean of the patch tokens

RECIPES = read_json(Path(__file__).with_name("encoders.json"))
for name, row in RECIPES.items():
    RECIPES[name] = Recipe(name, **{key: tuple(x) if isinstance(x, list) else x for key, x in row.items()})
UNI2H, TOY = RECIPES["uni2-h"], RECIPES["toy"]
UNI2H_DIGEST = "7e045138"       # pinned: an edited recipe must not read embeddings of the old one

class Encoder(FeatureSpace):
    """A pathology encoder: PIL RGB images -> embeddings e (B, d_e), d_e = `width`.
    UNI2-h is a ViT-H/14 with SwiGLU, 8 registers and 64-wide heads: 681,394,176 parameters, d_e = 1,536."""
    kind = "encoder"

    def __init__(self, file, recipe=UNI2H, source=""):
        """source: the argument that named the file. Fails where the recipe does not fit the tensors."""
        self.file, self.recipe, self.source, self.resize = file, recipe, source, str(recipe.size)
        self.preprocess = partial(preprocess, recipe=recipe)
        self.hint = f"It does not fit {recipe.repository}; --encoder names others"
        with foreign_file(file.path, "is no vision transformer with patch_embed and blocks", self.hint):
            blocks = {name.split(".")[1] for name in file.shapes if name.startswith("blocks.")}
            shape = (file.shapes["patch_embed.proj.weight"][0], len(blocks)) if recipe.head_width else ()
        self.load = partial(load, partial(build_encoder, *shape, recipe=recipe), file, hint=self.hint)
        with torch.device("meta"):
            e = self.load("meta")(torch.empty(1, 3, recipe.size, recipe.size))
        if e.ndim != 2:
            raise Fail(f"{file.path}: {[*e.shape[1:]]} numbers, no embedding; set global_pool in config.json")
        self.width = e.shape[1]
        if recipe.shape and recipe.shape[1:] != shape:      # another network of the same architecture
            self.recipe = replace(recipe, terms=f"{file.path.name}, an encoder of your own", licence="other")

    def fingerprint(self):
        """sha256 of weights and recipe; for UNI2-h and the toy of the weights alone, as in old adapters."""
        r, weights = self.recipe, self.file.fingerprint()
        how = (r.model, r.arguments, r.head_width, r.size, r.interpolation, r.mean, r.std,
               *filter(None, (r.resize, r.joined)))
        digest = hashlib.sha256(repr(how).encode()).hexdigest()[:8]
        both = hashlib.sha256(f"{weights} {digest}".encode()).hexdigest()
        return weights if digest == UNI2H_DIGEST else both

    def embed(self, network, images):
        """PIL RGB images -> embeddings e (B, d_e), float32, on the CPU. network: from `load`."""
        return self.run(network, self.preprocess(images))

def preprocess(images, recipe=UNI2H):
    """PIL RGB images of any size -> (B, 3, size, size), resized, cropped and normalised by the recipe."""
    how = recipe.size, Image.Resampling[recipe.interpolation], recipe.resize
    x = np.stack([np.asarray(resize_crop(image, *how)) for image in images])
    x = (x.astype(np.float32) / 255 - np.float32(recipe.mean)) / np.float32(recipe.std)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

def build_encoder(width=None, depth=None, recipe=UNI2H):
    """The network of a recipe, untrained. The timm call is the one on the publisher's page."""
    import timm             # slow to import, and only encoders need it
    arguments = dict(recipe.arguments)
    if isinstance(arguments.get("mlp_layer"), str):
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"].rpartition(".")[2])
    if width:
        arguments |= dict(embed_dim=width, depth=depth, num_heads=width // recipe.head_width)
    network = timm.create_model(recipe.model, **arguments)
    if recipe.joined:
        network.register_forward_hook(lambda network, _, tokens: torch.cat(
            [tokens[:, 0], tokens[:, network.num_prefix_tokens:].mean(1)], dim=-1))
    return network

def open_encoder(source=None, name=None):
    """A folder with weights, such a file, a Hugging Face repository or "toy" -> Encoder.
    name: of RECIPES (default: the one of that repository, else UNI2-h), whose repository is the default
    source; or "timm" or a source, for a model as the config.json of timm beside its weights gives it."""
    recipe = RECIPES.get((name or "").lower())
    if name not in (None, "timm") and not recipe:
        if "/" not in name and not Path(name).exists():
            raise Fail(f"--encoder {name} is none of {', '.join(RECIPES)}, and no folder or repository")
        source, name = source or name, "timm"
    recipe = recipe or next((r for r in RECIPES.values() if r.repository == source), UNI2H)
    source = str(source or recipe.repository)
    file = TensorFile(find_file("--uni2h", source, ("model.safetensors", "pytorch_model.bin")))
    path = file.path.parent / "config.json"
    config = read_json(path)
    with foreign_file(path, "is no config of timm that can be used", "name the encoder with --encoder"):
        if name == "timm":
            return Encoder(*from_timm(file, config, source), source)
        if "pretrained_cfg" in config:
            declared = dict(architecture=[recipe.model], mean=[list(recipe.mean)], std=[list(recipe.std)],
                            input_size=[[3, recipe.size, recipe.size]])
            if not recipe.repository.startswith("bioptimus/"):     # which publishes no way to resize
                declared["interpolation"] = [recipe.interpolation.lower()]
            check_declared(path, config | config["pretrained_cfg"], declared)
    return Encoder(file, recipe, source)

def from_timm(file, config, source):
    """A TensorFile and the config.json beside it -> the file without its classifier, and a Recipe."""
    how = config["pretrained_cfg"]
    arguments = {k: config[k] for k in ("global_pool",) if k in config} | config.get("model_args", {})
    size, mean, std = how["input_size"][1], how["mean"], how["std"]
    crop = 0.875 if how.get("crop_pct") is None else how["crop_pct"]            # timm's default
    ranges = all(0 <= x <= 1 for x in mean) and all(0 < x <= 1 for x in std) and 0.1 <= crop <= 1
    if ([how["input_size"], how.get("crop_mode", "center"), len(mean), len(std)]
            != [[3, size, size], "center", 3, 3] or not ranges):
        raise ValueError(f"not usable: among input_size, crop_mode, crop_pct, mean and std of {how}")
    terms, filter = f"{Path(source).name} (look up its terms)", Image.Resampling[how["interpolation"].upper()]
    recipe = Recipe("timm", source, terms, licence="other", model=config["architecture"],
                    arguments=arguments | dict(num_classes=0), head_width=0, size=size,
                    interpolation=filter.name, mean=tuple(mean), std=tuple(std), resize=int(size / crop))
    heads = how.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    return file.renamed({name: name for name in file.names if not name.startswith(prefixes)}), recipe

# ---- Inception of 2015-12-05, the network of FID and KID ---------------------------------------------------
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
SIDE = 299

class Inception(FeatureSpace):
    """Images -> the 2,048 features "pool3" of TensorFlow's graph. resize: whose resizer, see RESIZERS.
    path: pytorch-fid's weights, .pth or .safetensors (default: torch.hub's cache, else a download)."""
    kind, hint = "inception", "pass pytorch-fid's Inception weights"

    def __init__(self, path=None, resize="pytorch-fid"):
        file, self.resize = TensorFile(path or _download_inception()), resize
        used = [name for name in file.names if not name.startswith("fc.") and "num_batches" not in name]
        self.file = file.renamed(dict(zip(used, used)))
        load(build_inception, self.file, "meta", hint=self.hint)      # names and shapes are checked at once

    def preprocess(self, images):
        """PIL RGB images of any size -> (B, 3, 299, 299) in [-1, 1]."""
        return torch.stack([RESIZERS[self.resize](image) for image in images])

    def load(self, device="cpu"):
        """The frozen network, batch norms folded into the convolutions: (B, 3, 299, 299) -> (B, 2048)."""
        network = load(build_inception, self.file, device, hint=self.hint)
        for layer in network.modules():
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn), layer.bn.act
        return network.to(memory_format=torch.channels_last)

def build_inception():
    """timm's InceptionV3 with pytorch-fid's three differences in pooling; the tensor names are the same."""
    from timm.models.inception_v3 import InceptionA, InceptionC, InceptionE, InceptionV3
    network = InceptionV3(num_classes=0)
    average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name, m in network.named_modules():
        if isinstance(m, (InceptionA, InceptionC, InceptionE)):
            _exchange_pool(m, maximum if name == "Mixed_7c" else average)
        elif isinstance(m, nn.BatchNorm2d):
            m.num_batches_tracked, m.track_running_stats = None, False      # the file need not have a counter
    return network

def _exchange_pool(block, pool):
    """Feed `branch_pool` with pool(x) in place of timm's own average of the block's input x."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda *_: pool(inputs.pop()))

def cached_inception():
    """Where torch.hub, and so pytorch-fid, keeps Inception's weights."""
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])

def _download_inception():
    path = cached_inception()
    if not path.is_file():
        print(f"downloading {INCEPTION_URL} (96 MB) to {path}", file=sys.stderr)
        with foreign_file(path, "cannot be downloaded", "pass it, from elsewhere, with --inception FILE"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), path.stem[-8:], sys.stderr.isatty())
    return path

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

# PIL RGB -> (3, 299, 299) in [-1, 1]. The choice moves the FID, so results name it.
RESIZERS = {"pytorch-fid": resize_pytorch_fid, "clean": resize_clean, "tf1": resize_tf1}
