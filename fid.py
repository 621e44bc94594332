#!/usr/bin/env python3
"""FID and KID between folders of images, or saved statistics of them.

    python fid.py real/ fake/                           # prints FID as pytorch-fid does, and KID
    python fid.py real/ fake1/ fake2/ --per-class       # and KID for every subfolder that both have (the paper's Table 8)
    python fid.py real/ --save real.npz                 # statistics for later; pytorch-fid reads them too

The number depends on the resizer: --resize pytorch-fid, clean (clean-fid) or tf1 (torch-fidelity, torchmetrics).
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ldm.app import (
    RANK0,
    Fail,
    Parser,
    all_gather,
    atomic_write,
    broadcast,
    check_same,
    first_line,
    join_processes,
    number,
    pick_device,
    progress,
    rank0_first,
    run_program,
    save_text,
    shard,
)
from ldm.data import ahead, list_images, load_rgb
from ldm.runs import find, settings_of
from ldm.weights import TensorFile, load
from projector import load_encoder, open_encoder, preprocess

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HINT = "pass pytorch-fid's Inception weights"
SIDE = 299


# ---- the network: InceptionV3 of 2015-12-05, up to its last pooling --------------------------------------------------

class Inception(nn.Module):
    """Images (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), "pool3" of the TensorFlow graph.

    Tensor names are torchvision's. It differs from torchvision's network in that average pools leave their padding out,
    and that the last block has a max pool in the average pool's place.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, "max/2", [
            [dict(branch3x3=(384, 3, 2))],
            [dict(branch3x3dbl_1=(64, 1)), dict(branch3x3dbl_2=(96, 3)), dict(branch3x3dbl_3=(96, 3, 2))]])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_c(width) for width in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, "max/2", [
            [dict(branch3x3_1=(192, 1)), dict(branch3x3_2=(320, 3, 2))],
            [dict(branch7x7x3_1=(192, 1)), dict(branch7x7x3_2=(192, (1, 7))), dict(branch7x7x3_3=(192, (7, 1))),
             dict(branch7x7x3_4=(192, 3, 2))]])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))       # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))       # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))    # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                      # (B, 2048, 8, 8)
        return x.mean((2, 3))


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics. nn.BatchNorm2d insists on a counter that this file does not have."""

    def __init__(self, c, eps):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU. Padding keeps the size unless given."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def fold_batch_norms(network):
    """Multiply each normalisation into the convolution before it: the same to rounding, and a seventh less work on the CPU."""
    for m in network.modules():
        if isinstance(m, Conv):
            scale = m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt()
            m.conv.weight = nn.Parameter(m.conv.weight * scale[:, None, None, None], requires_grad=False)
            m.conv.bias = nn.Parameter(m.bn.bias - m.bn.running_mean * scale, requires_grad=False)
            m.bn = nn.Identity()
    return network


class Mixed(nn.Module):
    """Chains of convolutions side by side, and a pool; their outputs are concatenated.

    chains: each a list of links; a link is {name: (width, kernel[, stride])}, and several convolutions in one link all
    read its input. A stride of 2 comes without padding. pool: "average", "max", or "max/2", which halves the size.
    """

    def __init__(self, c_in, pool, chains, pool_width=None):
        super().__init__()
        self.pool, self.chains = pool, [[list(link) for link in chain] for chain in chains]
        for chain in chains:
            c = c_in
            for link in chain:
                for name, (width, kernel, *stride) in link.items():
                    self.add_module(name, Conv(c, width, kernel, 2, 0) if stride else Conv(c, width, kernel))
                c = width
        if pool_width:
            self.branch_pool = Conv(c_in, pool_width, 1)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            h = x
            for link in chain:
                h = [getattr(self, name)(h) for name in link]
                h = h[0] if len(h) == 1 else torch.cat(h, dim=1)
            outputs.append(h)
        if self.pool == "max/2":
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], dim=1)
        pooled = (F.max_pool2d(x, 3, 1, padding=1) if self.pool == "max" else
                  F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False))
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


def block_a(c_in, pool_width):
    return Mixed(c_in, "average", [
        [dict(branch1x1=(64, 1))],
        [dict(branch5x5_1=(48, 1)), dict(branch5x5_2=(64, 5))],
        [dict(branch3x3dbl_1=(64, 1)), dict(branch3x3dbl_2=(96, 3)), dict(branch3x3dbl_3=(96, 3))]], pool_width)


def block_c(c):
    return Mixed(768, "average", [
        [dict(branch1x1=(192, 1))],
        [dict(branch7x7_1=(c, 1)), dict(branch7x7_2=(c, (1, 7))), dict(branch7x7_3=(192, (7, 1)))],
        [dict(branch7x7dbl_1=(c, 1)), dict(branch7x7dbl_2=(c, (7, 1))), dict(branch7x7dbl_3=(c, (1, 7))),
         dict(branch7x7dbl_4=(c, (7, 1))), dict(branch7x7dbl_5=(192, (1, 7)))]], 192)


def block_e(c_in, pool):
    return Mixed(c_in, pool, [
        [dict(branch1x1=(320, 1))],
        [dict(branch3x3_1=(384, 1)), dict(branch3x3_2a=(384, (1, 3)), branch3x3_2b=(384, (3, 1)))],
        [dict(branch3x3dbl_1=(448, 1)), dict(branch3x3dbl_2=(384, 3)),
         dict(branch3x3dbl_3a=(384, (1, 3)), branch3x3dbl_3b=(384, (3, 1)))]], 192)


def cached_inception():
    """Where torch.hub, and so pytorch-fid, keeps the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]


def inception_available(path=None):
    """Whether the weights need no download: a file is named, or they are in torch.hub's cache."""
    return path is not None or cached_inception().is_file()


def open_inception(path=None):
    """The weights as pytorch-fid names them (.pth or .safetensors): from `path`, torch.hub's cache, or the release page."""
    if path is None:
        path = cached_inception()
        if not path.is_file():
            print(f"downloading {URL} (96 MB) to {path}", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=path.stem[-8:], progress=sys.stderr.isatty())
            except (OSError, RuntimeError) as problem:      # URLError is an OSError; a wrong hash is a RuntimeError
                raise Fail(f"cannot get the Inception weights ({first_line(problem)}); download that file elsewhere and pass "
                           "--inception FILE") from None
    return TensorFile(path, lambda name: None if name.startswith("fc.") or name.endswith("num_batches_tracked") else name)


# ---- resizers: PIL RGB -> (3, 299, 299) in [-1, 1] -------------------------------------------------------------------

def resize_pytorch_fid(image):
    """Bilinear without antialiasing, as pytorch-fid does inside its network."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def resize_clean(image):
    """PIL's antialiased bicubic on float channels, as clean-fid does."""
    channels = [Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                for c in np.asarray(image, dtype=np.float32).transpose(2, 0, 1)]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128


def resize_tf1(image):
    """TensorFlow 1's bilinear, whose samples sit at the pixels' corners, as torch-fidelity and torchmetrics do."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    for dim in (1, 2):
        n = x.shape[dim]
        at = torch.arange(SIDE, dtype=torch.float32) * (n / SIDE)
        low = at.long()
        weight = (at - low).view(-1, *[1] * (2 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return (x - 128) / 128


RESIZERS = {"pytorch-fid": resize_pytorch_fid, "clean": resize_clean, "tf1": resize_tf1}


# ---- the distances, as functions of features (n, d) or of their mean and covariance ------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), the definition, by scipy's sqrtm. Slow, and inexact for singular Σ."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(root).all():             # singular: pytorch-fid's remedy
        offset = 1e-6 * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def frechet_distance_of_features(x1, x2):
    """The same number from features x1 (n1, d), x2 (n2, d), for fewer images than features, where Σ is singular.

    With centred X₁, X₂ scaled so that Σ = XᵀX: tr (Σ₁Σ₂)^½ is the nuclear norm of X₁X₂ᵀ, an n1 x n2 matrix. Exact, and
    hundreds of times faster than a square root of d x d.
    """
    x1, x2 = np.asarray(x1, np.float64), np.asarray(x2, np.float64)
    mu1, mu2 = x1.mean(0), x2.mean(0)
    x1, x2 = (x1 - mu1) / np.sqrt(len(x1) - 1), (x2 - mu2) / np.sqrt(len(x2) - 1)
    nuclear = scipy.linalg.svdvals(x1 @ x2.T).sum()
    return float(np.square(mu1 - mu2).sum() + np.square(x1).sum() + np.square(x2).sum() - 2 * nuclear)


def squared_mmd(x, y):
    """Unbiased MMD² of x (n, d) and y (m, d) under the kernel (x·y/d + 1)³."""
    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3
    n, m, kxx, kyy = len(x), len(y), kernel(x, x), kernel(y, y)
    return ((kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
            - 2 * kernel(x, y).mean())


def kid(x, y, subsets=100, size=1000, seed=2020):
    """KID of features x (n, d), y (m, d): mean and std of MMD² over random subsets -> (mean, std, size used).

    The subsets have min(size, n, m) images, drawn without replacement in torch-fidelity's order (same seed, same subsets).
    Where that is all of both sets there is one subset only, hence std 0.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = min(size, len(x), len(y))
    if size == len(x) == len(y):
        return float(squared_mmd(x, y)), 0.0, size
    rng = np.random.RandomState(seed)
    values = [squared_mmd(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
              for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values)), size


# ---- sets of images ------------------------------------------------------------------------------------------------

@dataclass
class ImageSet:
    """What is known of a set of n images: mean (d,), covariance (d, d); and, but for foreign statistics, the features."""
    n: int | None
    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None      # (n, d)
    names: np.ndarray | None = None         # (n,) paths within the folder

    @classmethod
    def of_features(cls, features, names):
        return cls(len(features), features.mean(0), np.cov(features, rowvar=False), features, np.array(names))

    def of_class(self, name):
        mine = np.array([n.startswith(name + "/") for n in self.names])
        return self.features[mine]

    def classes(self):
        return {n.split("/")[0] for n in self.names if "/" in n} if self.names is not None else set()


def images_of(folder):
    """The files of a folder of two images or more."""
    if not folder.is_dir():
        raise Fail(f"{folder}: no such folder (or .npz file of statistics)")
    files = list_images(folder)
    if len(files) < 2:
        raise Fail(f"{folder} holds fewer than two images, and two at least are needed")
    return files


def read_set(path, extract):
    """A folder of images, or an .npz of statistics made with the Extractor's weights and resizer, -> ImageSet."""
    path = Path(path)
    if path.suffix == ".npz":
        return load_set(path, extract.resize, extract.weights)
    files = images_of(path)
    return ImageSet.of_features(extract(files), [f.relative_to(path).as_posix() for f in files])


def save_set(path, images, resize, weights):
    """Write statistics as pytorch-fid reads them (mu, sigma), with the features and how they came about."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=images.mu, sigma=images.sigma, n=images.n, features=images.features.astype(np.float32),
                 names=images.names, resize=resize, weights=weights)


def load_set(path, resize, weights):
    try:
        with np.load(path, allow_pickle=False) as f:
            data = {key: f[key] for key in ("mu", "sigma", "n", "features", "names", "resize", "weights") if key in f}
        data |= {key: data[key].astype(np.float64) for key in ("mu", "sigma", "features") if key in data}
        if not all((np.abs(data[key]) < 1e12).all() for key in ("mu", "sigma", "features") if key in data):
            raise ValueError("a number in it is not finite, or larger than any feature")
        if data["mu"].ndim != 1 or data["sigma"].shape != 2 * data["mu"].shape:
            raise ValueError(f"mu has the shape {data['mu'].shape}, sigma {data['sigma'].shape}")
        n = int(data["n"]) if "n" in data else None
        if n is not None and n < 2:
            raise ValueError(f"they are of {n} images, and at least 2 are needed")
        features = data["features"] if n and "features" in data and "names" in data else None
        if features is not None and (features.shape != (n, len(data["mu"])) or data["names"].shape != (n,)):
            raise ValueError(f"features have the shape {features.shape}, n is {n}")
        if features is not None and data["names"].dtype.kind != "U":
            raise ValueError("its names are no text")
    except FileNotFoundError:
        raise Fail(f"{path}: no such file") from None
    except Exception as problem:            # whatever numpy, zipfile and zlib make of foreign bytes
        raise Fail(f"{path} holds no statistics of features ({first_line(problem)}); make them with --save") from None
    for key, mine in (("resize", resize), ("weights", weights)):
        if key in data and str(data[key]) != mine:
            raise Fail(f"{path} was made with {key} {data[key]}, not {mine}: make it again with --save")
    return ImageSet(n, data["mu"], data["sigma"], features, None if features is None else data["names"])


@torch.no_grad()
def extract_features(images, network, resizer, device, batch):
    """Image files or PIL images -> features (n, d) in float64; each is resized on its own, so that sizes may differ.

    The next batch is decoded and resized while one is in the network. Several processes share the images.
    """
    share, features = shard(images), []
    with ThreadPoolExecutor() as pool, progress(total=len(share), desc="features", unit="image", leave=False) as bar:
        for part in ahead(pool, lambda it: resizer(it if isinstance(it, Image.Image) else load_rgb(it)),
                          [share[i:i + batch] for i in range(0, len(share), batch)]):
            x = network(torch.stack(part).to(device).contiguous(memory_format=torch.channels_last))
            features.extend(x.cpu().double().numpy())       # in this order: Apple's GPUs have no float64
            bar.update(len(part))
    return np.stack(all_gather(features))


class Extractor:
    """A feature space: extractor(images) loads its network, extracts and lets go of it. `weights` is the network's hash."""

    def __init__(self, kind, source, device, resize="pytorch-fid", batch=32):
        """kind: "inception", source a file or None for torch.hub's cache; or "encoder", source as from `open_encoder`."""
        self.kind, self.device, self.batch = kind, device, batch
        if kind == "encoder":
            self.file, self.resize, self.resizer = source, "224", lambda image: preprocess([image])[0]
        else:
            self.file, self.resize, self.resizer = open_inception(source), resize, RESIZERS[resize]
            load(Inception, self.file, "meta", hint=HINT)
        self.weights = self.file.fingerprint()[:8]

    def __call__(self, images):
        if self.kind == "encoder":
            network = load_encoder(self.file, self.device)
        else:
            network = fold_batch_norms(load(Inception, self.file, self.device, hint=HINT)).to(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):        # convolutions in full float32, as on the CPU
            return extract_features(images, network, self.resizer, self.device, self.batch)


def compare(real, fake, subset=1000):
    """Two ImageSets -> {"fid", "n_real", "n_fake"} and, where the features are known, KID's mean, std and subset size."""
    if real.mu.shape != fake.mu.shape:
        raise Fail(f"one has {len(real.mu)} features, the other {len(fake.mu)}: they come from different networks")
    both = real.features is not None and fake.features is not None
    if both and min(real.n, fake.n) < len(real.mu):
        distance = frechet_distance_of_features(real.features, fake.features)
    else:
        distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    result = dict(fid=distance, n_real=real.n, n_fake=fake.n)
    if both:
        result |= zip(("kid", "kid_std", "kid_subset"), kid(real.features, fake.features, size=subset))
    return result


def compare_classes(real, fake, subset=1000):
    """KID for each class, that is each subfolder, of which both sets have two images -> {class: {...}} (the paper's Table 8)."""
    result = {}
    for name in sorted(real.classes() & fake.classes()):
        x, y = real.of_class(name), fake.of_class(name)
        if min(len(x), len(y)) > 1:
            mean, std, size = kid(x, y, size=subset)
            result[name] = dict(n_real=len(x), n_fake=len(y), kid=mean, kid_std=std, kid_subset=size)
    return result


def main():
    parser = Parser(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of images (at any depth), or statistics in an .npz file")
    parser.add_argument("fake", metavar="FAKE", nargs="*", help="folders or .npz files to compare with it")
    parser.add_argument("--per-class", action="store_true", help="KID x 1000 for every subfolder that both have")
    parser.add_argument("--resize", choices=RESIZERS, default="pytorch-fid", help="whose number to reproduce")
    parser.add_argument("--kid-subset", type=number(int, 2), default=1000, metavar="N",
                        help="images per subset of KID, at most those that there are")
    parser.add_argument("--inception", metavar="FILE",
                        help="pytorch-fid's weights, .pth or .safetensors (default: torch.hub's cache)")
    parser.add_argument("--features", choices=("inception", "encoder"),
                        help="encoder: of the run that REAL lies in (default: inception; of a toy run without weights, encoder)")
    parser.add_argument("--save", metavar="FILE", help="write the statistics of REAL to this .npz file")
    parser.add_argument("--json", metavar="FILE",
                        help="write the results to this .json file; - prints them, and all else to stderr")
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images at a time")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    device = pick_device(args.device)
    join_processes(device)
    if not args.fake and not args.save:
        raise Fail("pass a second folder to compare with, or --save FILE.npz")
    if args.save and Path(args.save).suffix != ".npz":
        raise Fail(f"--save {args.save}: the name must end in .npz")
    args.real, *args.fake = find([args.real, *args.fake])
    if args.save and args.real.suffix == ".npz":
        raise Fail(f"--save: {args.real} is statistics already")
    if args.json and not args.fake:
        raise Fail("--json: nothing is compared; pass a second folder")
    if args.json not in (None, "-") and Path(args.json).suffix != ".json":
        raise Fail(f"--json {args.json}: the name must end in .json, or be -")
    say = partial(print, file=sys.stderr if args.json == "-" and RANK0 else sys.stdout)
    # before any weights are asked for
    numbers = [len(images_of(path)) for path in (args.real, *args.fake) if path.suffix != ".npz" or not path.is_file()]
    encoder = encoder_of(args.real)
    if args.features is None:
        args.features = broadcast("encoder" if encoder == "toy" and not inception_available(args.inception) else "inception")
    if args.features == "encoder":
        if encoder is None:
            raise Fail(f"--features encoder: {args.real} lies in no run of train.py, so that its encoder is not known")
        if args.resize != "pytorch-fid":
            raise Fail(f"--resize {args.resize} is for Inception's features; the encoder has a resizer of its own")
    with rank0_first():          # which downloads what is missing
        source = open_encoder(encoder) if args.features == "encoder" else args.inception
        extract = Extractor(args.features, source, device, args.resize, args.batch)
    resize, weights = extract.resize, extract.weights
    check_same("weights or images", [weights, numbers])
    real = read_set(args.real, extract)
    if args.save and RANK0:
        save_set(args.save, real, resize, weights)
    results = []
    for path in args.fake:
        fake = read_set(path, extract)
        if not RANK0:          # has given its share of the features
            continue
        result = dict(real=str(args.real), fake=str(path), features=args.features, resize=resize, weights=weights)
        result |= compare(real, fake, args.kid_subset)
        say(f"FID {result['fid']:.4f}   {args.real} | {path}   n {real.n or '?'} | {fake.n or '?'}, "
            + (f"resize {resize}, Inception {weights}" if args.features == "inception" else
               f"features of the encoder {weights}, not Inception's: comparable with nothing else"))
        if "kid" in result:
            say(f"KID x 1000 {describe_kid(result)}")
        else:
            say("KID needs features: one of these .npz files was not made by --save")
        if args.per_class:
            result["classes"] = compare_classes(real, fake, args.kid_subset)
            if not result["classes"]:
                say("  no subfolders of the same names with two images or more in both: nothing to compare by class")
            for name, row in result["classes"].items():
                say(f"  {name:<24}{row['n_real']:>6} | {row['n_fake']:<6} KID x 1000 {describe_kid(row)}")
        results.append(result)
        if args.json not in (None, "-"):        # after each, so that a later failure does not cost the earlier ones
            save_text(args.json, json.dumps(results, indent=1) + "\n")
    if args.json == "-":
        print(json.dumps(results))


def encoder_of(path):
    """The encoder (--uni2h) of the run of train.py that a folder lies in, or None."""
    for parent in Path(path).resolve().parents:
        if (parent / "adapter.safetensors").is_file() and (settings := settings_of(parent)):
            return settings.get("uni2h")
    return None


def describe_kid(row):
    if row["kid_std"] == 0:
        return f"{1000 * row['kid']:.3f} (one subset, all {row['kid_subset']})"
    return f"{1000 * row['kid']:.3f} ± {1000 * row['kid_std']:.3f} (100 subsets of {row['kid_subset']})"


if __name__ == "__main__":
    run_program(main)
