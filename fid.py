#!/usr/bin/env python3
"""FID and KID between folders of images, or saved statistics of them; and every other metric of the report.

    python fid.py real/ fake/                       # prints FID as pytorch-fid does, and KID
    python fid.py real/ fake1/ fake2/ --per-class   # and KID for every common subfolder (the paper's Table 8)
    python fid.py real/ --save real.npz             # statistics for later; pytorch-fid reads them too

The number depends on --resize: pytorch-fid, clean (clean-fid) or tf1 (torch-fidelity, torchmetrics).
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist

from ldm.data import is_generated, list_files
from ldm.encoder import RESIZERS, Inception, inception_available, open_encoder
from ldm.app import (RANK0, Fail, Parser, atomic_write, check_same, foreign_file, join_processes, number,
                     pick_device, rank0_first, run_program, save_text)
from ldm.runs import find, read_settings

# ---- metrics of two sets, of features x (n, d) and y (m, d) ------------------------------------------------
def frechet_distance_of_moments(mu1, sigma1, mu2, sigma2):
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), by definition, with scipy's sqrtm. Inexact for singular Σ."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(root).all():             # singular: pytorch-fid's remedy
        offset = 1e-6 * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    return max(0.0, float(distance))            # of two equal sets rounding may make it -0.0

def frechet_distance(x, y):
    """The same of features: exact also for fewer images than features, where Σ is singular.

    With X and Y centred and scaled so that Σ = XᵀX, tr (Σ₁Σ₂)^½ is the nuclear norm of X Yᵀ, which is n x m.
    """
    x, y = np.float64(x), np.float64(y)
    mu_x, mu_y = x.mean(0), y.mean(0)
    if min(len(x), len(y)) > x.shape[1]:
        return frechet_distance_of_moments(mu_x, np.cov(x, rowvar=False), mu_y, np.cov(y, rowvar=False))
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

MIN_KID = 20        # images of either set, below which KID is noise

def kid(x, y, subset=1000, subsets=100, seed=2020):
    """KID -> {"kid", "kid_std", "kid_subset"}: mean and std of MMD² over random subsets, and their size.

    The subsets have min(subset, n, m) images, drawn without replacement in torch-fidelity's order (same seed,
    same subsets). Where that is all of both sets there is only one subset, hence std 0. None for too few.
    """
    x, y, size = np.float64(x), np.float64(y), min(subset, len(x), len(y))
    if min(len(x), len(y)) < MIN_KID:
        return dict(kid=None, kid_std=None, kid_subset=size)
    rng, values = np.random.RandomState(seed), []
    for _ in range(1 if size == len(x) == len(y) else subsets):
        values.append(squared_mmd(*(f[rng.choice(len(f), size, replace=False)] for f in (x, y))))
    return dict(kid=float(np.mean(values)), kid_std=float(np.std(values)), kid_subset=size)

def bootstrap_interval(distance, x, y, repeats=200, level=0.95, seed=0):
    """Bootstrap of distance(x, y) over pairs, row i of y made from row i of x -> (low, high).

    Only the spread of resampled sets is used, around the estimate: they repeat images, and so have a Fréchet
    distance's bias twice. Patches of one case are not independent: the interval is too narrow for that.
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

def authenticity(samples, train):
    """AuthPct / 100 of https://arxiv.org/abs/2102.08921: the share of samples that are farther from their
    nearest training image than its nearest other training image is."""
    index, distance = nearest(samples, train)
    others = cdist(train[index], train)
    others[np.arange(len(index)), index] = np.inf
    return float((others.min(1) < distance).mean())

def psnr(images, others):
    """Mean over pairs of PIL images of 10 log10(255² / mean squared difference), in dB."""
    pairs = [[np.asarray(image, np.float64) for image in pair] for pair in zip(images, others)]
    return float(np.mean([10 * np.log10(255 ** 2 / max(np.square(x - y).mean(), 1e-12)) for x, y in pairs]))

def fit_linear(x, labels, penalty=1.0):
    """Ridge regression of ±1 per class on standardised features x (n, d) -> a function, features to labels.

    Minimises the mean of |y - W z|², classes weighted equally, plus penalty |W|² without the bias.
    """
    names, y, count = np.unique(labels, return_inverse=True, return_counts=True)
    mu, spread, weight = x.mean(0), x.std(0) + 1e-6, 1 / (len(names) * count[y][:, None])
    def standardise(f):
        return np.c_[(f - mu) / spread, np.ones(len(f))]
    z, ridge = standardise(x), np.diag([penalty] * len(mu) + [1e-9])
    W = np.linalg.solve(z.T @ (weight * z) + ridge, z.T @ (weight * (2 * np.eye(len(names))[y] - 1)))
    return lambda f: names[(standardise(f) @ W).argmax(1)]

def accuracy_and_mcc(a, b):
    """Labels (n,) and guesses (n,) -> mean recall of the classes; Matthews correlation (0 for one guess)."""
    names = np.unique([a, b])
    joint = np.float64(names[:, None] == a) @ np.float64(np.asarray(b)[:, None] == names) / len(a)
    in_a, in_b, hits = joint.sum(1), joint.sum(0), joint.diagonal()
    spread = (1 - in_a @ in_a) * (1 - in_b @ in_b)
    mcc = (hits.sum() - in_a @ in_b) / np.sqrt(spread) if spread > 1e-9 else 0.0
    return float((hits[in_a > 0] / in_a[in_a > 0]).mean()), float(mcc)

# ---- sets of images ----------------------------------------------------------------------------------------
@dataclass
class ImageSet:
    """Features (n, d) of images; names: (n,) paths within the folder, None for stand-ins of equal moments.

    space: (kind, resizer, hash) of the FeatureSpace, None where unknown. Raises ValueError for other shapes.
    """
    features: np.ndarray
    names: np.ndarray | None = None
    space: tuple | None = None

    def __post_init__(self):
        self.n = None if self.names is None else len(self.features)
        self.names = np.array([""] * len(self.features) if self.names is None else self.names, dtype=str)
        if self.features.ndim != 2 or len(self.features) < 2 or self.names.shape != (len(self.features),):
            raise ValueError(f"features of the shape {self.features.shape}, names of {self.names.shape}")
        if not (np.abs(self.features) < 1e12).all():
            raise ValueError("a number in it is not finite, or larger than any feature")

    def by_class(self):
        """{subfolder: features}; "" holds those that lie in none."""
        labels = np.array([name.rpartition("/")[0].split("/")[0] for name in self.names])
        return {str(name): self.features[labels == name] for name in np.unique(labels)}

def with_moments(mu, sigma):
    """d + 1 rows with the mean (d,) and the covariance (d, d). Raises ValueError if there can be none."""
    values, vectors = np.linalg.eigh(sigma)
    tolerance = 1e-5 * np.abs(values).max()         # of float32
    if values[0] < -tolerance or np.abs(sigma - sigma.T).max() > tolerance:
        raise ValueError("its covariance is not symmetric and positive semidefinite")
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    return mu + np.sqrt(len(mu)) * scipy.linalg.helmert(len(mu) + 1).T @ root        # orthonormal, of mean 0

def images_of(folder, say=lambda line: None):
    """The files of a folder of two images or more. say: takes a line on what is not counted."""
    kinds = list_files(folder) if folder.is_dir() else {}
    files = [folder / name for name, kind in kinds.items() if kind == "images"]
    if left := ", ".join(f"{n} {kind}" for kind, n in Counter(kinds.values()).items() if kind != "images"):
        say(f"note: not counted in {folder}: {left}")
    if len(files) < 2:
        raise Fail(f"{folder}: no such folder (or .npz file of statistics), or fewer than two images in it")
    return files

def read_set(path, space, device="cpu", batch=32):
    """A folder of images, or an .npz of statistics, -> ImageSet. space: for a folder."""
    if path.is_file():
        return load_set(path)
    files = images_of(path)
    names = [file.relative_to(path).as_posix() for file in files]
    return ImageSet(space.extract(files, device, batch), names, (space.kind, space.resize, space.short_hash))

def save_set(path, images):
    """Write statistics as pytorch-fid reads them (mu, sigma), with the features (float32) and their space."""
    x, (kind, resize, weights) = images.features, images.space
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=x.mean(0), sigma=np.cov(x, rowvar=False), features=x.astype(np.float32),
                 names=images.names, kind=kind, resize=resize, weights=weights)

# The arrays of `save_set`, and what others call them: clean-fid writes feats, older programs mean and cov.
ARRAYS = {name: name for name in ("mu", "sigma", "features", "names", "kind", "resize", "weights")}
ARRAYS |= dict(mean="mu", cov="sigma", feats="features")

def load_set(path):
    """Read an .npz of ours or of another program -> ImageSet."""
    with foreign_file(path, "contains no statistics of features", "use those of fid.py --save"):
        with np.load(path, allow_pickle=False) as f:
            data = {name: f[key] for key, name in ARRAYS.items() if key in f}
        if "features" not in data:
            return ImageSet(with_moments(np.float64(data["mu"]), np.float64(data["sigma"])))
        features = np.float64(data["features"])
        space = tuple(str(data[key]) for key in ("kind", "resize", "weights")) if "kind" in data else None
        return ImageSet(features, data.get("names", [""] * len(features)), space)

def compare(real, fake, subset=1000):
    """Two ImageSets -> {"fid", "n_real", "n_fake"}, and the columns of `kid` where the features are known."""
    d = [images.features.shape[1] for images in (real, fake)]
    if d[0] != d[1]:
        raise Fail(f"one has {d[0]} features, the other {d[1]}: use one network for both")
    if real.space != fake.space and real.space and fake.space:
        raise Fail(f"REAL has features of {', '.join(real.space)}; FAKE of {', '.join(fake.space)}: make one "
                   "again, with the --resize and --inception of the other")
    others = kid(real.features, fake.features, subset) if real.n and fake.n else {}
    return dict(fid=frechet_distance(real.features, fake.features), n_real=real.n, n_fake=fake.n) | others

def compare_classes(real, fake, subset=1000):
    """{class: {"n_real", "n_fake", columns of `kid`}} for every subfolder of either, if one is in both.

    Images outside of subfolders are the class "".
    """
    x, y, rows = real.by_class(), fake.by_class(), {}
    for name in sorted(x.keys() | y.keys() if any(x.keys() & y.keys()) else ()):
        a, b = x.get(name, ()), y.get(name, ())
        rows[name] = dict(n_real=len(a), n_fake=len(b)) | kid(a, b, subset)
    return rows

# ---- the program -------------------------------------------------------------------------------------------
def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of images, or .npz of statistics")
    parser.add_argument("fake", metavar="FAKE", nargs="*", help="folders or .npz files to compare with it")
    parser.add_argument("--per-class", action="store_true", help="KID x 1000 for every common subfolder")
    parser.add_argument("--resize", choices=RESIZERS, help="whose number to reproduce (default: pytorch-fid)")
    parser.add_argument("--kid-subset", type=number(int, 2), default=1000,
                        help="images per subset of KID (default: 1000)")
    parser.add_argument("--inception", metavar="FILE", help="its weights (default: torch.hub's cache)")
    parser.add_argument("--features", choices=("inception", "encoder"),
                        help="default: inception; for a toy run without its weights, the run's encoder")
    parser.add_argument("--save", metavar="FILE", help="write the statistics of REAL to this .npz file")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    if not args.fake and (args.json or not args.save):
        raise Fail("pass FAKE, a second folder to compare with, or --save FILE.npz alone")
    if args.features == "encoder" and (args.resize or args.inception):
        raise Fail("--resize and --inception have no effect on --features encoder: omit them, or that")
    args.real, *args.fake = find([args.real, *args.fake])
    if args.save and (Path(args.save).suffix != ".npz" or args.real.is_file()):
        raise Fail(f"--save {args.save}: the name must end in .npz, and {args.real} must be a folder")
    return args

def choose_space(args):
    """The feature space of --features (by default, that of the run that REAL lies in), and --resize."""
    inside = (p for p in args.real.resolve().parents if (p / "adapter.safetensors").is_file())
    settings = next(map(read_settings, inside), None)
    toy = settings and settings.uni2h == "toy" and not args.resize and not inception_available(args.inception)
    with rank0_first():            # rank 0 downloads what is missing
        if args.features == "inception" or not (args.features or toy):
            return Inception(args.inception, args.resize or "pytorch-fid")
        if settings is None:
            raise Fail(f"--features encoder: {args.real} is in no run of train.py; pass --features inception")
        return open_encoder(settings.uni2h, settings.encoder)

SPACES = {"inception": "resize {resize}, Inception {weights}", None: "resizer and network unknown",
          "encoder": "features of the encoder {weights}, not Inception's: comparable with nothing else"}

def result_lines(result):
    """A result of `compare` as lines of text."""
    space = SPACES[result["features"]].format(**result)
    yield (f"FID {result['fid']:.4f}   {result['real']} | {result['fake']}   "
           f"n {result['n_real'] or '?'} | {result['n_fake'] or '?'}, {space}")
    if result["unknown"]:
        yield f"note: resizer and network of {', '.join(result['unknown'])} are unknown; others move the FID"
    yield describe_kid(result) if "kid" in result else "KID needs features, which one of these files lacks"
    classes = result.get("classes", {})
    if "classes" in result and not classes:
        yield "  no subfolders of the same names in both: nothing to compare by class"
    for name, row in classes.items():
        name = name or "(in no subfolder)"
        yield f"  {name:<24}{row['n_real']:>6} | {row['n_fake']:<6} {describe_kid(row)}"
    if any((row.get("kid") or 0) < 0 for row in (result, *classes.values())):
        yield "note: KID estimates a number >= 0 without bias; a negative one is zero within its error"

def describe_kid(row):
    """KID x 1000 with its spread."""
    if row["kid"] is None:
        return f"KID: too few images (from {MIN_KID} of each on)"
    spread, n = 1000 * row["kid_std"], row["kid_subset"]
    how = f"± {spread:.3f} (100 subsets of {n})" if spread else f"(one subset, all {n})"
    return f"KID x 1000 {1000 * row['kid']:.3f} {how}"

def main():
    args = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    # folders are read before any weights are needed; two files of statistics need none
    files = {path: images_of(path, print) for path in (args.real, *args.fake) if not path.is_file()}
    if generated := sum(map(is_generated, files.get(args.real, ()))):
        print(f"note: {generated} images of {args.real} are generated, not real")
    space = choose_space(args) if files else None
    check_same("weights or images", [space and space.short_hash, [len(found) for found in files.values()]])
    real, results = read_set(args.real, space, device, args.batch), []
    if args.save and RANK0:
        save_set(args.save, real)
    for path in args.fake:
        fake = read_set(path, space, device, args.batch)
        if not RANK0:              # its part of the features is done
            continue
        kind, resize, weights = real.space or fake.space or (None, None, None)
        result = dict(real=str(args.real), fake=str(path), features=kind, resize=resize, weights=weights,
                      unknown=[str(p) for p, images in ((args.real, real), (path, fake)) if not images.space],
                      **compare(real, fake, args.kid_subset))
        if args.per_class:
            result["classes"] = compare_classes(real, fake, args.kid_subset)
        print(*result_lines(result), sep="\n")
        results.append(result)
        if args.json:                       # after each: a later failure keeps the earlier ones
            save_text(args.json, json.dumps(results, indent=1) + "\n")

if __name__ == "__main__":
    run_program(main)
