"""FID and KID between folders of images, or saved statistics of them; and every other metric of the report.

    python fid.py real/ fake/                       # prints FID as pytorch-fid does, and KID
    python fid.py real/ fake1/ fake2/ --per-class   # and KID for every common subfolder (the paper's Table 8)
    python fid.py real/ --save real.npz             # statistics for later; pytorch-fid reads them too"""
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist

from ldm.data import is_generated, is_output, list_images
from ldm.encoder import RESIZERS, Inception, cached_inception, open_encoder
from ldm.app import (RANK0, Fail, Parser, atomic_write, check_same, foreign_file, join_processes, number,
                     pick_device, rank0_first, run_program, save_json)
from ldm.runs import find, read_settings

# ---- metrics of two sets, of features x (n, d) and y (m, d) ------------------------------------------------
def frechet_distance(x, y):
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) of features, by scipy's sqrtm; exact also for few images.
    With X and Y centred and scaled so that Σ = XᵀX, tr (Σ₁Σ₂)^½ is the nuclear norm of X Yᵀ; of many rows X,
    that of R Yᵀ, where X = QR and R is d x d."""
    x, y = np.float64(x), np.float64(y)
    mu_x, mu_y = x.mean(0), y.mean(0)
    x, y = (x - mu_x) / np.sqrt(len(x) - 1), (y - mu_y) / np.sqrt(len(y) - 1)
    if min(len(x), len(y)) <= x.shape[1] or not (x.any(0) & y.any(0)).all():       # singular
        rx, ry = (np.linalg.qr(f, mode="r") if len(f) > f.shape[1] else f for f in (x, y))
        trace = scipy.linalg.svdvals(rx @ ry.T).sum()
    else:
        trace = np.trace(scipy.linalg.sqrtm((x.T @ x) @ (y.T @ y))).real
    distance = np.square(mu_x - mu_y).sum() + np.square(x).sum() + np.square(y).sum() - 2 * trace
    return max(0.0, float(distance))            # of two equal sets rounding may make it negative

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
    The subsets have min(subset, n, m) images, drawn as torch-fidelity does (same seed, same subsets). Where
    that is all of both sets there is only one subset, hence std 0. None for too few."""
    x, y, size = np.float64(x), np.float64(y), min(subset, len(x), len(y))
    if min(len(x), len(y)) < MIN_KID:
        return dict(kid=None, kid_std=None, kid_subset=size)
    draw, repeats = np.random.RandomState(seed).choice, 1 if size == len(x) == len(y) else subsets
    picks = [[draw(len(f), size, replace=False) for f in (x, y)] for _ in range(repeats)]
    values = [squared_mmd(x[i], y[j]) for i, j in picks]
    return dict(kid=float(np.mean(values)), kid_std=float(np.std(values)), kid_subset=size)

def bootstrap_interval(distance, x, y, repeats=200, level=0.95, seed=0):
    """Bootstrap of distance(x, y) over pairs, row i of y made from row i of x -> (low, high).
    Only the spread of resampled sets is used: with images repeated, a Fréchet distance has its bias twice.
    Patches of one case are not independent: the interval is too narrow for that."""
    picks = np.random.default_rng(seed).integers(len(x), size=(repeats, len(x)))
    values = [distance(x[i], y[i]) for i in picks]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - np.mean(values) + distance(x, y)
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
    return names[cdist(x, [train[labels == name].mean(0) for name in names], "cosine").argmin(1)]

def fit_linear(x, labels, penalty=1.0):
    """Ridge regression on standardised features x (n, d) -> a function, features to labels.
    Minimises the mean of |y - W z|² + penalty |W|², y one-hot: without bias, as both are centred."""
    names, mu, spread = np.unique(labels), x.mean(0), x.std(0) + 1e-6
    z, y = (x - mu) / spread, np.float64(names == labels[:, None])
    W = np.linalg.solve(z.T @ z / len(z) + penalty * np.eye(len(mu)), z.T @ y / len(z))
    return lambda f: names[((f - mu) / spread @ W + y.mean(0)).argmax(1)]

def balanced_accuracy(labels, guesses):
    """The mean over classes of the share of their images, labels (n,), that guesses (n,) find."""
    return float(np.mean([(guesses[labels == name] == name).mean() for name in np.unique(labels)]))

def cohen_kappa(x, y):
    """(p - q) / (1 - q) of two readers' answers {item: answer} to the items of both; p: share of equal ones,
    q: that expected by chance. None where it is 0 / 0."""
    x, y = (np.array([answers[item] for item in sorted(x.keys() & y.keys())]) for answers in (x, y))
    q = sum(np.mean(x == name) * np.mean(y == name) for name in {*x, *y})
    return float((np.mean(x == y) - q) / (1 - q)) if len(x) and q < 1 else None

# ---- sets of images ----------------------------------------------------------------------------------------
@dataclass
class ImageSet:
    """Features (n, d) of images; names: n paths within the folder, or none for stand-ins of equal moments.
    space: (kind, resizer, hash) of the FeatureSpace, None where unknown. ValueError for other shapes."""
    features: np.ndarray
    names: list = ()
    space: tuple | None = None

    def __post_init__(self):
        self.n = len(self.names) or None
        if self.features.ndim != 2 or len(self.features) < 2 or self.n not in (None, len(self.features)):
            raise ValueError(f"features of the shape {self.features.shape}, {self.n} names")
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

def read_set(path, files, space, device="cpu", batch=32):
    """An .npz of statistics; or the files of a folder, in a FeatureSpace -> ImageSet."""
    if files is None:
        return load_set(path)
    names = [file.relative_to(path).as_posix() for file in files]
    how = space.kind, space.resize, space.fingerprint()[:8]
    return ImageSet(space.extract(files, device, batch), names, how)

def save_set(path, images):
    """Write statistics as pytorch-fid reads them (mu, sigma), with the features (float32) and their space."""
    x, (kind, resize, weights) = images.features, images.space
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=x.mean(0), sigma=np.cov(x, rowvar=False), features=x.astype(np.float32),
                 names=images.names, kind=kind, resize=resize, weights=weights)

def load_set(path):
    """Read an .npz of ours, or of others: clean-fid's has feats, older ones mean and cov -> ImageSet."""
    advice = "use those of fid.py --save"
    with foreign_file(path, "contains no statistics of features", advice), np.load(path) as f:
        key = "feats" if "feats" in f else "features"
        if key not in f:
            mu, sigma = ("mean", "cov") if "mean" in f else ("mu", "sigma")
            return ImageSet(with_moments(np.float64(f[mu]), np.float64(f[sigma])))
        names = f["names"].astype(str).ravel().tolist() if "names" in f else [""] * len(f[key])
        space = tuple(str(f[key]) for key in ("kind", "resize", "weights")) if "kind" in f else None
        return ImageSet(np.float64(f[key]), names, space)

def compare(real, fake, subset=1000):
    """Two ImageSets -> {"fid", "n_real", "n_fake"}, and the columns of `kid` where the features are known."""
    (d, a), (other, b) = ((x.features.shape[1], ", ".join(x.space or ())) for x in (real, fake))
    if d != other or (a and b and a != b):
        raise Fail(f"REAL has {d} features of {a or '?'}, FAKE {other} of {b or '?'}: make one as the other")
    others = kid(real.features, fake.features, subset) if real.n and fake.n else {}
    return dict(fid=frechet_distance(real.features, fake.features), n_real=real.n, n_fake=fake.n) | others

def compare_classes(real, fake, subset=1000):
    """{class or "": {"n_real", "n_fake", columns of `kid`}} for every subfolder, if one is in both."""
    x, y = real.by_class(), fake.by_class()
    names = sorted(x.keys() | y.keys()) if any(x.keys() & y.keys()) else ()
    pairs = {name: (x.get(name, ()), y.get(name, ())) for name in names}
    return {name: dict(n_real=len(a), n_fake=len(b)) | kid(a, b, subset) for name, (a, b) in pairs.items()}

# ---- the program -------------------------------------------------------------------------------------------
def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("real", metavar="REAL", help="folder of images, or .npz of statistics")
    parser.add_argument("fake", metavar="FAKE", nargs="*", help="folders or .npz files to compare with it")
    parser.add_argument("--per-class", action="store_true", help="KID x 1000 by subfolder, if one is in both")
    parser.add_argument("--resize", choices=RESIZERS, help="whose number (default: pytorch-fid)")
    parser.add_argument("--kid-subset", type=number(int, 2), default=1000, help="its images (default: 1000)")
    parser.add_argument("--inception", metavar="FILE", help="its weights (default: torch.hub's cache)")
    parser.add_argument("--features", choices=("inception", "encoder"), help="default: as available")
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
    if args.save and args.real.is_file():
        raise Fail(f"--save {args.save}: {args.real} must be a folder")
    return args

def choose_space(args):
    """The feature space of --features (default: Inception, or a toy run's without it), --resize."""
    runs = (p for p in args.real.resolve().parents if (p / "adapter.safetensors").is_file())
    settings = next(map(read_settings, runs), None)
    inception = args.resize or args.inception or cached_inception().is_file()
    toy = settings and settings.uni2h == "toy" and not inception
    if args.features == "encoder" and settings is None:
        raise Fail(f"--features encoder: {args.real} is in no run of train.py; pass --features inception")
    with rank0_first():            # rank 0 downloads what is missing
        if args.features == "encoder" or (toy and not args.features):
            return open_encoder(settings.uni2h, settings.encoder)
        return Inception(args.inception, args.resize or "pytorch-fid")

SPACES = {"inception": "resize {resize}, Inception {weights}",
          None: "resizer and network of {unknown} unknown: others move the FID",
          "encoder": "features of the encoder {weights}, not Inception's: comparable with nothing else"}

def result_lines(result):
    """A result of `compare` as lines of text."""
    space = SPACES.get(result["features"], "features of {features}, {weights}").format(**result)
    name = "fid_encoder" if result["features"] == "encoder" else "FID"
    yield (f"{name} {result['fid']:.4f}   {result['real']} | {result['fake']}   "
           f"n {result['n_real'] or '?'} | {result['n_fake'] or '?'}, {space}")
    yield describe_kid(result)
    classes = result.get("classes", {})
    if "classes" in result and not classes:
        yield "  no subfolders of the same names in both: nothing to compare by class"
    for name, r in classes.items():
        yield f"  {name or '(in no subfolder)':<24}{r['n_real']:>6} | {r['n_fake']:<6} {describe_kid(r)}"

def describe_kid(row):
    """KID x 1000 with its spread."""
    if row.get("kid") is None:
        return ("KID needs features, which one of these files lacks" if "kid" not in row else
                f"KID: too few images (from {MIN_KID} of each on)")
    spread, n = 1000 * row["kid_std"], row["kid_subset"]
    how = f"± {spread:.3f} (100 subsets of {n})" if spread else f"(one subset, all {n})"
    return f"KID x 1000 {1000 * row['kid']:.3f} {how}" + ", unbiased, so below 0 by chance" * (row["kid"] < 0)

def main():
    args = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    paths, results = [args.real, *args.fake], []
    # folders are read before any weights are needed; two files of statistics need none
    files = {p: list_images(p) if p.is_dir() else [] for p in paths if not p.is_file()}
    if made := [*filter(is_output, files)]:
        raise Fail(f"{made[0]} holds real and sampled images; pass its real/ and fake/ or cfg... folders")
    if few := [path for path, found in files.items() if len(found) < 2]:
        raise Fail(f"{few[0]}: no .npz file of statistics, nor folder of two images or more; pass one")
    if generated := sum(map(is_generated, files.get(args.real, ()))):
        print(f"note: {generated} images of {args.real} are generated, not real")
    space = choose_space(args) if files else None
    check_same("weights or images", [space and space.fingerprint(), [len(found) for found in files.values()]])
    sets = (read_set(path, files.get(path), space, device, args.batch) for path in paths)
    real = next(sets)
    if args.save and RANK0:
        save_set(args.save, real)
    for path, fake in zip(args.fake, sets):
        if not RANK0:              # its part of the features is done
            continue
        unknown = ", ".join(str(p) for p, images in ((args.real, real), (path, fake)) if not images.space)
        kind, resize, weights = (None, None, None) if unknown else real.space
        result = dict(real=str(args.real), fake=str(path), features=kind, resize=resize, weights=weights,
                      unknown=unknown, **compare(real, fake, args.kid_subset))
        if args.per_class:
            result["classes"] = compare_classes(real, fake, args.kid_subset)
        print(*result_lines(result), sep="\n")
        results.append(result)
        if args.json:                       # after each: a later failure keeps the earlier ones
            save_json(args.json, results)

if __name__ == "__main__":
    run_program(main)
