#!/usr/bin/env python3
"""FID and KID between folders of images, or saved statistics of them; and every other metric of the report.

    python fid.py real/ fake/                       # prints FID as pytorch-fid does, and KID
    python fid.py real/ fake1/ fake2/ --per-class   # and KID for every common subfolder (the paper's Table 8)
    python fid.py real/ --save real.npz             # statistics for later; pytorch-fid reads them too

The number depends on --resize: pytorch-fid, clean (clean-fid) or tf1 (torch-fidelity, torchmetrics).
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist

from ldm.data import list_images
from ldm.encoder import RESIZERS, Inception, inception_available, open_encoder
from ldm.app import (RANK0, Fail, Parser, atomic_write, check_same, foreign_file, join_processes, number,
                     pick_device, rank0_first, run_program, save_text)
from ldm.runs import find, read_settings

# ---- metrics of two sets, of features x (n, d) and y (m, d) ------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), by definition, with scipy's sqrtm. Inexact for singular Σ."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(root).all():             # singular: pytorch-fid's remedy
        offset = 1e-6 * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)

def frechet_distance_of_features(x, y):
    """The same number from features, for fewer images than features, where Σ is singular.

    With X and Y centred and scaled so that Σ = XᵀX, tr (Σ₁Σ₂)^½ is the nuclear norm of X Yᵀ, an n x m matrix.
    Exact, and hundreds of times faster than a square root of d x d.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mu_x, mu_y = x.mean(0), y.mean(0)
    x, y = (x - mu_x) / np.sqrt(len(x) - 1), (y - mu_y) / np.sqrt(len(y) - 1)
    nuclear = scipy.linalg.svdvals(x @ y.T).sum()
    return float(np.square(mu_x - mu_y).sum() + np.square(x).sum() + np.square(y).sum() - 2 * nuclear)

def squared_mmd(x, y):
    """Unbiased MMD² under the kernel (x·y/d + 1)³."""
    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3
    n, m, kxx, kyy = len(x), len(y), kernel(x, x), kernel(y, y)
    return ((kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
            - 2 * kernel(x, y).mean())

def kid(x, y, subset=1000, subsets=100, seed=2020):
    """KID -> {"kid", "kid_std", "kid_subset"}: mean and std of MMD² over random subsets, and their size.

    The subsets have min(subset, n, m) images, drawn without replacement in torch-fidelity's order (same seed,
    same subsets). Where that is all of both sets there is only one subset, hence std 0.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = min(subset, len(x), len(y))
    if size == len(x) == len(y):
        return dict(kid=float(squared_mmd(x, y)), kid_std=0.0, kid_subset=size)
    rng = np.random.RandomState(seed)
    draws = [[f[rng.choice(len(f), size, replace=False)] for f in (x, y)] for _ in range(subsets)]
    values = [squared_mmd(*pair) for pair in draws]
    return dict(kid=float(np.mean(values)), kid_std=float(np.std(values)), kid_subset=size)

# (x, y, subset) -> {column: value}. A metric added here appears in fid.py's output and in Tables 7 and 8.
METRICS = (kid,)

def all_metrics(x, y, subset):
    """The columns of all METRICS."""
    return {key: value for metric in METRICS for key, value in metric(x, y, subset).items()}

def bootstrap_interval(distance, x, y, repeats=200, level=0.95, seed=0):
    """Bootstrap of distance(x, y), where row i of y was made from row i of x -> (low, high).

    Pairs are resampled: separately, they would spread more than they do. (Patches of one case are no
    independent choice: the interval is too narrow for that.) A Fréchet distance has the bias of its n.
    Resampled sets, which repeat images, have it twice: only their spread is used, around the estimate.
    """
    rng, estimate = np.random.default_rng(seed), distance(x, y)
    values = [distance(x[i], y[i]) for i in rng.integers(len(x), size=(repeats, len(x)))]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - np.mean(values) + estimate
    return float(low), float(high)

# ---- metrics of single samples -----------------------------------------------------------------------------

def fidelity(samples, references):
    """Mean cosine of row i of samples (n, d) with row i of references, its own; with all others."""
    c = 1 - cdist(samples, references, "cosine")
    n, own = len(c), np.trace(c)
    return float(own / n), float((c.sum() - own) / (n * (n - 1)))

def nearest_centroid(train, labels, x):
    """The label of the class whose mean embedding has the largest cosine with each row of x -> (n,)."""
    names = np.unique(labels)
    centroids = np.stack([train[labels == name].mean(0) for name in names])
    return names[cdist(x, centroids, "cosine").argmin(1)]

def nearest(x, train):
    """The Euclidean nearest row of train (m, d) to each row of x (n, d) -> (index, distance), both (n,)."""
    distance = cdist(x, train)
    return distance.argmin(1), distance.min(1)

def fit_linear(x, labels, penalty=1.0):
    """Multinomial logistic regression on standardised features x (n, d) -> a function, features to labels.

    Minimises the mean cross-entropy plus penalty/(2n) |W|², classes weighted equally, by torch's L-BFGS.
    """
    names, y = np.unique(labels, return_inverse=True)
    mu, spread = x.mean(0), x.std(0) + 1e-6
    z, y = torch.from_numpy((x - mu) / spread), torch.from_numpy(y)
    W = torch.zeros(z.shape[1] + 1, len(names), dtype=z.dtype, requires_grad=True)      # biases: the last row
    optimizer = torch.optim.LBFGS([W], max_iter=1000, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.cross_entropy(z @ W[:-1] + W[-1], y, weight=1 / y.bincount().double())
        value = entropy + penalty / (2 * len(z)) * W[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    W = W.detach().numpy()
    return lambda f: names[((f - mu) / spread @ W[:-1] + W[-1]).argmax(1)]

def recalls(labels, guesses):
    """{class: share of its images that is recognised}; their mean is the balanced accuracy."""
    return {str(name): float((guesses[labels == name] == name).mean()) for name in np.unique(labels)}

# ---- sets of images ----------------------------------------------------------------------------------------

@dataclass
class ImageSet:
    """Statistics of images: mean (d,), covariance (d, d); n and features (n, d) unless they are foreign."""
    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None
    names: np.ndarray | None = None         # (n,) paths within the folder
    n: int | None = None

    def __post_init__(self):
        """Raises ValueError for what cannot be statistics of features."""
        d = len(self.mu)
        if self.mu.shape != (d,) or self.sigma.shape != (d, d):
            raise ValueError(f"mu has the shape {self.mu.shape}, sigma {self.sigma.shape}")
        if not (np.abs([self.mu, *self.sigma]) < 1e24).all():
            raise ValueError("a number in it is not finite, or larger than any feature")
        if self.n is not None and self.names.shape != (self.n,):
            raise ValueError(f"it has {self.n} images, but names of the shape {self.names.shape}")

    @classmethod
    def of_features(cls, features, names):
        if len(features) < 2:
            raise ValueError("it has fewer than two images")
        sigma = np.cov(features, rowvar=False)
        return cls(features.mean(0), sigma, features, np.array(names, dtype=str), len(features))

    def by_class(self):
        """{subfolder: features}, of at least two images."""
        if self.n is None:
            return {}
        labels = np.array([name.rpartition("/")[0].split("/")[0] for name in self.names])
        return {str(name): self.features[labels == name] for name in np.unique(labels)
                if name and (labels == name).sum() > 1}

def images_of(folder):
    """The files of a folder of two images or more."""
    files = list_images(folder) if folder.is_dir() else []
    if len(files) < 2:
        raise Fail(f"{folder}: no such folder (or .npz file of statistics), or fewer than two images in it")
    return files

def read_set(path, space, device="cpu", batch=32):
    """A folder of images, or an .npz of statistics made in the same feature space, -> ImageSet."""
    if path.suffix == ".npz":
        return load_set(path, space.resize, space.short_hash)
    files = images_of(path)
    names = [file.relative_to(path).as_posix() for file in files]
    return ImageSet.of_features(space.extract(files, device, batch), names)

def save_set(path, images, resize, weights):
    """Write statistics as pytorch-fid reads them (mu, sigma), with the features (float32) and their space."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=images.mu, sigma=images.sigma, features=images.features.astype(np.float32),
                 names=images.names, resize=resize, weights=weights)

def load_set(path, resize, weights):
    """Read an .npz of `save_set`, or any with mu and sigma -> ImageSet. Fails if it is of another space."""
    arrays = ("mu", "sigma", "features", "names", "resize", "weights")
    with foreign_file(path, "contains no statistics of features", "make them with --save"):
        with np.load(path, allow_pickle=False) as f:
            data = {key: f[key] for key in arrays if key in f}
        if "features" in data:
            images = ImageSet.of_features(np.float64(data["features"]), data["names"])
        else:
            images = ImageSet(np.float64(data["mu"]), np.float64(data["sigma"]))
    for key, value in (("resize", resize), ("weights", weights)):
        if key in data and str(data[key]) != value:
            raise Fail(f"{path} was made with {key} {data[key]}, not {value}: make it again with --save")
    return images

def compare(real, fake, subset=1000):
    """Two ImageSets -> {"fid", "n_real", "n_fake"}; where the features are known, METRICS' columns too."""
    if real.mu.shape != fake.mu.shape:
        raise Fail(f"one has {len(real.mu)} features, the other {len(fake.mu)}: use one network for both")
    both = real.n is not None and fake.n is not None
    if both and min(real.n, fake.n) < len(real.mu):
        distance = frechet_distance_of_features(real.features, fake.features)
    else:
        distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    others = all_metrics(real.features, fake.features, subset) if both else {}
    return dict(fid=distance, n_real=real.n, n_fake=fake.n) | others

def compare_classes(real, fake, subset=1000):
    """{class: {"n_real", "n_fake", columns of METRICS}} for every common subfolder (Table 8)."""
    x, y = real.by_class(), fake.by_class()
    return {name: dict(n_real=len(x[name]), n_fake=len(y[name])) | all_metrics(x[name], y[name], subset)
            for name in x if name in y}

# ---- the program -------------------------------------------------------------------------------------------

def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of images (any depth), or .npz of statistics")
    parser.add_argument("fake", metavar="FAKE", nargs="*", help="folders or .npz files to compare with it")
    parser.add_argument("--per-class", action="store_true", help="KID x 1000 for every common subfolder")
    parser.add_argument("--resize", choices=RESIZERS, default="pytorch-fid", help="whose number to reproduce")
    parser.add_argument("--kid-subset", type=number(int, 2), default=1000, metavar="N",
                        help="images per subset of KID, at most those that there are")
    parser.add_argument("--inception", metavar="FILE",
                        help="pytorch-fid's weights, .pth or .safetensors (default: torch.hub's cache)")
    parser.add_argument("--features", choices=("inception", "encoder"),
                        help="default: inception; for a toy run without its weights, the run's encoder")
    parser.add_argument("--save", metavar="FILE", help="write the statistics of REAL to this .npz file")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images at a time")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    if not args.fake and (args.json or not args.save):
        raise Fail("pass a second folder to compare with, or --save FILE.npz alone")
    args.real, *args.fake = find([args.real, *args.fake])
    if args.save and (Path(args.save).suffix != ".npz" or args.real.suffix == ".npz"):
        raise Fail(f"--save {args.save}: the name must end in .npz, and {args.real} must be a folder")
    return args

def choose_space(args):
    """The feature space of --features (by default, that of the run that REAL lies in), and --resize."""
    inside = (p for p in args.real.resolve().parents if (p / "adapter.safetensors").is_file())
    settings = next(map(read_settings, inside), None)
    toy = settings is not None and settings.uni2h == "toy"
    default = "encoder" if toy and not inception_available(args.inception) else "inception"
    with rank0_first():            # rank 0 downloads what is missing
        if (args.features or default) == "inception":
            return Inception(args.inception, args.resize)
        if settings is None:
            raise Fail(f"--features encoder: {args.real} is in no run of train.py; pass --features inception")
        return open_encoder(settings.uni2h, settings.encoder)

def available_spaces(inception, settings):
    """The feature spaces for a run: Inception, where its weights are available, and the run's encoder."""
    spaces = [Inception(inception)] if inception_available(inception) else []
    return [*spaces, open_encoder(settings.uni2h, settings.encoder)]

def result_lines(result):
    """A result of `compare` as lines of text."""
    if result["features"] == "inception":
        space = f"resize {result['resize']}, Inception {result['weights']}"
    else:
        space = f"features of the encoder {result['weights']}, not Inception's: comparable with nothing else"
    yield (f"FID {result['fid']:.4f}   {result['real']} | {result['fake']}   "
           f"n {result['n_real'] or '?'} | {result['n_fake'] or '?'}, {space}")
    yield describe_metrics(result) or "KID needs features: one of these .npz files was not made by --save"
    if "classes" in result and not result["classes"]:
        yield "  no subfolders of the same names with two images or more in both: nothing to compare by class"
    for name, row in result.get("classes", {}).items():
        yield f"  {name:<24}{row['n_real']:>6} | {row['n_fake']:<6} {describe_metrics(row)}"

def describe_metrics(row):
    """KID x 1000 with its spread, and every other column of METRICS; "" where there are none."""
    texts = []
    for key, value in row.items():
        if key == "kid":
            spread, n = 1000 * row["kid_std"], row["kid_subset"]
            how = f" ± {spread:.3f} (100 subsets of {n})" if spread else f" (one subset, all {n})"
            texts.append(f"KID x 1000 {1000 * value:.3f}{how}")
        elif isinstance(value, float) and key not in ("fid", "kid_std"):
            texts.append(f"{key} {value:.4f}")
    return ", ".join(texts)

def main():
    args = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    # folders are read before any weights are needed
    counts = [len(images_of(p)) for p in (args.real, *args.fake) if p.suffix != ".npz" or not p.is_file()]
    space = choose_space(args)
    check_same("weights or images", [space.short_hash, counts])
    real, results = read_set(args.real, space, device, args.batch), []
    if args.save and RANK0:
        save_set(args.save, real, space.resize, space.short_hash)
    for path in args.fake:
        fake = read_set(path, space, device, args.batch)
        if not RANK0:              # its part of the features is done
            continue
        result = dict(real=str(args.real), fake=str(path), features=space.kind, resize=space.resize,
                      weights=space.short_hash) | compare(real, fake, args.kid_subset)
        if args.per_class:
            result["classes"] = compare_classes(real, fake, args.kid_subset)
        print(*result_lines(result), sep="\n")
        results.append(result)
        if args.json:                       # after each: a later failure keeps the earlier ones
            save_text(args.json, json.dumps(results, indent=1) + "\n")

if __name__ == "__main__":
    run_program(main)
