"""Toy tissue: procedural H&E-like patches of colon in the paper's four classes, for a first run and tests.

Glands on a jittered lattice, nuclei as small dark ellipses, two stains mixed by Beer and Lambert's law,
I = 255 exp(-c_H h - c_E e). A slide has one class, one pair of stains and one scale; its patches differ in
the rest. Nothing here claims to be histology: it is a test pattern on which a person sees whether samples
follow their reference.

    python tests/tissue.py ldm/toy      # writes the sheets that train.py without --data cuts its patches from
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ldm.app import atomic_write        # noqa: E402
from ldm.data import CLASSES            # noqa: E402

SLIDES, PATCHES = 32, 7                 # of each class in the sheets: 896 patches

VIEW = 36       # side of a patch in the units that everything below is drawn in
# optical density of H and E (Ruifrok and Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])

def draw_slide(label, seed):
    """Class and seed -> what a slide's patches share: a dict of stains (2, 3), strength (2,), scale."""
    rng = np.random.default_rng([seed, label])
    stains = (STAINS + rng.normal(0, [[0.05] * 3, [0.06, 0.03, 0.06]])).clip(0.02)
    return dict(label=CLASSES[label], stains=stains / np.linalg.norm(stains, axis=1, keepdims=True),
                strength=rng.uniform(0.95, 1.4, 2), scale=rng.uniform(0.9, 1.15), rng=rng)

def draw_patch(slide, size=64):
    """The next patch of a slide -> PIL image (size, size)."""
    rng, kind = slide["rng"], slide["label"]
    y, x = (np.mgrid[:size, :size] + 0.5) * VIEW / size
    layers = dict(H=0.1 + 0.04 * noise(rng, x, y, 14), E=0.34 + 0.1 * noise(rng, x, y, 9),
                  clear=np.zeros_like(x))
    nuclei = []                                     # (x, y, half-length, half-width, angle, darkness)
    {"normal": normal, "serrated": serrated, "adenocarcinoma": adenocarcinoma, "adenoma": adenoma}[kind](
        rng, x, y, slide["scale"], layers, nuclei)
    for row in nuclei:
        ink_nucleus(layers["H"], x, y, *row)
    density = np.stack([layers["H"], layers["E"]]) * (1 - 0.93 * layers["clear"].clip(0, 1))
    density = density * slide["strength"][:, None, None]
    light = np.exp(-np.tensordot(slide["stains"].T, density.clip(0), 1))
    light = light + rng.normal(0, 0.012, (3, size, size))
    return Image.fromarray((255 * light.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0))

# ---- the four classes --------------------------------------------------------------------------------------

def normal(rng, x, y, scale, layers, nuclei):
    """A regular field of round crypts: a flower of pale goblet vacuoles in a dark row of basal nuclei."""
    layers["H"] *= 0.5                                              # pale all over
    stroma(rng, nuclei, 5)
    for cx, cy in lattice(rng, 16.5 * scale, 0.05):
        r = 7.2 * scale * rng.uniform(0.95, 1.05)
        rho, _ = polar(x, y, cx, cy, rng.uniform(0, 6), rng.uniform(1, 1.12))
        paint(layers, rho, r, H=0.6, E=0.4)
        hollow(layers, rho, 0.34 * r, 0.9)
        for a in np.arange(5) * np.pi / 2.5 + rng.uniform(0, 6):
            near, _ = polar(x, y, cx + 0.4 * r * np.cos(a), cy + 0.4 * r * np.sin(a), a, 1.2)
            hollow(layers, near, 0.25 * r, 0.9)
        ring(rng, nuclei, cx, cy, r, 0.86, 12, 1.6, 1.0, 0, 0.9)

def serrated(rng, x, y, scale, layers, nuclei):
    """Large crypts: the lumen a saw-toothed star, in broad pink epithelium with a sparse row of nuclei."""
    stroma(rng, nuclei, 12)
    for cx, cy in lattice(rng, 33 * scale, 0.1):
        r, teeth = 14.5 * scale * rng.uniform(0.92, 1.08), rng.integers(5, 8)
        rho, phi = polar(x, y, cx, cy, rng.uniform(0, 6), rng.uniform(1, 1.25))
        saw = np.abs((teeth * phi / (2 * np.pi)) % 1 * 2 - 1)       # 1 at the tips, 0 between them
        paint(layers, rho, r * (1 + 0.04 * np.cos(teeth * phi)), H=0.14, E=0.72)
        hollow(layers, rho, r * (0.22 + 0.54 * saw ** 1.2))
        ring(rng, nuclei, cx, cy, r, 0.91, 20, 1.3, 0.85, 0, 0.8)

def adenocarcinoma(rng, x, y, scale, layers, nuclei):
    """No order: ragged, dark, confluent islands, small torn lumens; large nuclei of all shapes everywhere."""
    layers["H"] += 0.18
    for cx, cy in lattice(rng, 24 * scale, 0.32):
        r = 11.5 * scale * rng.uniform(0.65, 1.25)
        rho, phi = polar(x, y, cx, cy, rng.uniform(0, 6), rng.uniform(1, 1.7))
        edge = 1 + sum(rng.normal(0, 0.16) * np.cos(m * phi + rng.uniform(0, 6)) for m in (2, 3, 5))
        paint(layers, rho, r * edge, H=0.32, E=0.4)
        if rng.random() < 0.25:
            hollow(layers, rho, r * 0.33 * edge ** 2, 0.85)
    for cx, cy in lattice(rng, 6.1 * scale, 0.3):
        w = rng.uniform(1.3, 2.4)
        nuclei.append((cx, cy, w * rng.uniform(1, 1.7), w, rng.uniform(0, 6), rng.uniform(0.7, 1.3)))

def adenoma(rng, x, y, scale, layers, nuclei):
    """Crowded long tubes in one direction, with a slit for a lumen and three staggered rows of nuclei."""
    direction = rng.uniform(0, np.pi)
    layers["H"] += 0.22                                             # dark all over
    stroma(rng, nuclei, 6)
    across, along = 20 * scale, 62 * scale
    c, s = np.cos(direction), np.sin(direction)
    for i in range(-3, 4):
        for j in range(-1, 2):
            u, v = (j + 0.5 * (i % 2) + rng.normal(0, 0.05)) * along, i * across + rng.normal(0, 0.8)
            cx, cy = VIEW / 2 + u * c - v * s, VIEW / 2 + u * s + v * c
            half, r = 0.47 * along, 8.6 * scale
            p, q = (x - cx) * c + (y - cy) * s, -(x - cx) * s + (y - cy) * c
            q = q + 1.2 * np.sin(p / 9 + i)                         # the tubes sway a little
            rho = np.hypot(np.maximum(np.abs(p) - half + r, 0), q)  # distance from the axis: a stadium
            paint(layers, rho, r, H=0.6, E=0.3)
            hollow(layers, rho, 0.13 * r + 0.5, 0.9)
            for row, side in [(row, side) for row in (0.45, 0.66, 0.86) for side in (-1, 1)]:
                for p0 in np.arange(-half, half, 3.1) + rng.uniform(0, 3.1):
                    q0 = side * r * row + rng.normal(0, 0.5) - 1.2 * np.sin(p0 / 9 + i)
                    nuclei.append((cx + p0 * c - q0 * s, cy + p0 * s + q0 * c,
                                   rng.uniform(1.7, 2.4), rng.uniform(0.75, 0.95),
                                   direction + np.pi / 2 + rng.normal(0, 0.2), rng.uniform(0.95, 1.15)))

# ---- strokes -----------------------------------------------------------------------------------------------

def lattice(rng, pitch, jitter, view=VIEW):
    """Centres of a jittered hexagonal lattice over the square, turned and shifted at random -> [(x, y)]."""
    angle, shift = rng.uniform(0, np.pi / 3), rng.uniform(-0.5, 0.5, 2)
    n = int(view / pitch) + 2
    i, j = np.mgrid[-n:n + 1, -n:n + 1].reshape(2, -1)
    uv = np.stack([i + j / 2, j * 3 ** 0.5 / 2]) + shift[:, None] + rng.normal(0, jitter, (2, len(i)))
    c, s = np.cos(angle), np.sin(angle)
    xy = view / 2 + pitch * np.array([[c, -s], [s, c]]) @ uv
    return xy.T[((xy > -pitch) & (xy < view + pitch)).all(0)]

def polar(x, y, cx, cy, angle, aspect):
    """Distance from a centre and angle around it, for an ellipse of this aspect turned by `angle`."""
    c, s = np.cos(angle), np.sin(angle)
    u, v = ((x - cx) * c + (y - cy) * s) / aspect ** 0.5, (-(x - cx) * s + (y - cy) * c) * aspect ** 0.5
    return np.hypot(u, v), np.arctan2(v, u)

def inside(rho, r):
    """1 within rho < r, 0 outside, with an edge about one unit wide."""
    return (r - rho + 0.5).clip(0, 1)

def paint(layers, rho, r, **stains):
    """Replace what is within by these amounts of stain."""
    m = inside(rho, r)
    for name, amount in stains.items():
        layers[name] += m * (amount - layers[name])
    layers["clear"] *= 1 - m

def hollow(layers, rho, r, share=1):
    layers["clear"] = np.maximum(layers["clear"], share * inside(rho, r))

def ring(rng, nuclei, cx, cy, r, at, n, length, width, radial, dark):
    """n nuclei in a row around a gland, at `at` of its radius."""
    for a in np.arange(n) * 2 * np.pi / n + rng.uniform(0, 6):
        nuclei.append((cx + at * r * np.cos(a), cy + at * r * np.sin(a),
                       length * rng.uniform(0.85, 1.15), width,
                       a + np.pi / 2 + radial + rng.normal(0, 0.15), dark * rng.uniform(0.85, 1.15)))

def stroma(rng, nuclei, n):
    """Sparse spindle nuclei; glands painted over them do not hide them, for nuclei come last."""
    for _ in range(n):
        nuclei.append((*rng.uniform(0, VIEW, 2), rng.uniform(1.2, 1.9), 0.6,
                       rng.uniform(0, 6), rng.uniform(0.4, 0.8)))

def ink_nucleus(h, x, y, cx, cy, length, width, angle, dark):
    scale = h.shape[0] / VIEW
    reach = 1.5 * length + 1
    rows, cols = (slice(max(0, int((c - reach) * scale)), max(0, int((c + reach) * scale) + 1))
                  for c in (cy, cx))
    x, y = x[rows, cols], y[rows, cols]
    if x.size:
        c, s = np.cos(angle), np.sin(angle)
        u, v = ((x - cx) * c + (y - cy) * s) / length, (-(x - cx) * s + (y - cy) * c) / width
        h[rows, cols] = np.maximum(h[rows, cols], dark * ((1.35 - np.hypot(u, v)) / 0.6).clip(0, 1))

def noise(rng, x, y, wavelength):
    """A smooth random field of mean 0 and about unit range: eight plane waves."""
    waves = [np.cos(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / (wavelength * f) + p)
             for a, f, p in rng.uniform((0, 0.7, 0), (np.pi, 1.6, 6.3), (8, 3))]
    return sum(waves) / 4

# ---- a dataset of it ---------------------------------------------------------------------------------------

def write_dataset(folder, slides, patches, size=64, seed=0):
    """folder/CLASS/SLIDE/patch.png: `slides` of each class with `patches` of each slide -> the folder.
    Slides that are whole are kept."""
    folder = Path(folder)
    for label, name in enumerate(CLASSES):
        for s in range(slides):
            slide = draw_slide(label, seed * 10_000 + s)
            paths = [folder / name / f"{name}-{s:03d}" / f"{p:02d}.png" for p in range(patches)]
            for path in paths if not all(map(Path.exists, paths)) else []:
                with atomic_write(path) as temporary:
                    draw_patch(slide, size).save(temporary)
    return folder

def draw_sheet(label, size=64):
    """All patches of a class, a slide in each row -> PIL image."""
    slides = [draw_slide(label, s) for s in range(SLIDES)]
    rows = [np.concatenate([np.asarray(draw_patch(slide, size)) for _ in range(PATCHES)], 1)
            for slide in slides]
    return Image.fromarray(np.concatenate(rows))

if __name__ == "__main__":
    for label, name in enumerate(CLASSES):
        draw_sheet(label).save(Path(sys.argv[1]) / f"{name}.jpg", quality=90, subsampling=0)
