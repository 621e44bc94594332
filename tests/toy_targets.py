"""What the toy reaches, seed by seed: trains, samples and scores; an hour or so on 2 cores.

    python tests/toy_targets.py OUT --inception FILE [--seeds 0 1 2]

Samples are scored by Inception's features, which the conditioning never saw: the class by a ridge classifier
trained on other toy tissue (also with every image brought to the same mean and spread of each channel, so
that tone alone cannot win), the distance against tissue of other slides. Finished parts are kept in OUT, so
that it can be interrupted."""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fid import frechet_distance                                                            # noqa: E402
from ldm.data import CLASSES, list_images, load_rgb, to_images, to_tensor                   # noqa: E402
from ldm.encoder import Inception                                                           # noqa: E402
from ldm.weights import load_vae, open_sd15                                                 # noqa: E402
from tissue import write_dataset                                                            # noqa: E402

VARIANTS = {"both": [], "projector only": ["--alpha", "1e-6"], "LoRA only": ["--lr-ratio", "0"]}

def matched(image):
    """The image with each channel brought to mean 170 and standard deviation 40."""
    x = np.asarray(image, dtype=np.float64)
    x = (x - x.mean((0, 1))) / x.std((0, 1)) * 40 + 170
    return Image.fromarray(x.clip(0, 255).round().astype(np.uint8))

def gradient_energy(folder):
    """Mean square of the differences of neighbouring pixels of the images in a folder: how sharp they are."""
    images = [np.asarray(load_rgb(file), dtype=float) for file in list_images(folder)]
    return float(np.mean([sum(np.square(np.diff(x, axis=axis)).mean() for axis in (0, 1)) for x in images]))

class Judge:
    def __init__(self, inception, folders, cpu=torch.device("cpu")):
        space = Inception(inception)
        self.features = {
            "plain": lambda files: space.extract(files, cpu),
            "matched": lambda files: space.extract([matched(load_rgb(file)) for file in files], cpu)}
        files = [list_images(folder) for folder in folders]
        y = np.concatenate([labels(part, folder) for part, folder in zip(files, folders)])
        self.classifiers = {kind: ridge(np.concatenate([f(part) for part in files]), y)
                            for kind, f in self.features.items()}

    def consistency(self, folder, kind):
        files = list_images(folder)
        return float((self.classifiers[kind](self.features[kind](files)) == labels(files, folder)).mean())

    def distance(self, a, b):
        return frechet_distance(*(self.features["plain"](list_images(folder)) for folder in (a, b)))

def labels(files, folder):
    return np.array([CLASSES.index(f.relative_to(folder).parts[0]) for f in files])

def ridge(x, y, penalty=100.0):
    """Features (n, d) and labels -> a function that classifies features."""
    mu, spread, one_hot = x.mean(0), x.std(0) + 1e-6, np.eye(len(CLASSES))[y]
    z = (x - mu) / spread
    w = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), one_hot - one_hot.mean(0))
    return lambda f: ((f - mu) / spread @ w).argmax(1)

def program(name, *args, cwd):
    subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, check=True)

def reconstruct(files, source, out):
    """VAE floor: each image through the toy VAE and back -> mean PSNR in dB; the images go to `out`."""
    vae, psnr = load_vae(open_sd15("toy")[1]), []
    for f in files:
        [image] = to_images(vae.reconstruct(to_tensor([load_rgb(f)], 64)))
        error = np.asarray(image, float) - np.asarray(load_rgb(f), float)
        psnr.append(10 * np.log10(255 ** 2 / np.square(error).mean()))
        target = out / f.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    return float(np.mean(psnr))

def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inception", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--train", action="append", default=[],
                        help="one more argument for train.py, as --train=...; may be repeated")
    args = parser.parse_args()
    out = args.out.resolve()
    wanted = ("judge", 20, 6, 1), ("references", 12, 2, 2), ("real", 12, 2, 3)
    sets = {name: write_dataset(out / name, slides, patches, seed=seed)         # slides that no run has seen
            for name, slides, patches, seed in wanted}
    reconstruct(list_images(sets["judge"]), sets["judge"], out / "judge-vae")
    judge, rows = Judge(args.inception, [sets["judge"], out / "judge-vae"]), {}

    def score(name, folder):
        rows[name] = dict(consistency=judge.consistency(folder, "plain"),
                          matched=judge.consistency(folder, "matched"),
                          distance=judge.distance(folder, sets["real"]),
                          sharpness=gradient_energy(folder) / gradient_energy(sets["references"]))
        print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
        (out / "targets.json").write_text(json.dumps(rows, indent=1))

    score("real tissue", sets["references"])
    psnr = reconstruct(list_images(sets["references"]), sets["references"], out / "vae")
    print("VAE:", psnr, "dB", flush=True)
    score("VAE reconstruction", out / "vae")

    def sample(run, seed, *args):
        program("sample.py", "--adapter", run / "adapter.safetensors", "--ref", sets["references"],
                "--seed", 1000 * seed, "--out", run / "s", *args, cwd=out)

    for seed in args.seeds:
        for variant in args.variants:
            run = out / f"runs/{variant.replace(' ', '-')}-{seed}"
            program("train.py", "--rank", 4, "--tokens", 4, "--seed", seed, "--run", run,
                    *VARIANTS[variant], *args.train, cwd=out)
            guidances = ["1.3", "7.5"] if variant == "both" else ["1.3"]
            sample(run, seed, "--cfg", *guidances)
            for w in guidances:
                score(f"seed {seed}, {variant}, w = {w}", run / f"s/cfg{w}")
        run = out / f"runs/before-{seed}"
        program("train.py", "--seed", seed, "--run", run, "--max-steps", 1, "--lr", 0, "--rank", 4,
                "--val-samples", 0, cwd=out)
        sample(run, seed)
        score(f"seed {seed}, before adaptation", run / "s/cfg1.3")

if __name__ == "__main__":
    main()
