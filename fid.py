#!/usr/bin/env python3
"""FID and KID between folders of images, or saved statistics of them; and every other metric of the report.

    python fid.py real/ fake/                       # prints FID as pytorch-fid does, and KID
    python fid.py real/ fake1/ fake2/ --per-class   # and KID for every common subfolder (the paper's Table 8)
    python fid.py real/ --save real.npz             # statistics for later; pytorch-fid reads them too

The number depends on --resize: pytorch-fid, clean (clean-fid) or tf1 (torch-fidelity, torchmetrics).
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.optimize

from ldm.data import list_images
from ldm.encoder import RESIZERS, Inception, inception_available, open_encoder
from ldm.app import (RANK0, Fail, Parser, atomic_write, broadcast, check_same, foreign_file, join_processes,
                     number, pick_device, rank0_first, run_program, save_text)
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

def cosine(x, y):
    """Cosine similarity of every row of x (n, d) with every row of y (m, d) -> (n, m)."""
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
    return x @ y.T


def fidelity(samples, references):
    """Mean cosine of row i of samples (n, d) with row i of references, its own; with all others."""
    c = cosine(samples, references)
    n = len(c)
    return float(np.trace(c) / n), float((c.sum() - np.trace(c)) / (n * (n - 1)))


def nearest_centroid(train, labels, x):
    """The label of the class whose mean embedding has the largest cosine with each row of x -> (n,)."""
    names = np.unique(labels)
    centroids = np.stack([train[labels == name].mean(0) for name in names])
    return names[cosine(x, centroids).argmax(1)]


def nearest(x, train):
    """The Euclidean nearest row of train (m, d) to each row of x (n, d) -> (index, distance), both (n,)."""
    squared = np.square(x).sum(1)[:, None] - 2 * x @ train.T + np.square(train).sum(1)
    index = squared.argmin(1)
    return index, np.linalg.norm(x - train[index], axis=1)      # the expansion is inexact for near-equal rows


def fit_linear(x, labels, penalty=1.0):
    """Multinomial logistic regression on standardised features x (n, d) -> a function, features to labels.

    Minimises the mean cross-entropy plus penalty/(2n) |W|², classes weighted equally, by scipy's L-BFGS.
    """
    names, y = np.unique(labels, return_inverse=True)
    mu, spread = x.mean(0), x.std(0) + 1e-6
    z, target = (x - mu) / spread, np.eye(len(names))[y]
    weight = (len(y) / len(names) / np.bincount(y))[y] / len(y)

    def loss(flat):
        w = flat.reshape(len(names), -1)
        logits = z @ w[:, 1:].T + w[:, 0]
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = weight[:, None] * (np.exp(log_p) - target)
        gradient = np.hstack([slope.sum(0)[:, None], slope.T @ z + penalty / len(z) * w[:, 1:]])
        entropy = -(weight * log_p[np.arange(len(z)), y]).sum()
        return entropy + penalty / (2 * len(z)) * np.square(w[:, 1:]).sum(), gradient.ravel()

    start = np.zeros(len(names) * (z.shape[1] + 1))
    w = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(len(names), -1)
    return lambda f: names[((f - mu) / spread @ w[:, 1:].T + w[:, 0]).argmax(1)]


def recalls(labels, guesses):
    """{class: share of its images that is recognised}; their mean is the balanced accuracy."""
    return {str(name): float((guesses[labels == name] == name).mean()) for name in np.unique(labels)}


# ---- sets of images ----------------------------------------------------------------------------------------

@dataclass
class ImageSet:
    """Statistics of n images: mean (d,), covariance (d, d); features (n, d) unless they are foreign."""
    n: int | None
    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None
    names: np.ndarray | None = None         # (n,) paths within the folder

    @classmethod
    def of_features(cls, features, names):
        return cls(len(features), features.mean(0), np.cov(features, rowvar=False), features, np.array(names))

    def by_class(self):
        """{subfolder: features}, of at least two images."""
        if self.features is None:
            return {}
        labels = np.array([name.split("/")[0] if "/" in name else "" for name in self.names])
        return {str(name): self.features[labels == name] for name in np.unique(labels)
                if name and (labels == name).sum() > 1}


def images_of(folder):
    """The files of a folder of two images or more."""
    if not folder.is_dir():
        raise Fail(f"{folder}: no such folder (or .npz file of statistics)")
    files = list_images(folder)
    if len(files) < 2:
        raise Fail(f"{folder} contains fewer than two images; at least two are needed")
    return files


def read_set(path, space, device="cpu", batch=32):
    """A folder of images, or an .npz of statistics made in the same feature space, -> ImageSet."""
    if path.suffix == ".npz":
        return load_set(path, space.resize, space.short_hash)
    files = images_of(path)
    names = [file.relative_to(path).as_posix() for file in files]
    return ImageSet.of_features(space.extract(files, device, batch), names)


def save_set(path, images, resize, weights):
    """Write statistics as pytorch-fid reads them (mu, sigma), with the features and their space."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=images.mu, sigma=images.sigma, n=images.n, features=images.features.astype(np.float32),
                 names=images.names, resize=resize, weights=weights)


ARRAYS = ("mu", "sigma", "n", "features", "names", "resize", "weights")


def load_set(path, resize, weights):
    """Read an .npz of `save_set`, or any with mu and sigma -> ImageSet. Fails if it is of another space."""
    with foreign_file(path, "contains no statistics of features", "make them with --save"):
        with np.load(path, allow_pickle=False) as f:
            data = {key: f[key] for key in ARRAYS if key in f}
        images = _check_statistics(data)
    for key, value in (("resize", resize), ("weights", weights)):
        if key in data and str(data[key]) != value:
            raise Fail(f"{path} was made with {key} {data[key]}, not {value}: make it again with --save")
    return images


def _check_statistics(data):
    """The arrays of an .npz -> ImageSet. Raises KeyError or ValueError where they are no statistics."""
    data = data | {key: data[key].astype(np.float64) for key in ("mu", "sigma", "features") if key in data}
    if not all((np.abs(data[key]) < 1e12).all() for key in ("mu", "sigma", "features") if key in data):
        raise ValueError("a number in it is not finite, or larger than any feature")
    if data["mu"].ndim != 1 or data["sigma"].shape != 2 * data["mu"].shape:
        raise ValueError(f"mu has the shape {data['mu'].shape}, sigma {data['sigma'].shape}")
    n = int(data["n"]) if "n" in data else None
    if n is not None and n < 2:
        raise ValueError(f"they are of {n} images; at least 2 are needed")
    if not n or "features" not in data or "names" not in data:
        return ImageSet(n, data["mu"], data["sigma"])
    features, names = data["features"], data["names"]
    if features.shape != (n, len(data["mu"])) or names.shape != (n,) or names.dtype.kind != "U":
        raise ValueError(f"features have the shape {features.shape}, names {names.shape}, n is {n}")
    return ImageSet(n, data["mu"], data["sigma"], features, names)


def compare(real, fake, subset=1000):
    """Two ImageSets -> {"fid", "n_real", "n_fake"}; where the features are known, METRICS' columns too."""
    if real.mu.shape != fake.mu.shape:
        raise Fail(f"one has {len(real.mu)} features, the other {len(fake.mu)}: use one network for both")
    both = real.features is not None and fake.features is not None
    if both and min(real.n, fake.n) < len(real.mu):
        distance = frechet_distance_of_features(real.features, fake.features)
    else:
        distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    result = dict(fid=distance, n_real=real.n, n_fake=fake.n)
    for metric in METRICS if both else ():
        result |= metric(real.features, fake.features, subset)
    return result


def compare_classes(real, fake, subset=1000):
    """{class: {"n_real", "n_fake", columns of METRICS}} for every common subfolder (Table 8)."""
    result, others = {}, fake.by_class()
    for name, x in real.by_class().items():
        if name in others:
            result[name] = dict(n_real=len(x), n_fake=len(others[name]))
            for metric in METRICS:
                result[name] |= metric(x, others[name], subset)
    return result


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
                        help="encoder: that of REAL's run (default: inception; encoder for a toy run without "
                             "Inception's weights)")
    parser.add_argument("--save", metavar="FILE", help="write the statistics of REAL to this .npz file")
    parser.add_argument("--json", metavar="FILE",
                        help="write the results to this .json file; - prints them, and all else to stderr")
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images at a time")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    if not args.fake and not args.save:
        raise Fail("pass a second folder to compare with, or --save FILE.npz")
    if args.save and Path(args.save).suffix != ".npz":
        raise Fail(f"--save {args.save}: the name must end in .npz")
    args.real, *args.fake = find([args.real, *args.fake])
    if args.save and args.real.suffix == ".npz":
        raise Fail(f"--save: {args.real} is already a file of statistics")
    if args.json and not args.fake:
        raise Fail("--json: nothing is compared; pass a second folder")
    if args.json not in (None, "-") and Path(args.json).suffix != ".json":
        raise Fail(f"--json {args.json}: the name must end in .json, or be -")
    return args


def choose_space(args):
    """The feature space of --features, --inception and --resize."""
    encoder = encoder_of(args.real)
    if args.features is None:
        use_encoder = encoder == "toy" and not inception_available(args.inception)
        args.features = broadcast("encoder" if use_encoder else "inception")
    if args.features == "encoder" and encoder is None:
        raise Fail(f"--features encoder: {args.real} is in no run of train.py; pass --features inception")
    if args.features == "encoder" and args.resize != "pytorch-fid":
        raise Fail(f"--resize {args.resize} is for Inception's features; the encoder has its own resizer")
    with rank0_first():            # rank 0 downloads what is missing
        return open_encoder(encoder) if args.features == "encoder" else Inception(args.inception, args.resize)


def available_spaces(inception, encoder):
    """The feature spaces for a run: Inception, where its weights are available, and the run's encoder."""
    spaces = [Inception(inception)] if inception_available(inception) else []
    return [*spaces, open_encoder(encoder)]


def encoder_of(path):
    """The encoder (--uni2h) of the run of train.py that a folder lies in, or None."""
    for parent in Path(path).resolve().parents:
        if (parent / "adapter.safetensors").is_file() and (settings := read_settings(parent)):
            return settings.uni2h
    return None


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
        if key == "kid" and row["kid_std"] == 0:
            texts.append(f"KID x 1000 {1000 * value:.3f} (one subset, all {row['kid_subset']})")
        elif key == "kid":
            texts.append(f"KID x 1000 {1000 * value:.3f} ± {1000 * row['kid_std']:.3f} "
                         f"(100 subsets of {row['kid_subset']})")
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
        print(*result_lines(result), sep="\n", file=sys.stderr if args.json == "-" else sys.stdout)
        results.append(result)
        if args.json not in (None, "-"):    # after each: a later failure keeps the earlier ones
            save_text(args.json, json.dumps(results, indent=1) + "\n")
    if args.json == "-" and RANK0:
        print(json.dumps(results))


if __name__ == "__main__":
    run_program(main)
