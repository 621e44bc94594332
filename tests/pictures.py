"""Procedural pictures for the maker of the embedded base: shapes, cores, beads, spots in stain-like colours.

Everything is drawn for a batch at once, on any device. n pictures of SIZE x SIZE pixels; a world is what
several pictures share. None of it is toy tissue (tests/tissue.py), which shares no code with this file."""
import math

import torch
import torch.nn.functional as F

from train import generator

SIZE = 64
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))   # optical density of H and E (Ruifrok and Johnston 2001)

class Random:
    """Random tensors on a device, from a generator that the integers of `key` determine."""

    def __init__(self, device, *key):
        self.device, self.generator = device, torch.Generator(device)
        self.generator.manual_seed(generator(*key).initial_seed())

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, device=self.device, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(shape, device=self.device, generator=self.generator)

    def chance(self, p, *shape):
        return torch.rand(shape, device=self.device, generator=self.generator) < p

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

def draw_worlds(n, r):
    """What the pictures of n worlds share -> {name: (n, ...)}. Four successive worlds share their colours."""
    groups = -(-n // 4)
    dyes = (torch.tensor(STAINS, device=r.device) + 0.12 * r.normal(groups, 2, 3)).clamp(min=0.02)
    dyes = F.normalize(dyes, dim=-1) * r.uniform(0.7, 1.3, groups, 2, 1)
    ground = torch.stack([r.uniform(0, 0.45, groups), r.uniform(0.05, 0.7, groups)], 1)
    dyes, ground = (x.repeat_interleave(4, 0)[:n] for x in (dyes, ground))
    world = dict(dyes=dyes, ground=ground, roughness=r.uniform(0, 0.12, n),
                 wavelength=torch.exp(r.uniform(2, 3.6, n)), shapes=draw_shapes(n, r),
                 body=draw_ink(n, r, ground), beads=draw_ink(n, r, ground, dark=0.6),
                 layers=[draw_lattice(n, r, 5, 12) for _ in range(2)])
    bright = r.uniform(0, 0.08, n, 2)
    world["core"] = torch.where(r.chance(0.6, n, 1), bright, draw_ink(n, r, world["body"]))
    for layer, share in zip(world["layers"], (0.7, 0.45)):
        aligned = r.chance(0.4, n)                  # rows of spots along or across the shapes
        layer["turn"] = torch.where(aligned, 0.0, layer["turn"])
        layer["jitter"] = torch.where(aligned, 0.15, layer["jitter"])
        layer |= dict(ink=draw_ink(n, r, world["body"], dark=0.6), where=r.integers(0, 5, n),
                      used=r.chance(share, n))
    return world

def draw_ink(n, r, under, dark=0.3):
    """Amounts of the two dyes (n, 2), at one of four levels; darker where they hardly differ from `under`."""
    levels = torch.tensor([0.0, 0.2, 0.5, 1.0], device=r.device)
    ink = levels[r.integers(0, 4, n, 2)] * r.uniform(0.8, 1.2, n, 2)
    ink[:, 0] += torch.where((ink - under).abs().sum(1) < 0.35, dark + 0.3, 0.0)
    return ink

def draw_lattice(n, r, smallest, largest):
    """A jittered lattice of round or oval shapes: pitch in pixels, size, direction -> {name: (n,)}."""
    pitch = torch.exp(r.uniform(math.log(smallest), math.log(largest), n))
    return dict(
        pitch=pitch, jitter=r.uniform(0.02, 0.3, n), radius=pitch * r.uniform(0.3, 0.48, n),
        share=torch.where(r.chance(0.75, n), 1.0, r.uniform(0.5, 1, n)), spread=r.uniform(0.03, 0.2, n),
        aspect=1 + r.uniform(0, 1, n) ** 2, turn=r.uniform(0, math.pi, n), aligned=r.chance(0.5, n),
        stretch=torch.ones(n, device=r.device), sway=r.uniform(0, 2.5, n))

def draw_shapes(n, r):
    """The lattice of large shapes, with outlines, cores and beads; three in ten are tubes."""
    layer, tubes = draw_lattice(n, r, 18, 64), r.chance(0.3, n)

    def often(p, low, high):                        # else 0
        return torch.where(r.chance(p, n), r.uniform(low, high, n), 0.0)

    return layer | dict(
        stretch=torch.where(tubes, r.uniform(2, 5, n), 1.0), aligned=layer["aligned"] | tubes,
        lobes=r.integers(2, 10, n), wave=often(0.35, 0.05, 0.3), pointed=r.chance(0.5, n),
        core=often(0.88, 0.15, 0.85), core_lobes=r.integers(2, 10, n), core_wave=often(0.65, 0.1, 0.6),
        core_pointed=r.chance(0.5, n), beads=torch.where(r.chance(0.5, n), 0, r.integers(7, 26, n)),
        bead_at=r.uniform(0.75, 1, n), bead_length=r.uniform(1.4, 4, n), bead_width=r.uniform(1.1, 2.4, n))

def draw_pictures(world, r):
    """A picture of each world -> x (n, 3, SIZE, SIZE) in [-1, 1]. Dyes mix by Beer and Lambert's law."""
    n = len(world["ground"])
    angle, sway = r.uniform(0, 2 * math.pi, n), r.uniform(0, 2 * math.pi, n)
    fields = torch.stack([draw_field(world["wavelength"], r) for _ in range(2)], 1)
    ink = world["ground"][:, :, None, None] + world["roughness"][:, None, None, None] * fields
    body, core, beads = draw_masks(world["shapes"], angle, sway, r)
    ink = paint(paint(ink, body, world["body"]), core, world["core"])
    for layer in world["layers"]:
        places = torch.stack([torch.ones_like(body), body - core, body - core, 1 - body, core]).clamp(0, 1)
        where = places[layer["where"], torch.arange(n, device=r.device)] * layer["used"][:, None, None]
        ink = paint(ink, where * draw_masks(layer, angle, sway, r)[0], layer["ink"])
    ink = paint(ink, beads, world["beads"])
    light = torch.exp(-torch.einsum("ndc,ndhw->nchw", world["dyes"], ink.clamp(min=0)))
    return (light + 0.008 * r.normal(*light.shape)).clamp(0, 1) * 2 - 1

def paint(ink, mask, colour):
    """ink (n, 2, SIZE, SIZE) moved to colour (n, 2) where mask (n, SIZE, SIZE) is 1."""
    return ink + mask[:, None] * (colour[:, :, None, None] - ink)

def pixels(device):
    """x and y (1, SIZE, SIZE) of the pixels, from the centre."""
    at = torch.arange(SIZE, device=device) - (SIZE - 1) / 2
    return at[None, None, :], at[None, :, None]

def draw_field(wavelength, r):
    """A smooth random field (n, SIZE, SIZE) of mean 0 and about unit range: eight plane waves."""
    (x, y), n, total = pixels(r.device), len(wavelength), 0
    for _ in range(8):
        angle, phase = r.uniform(0, math.pi, n, 1, 1), r.uniform(0, 2 * math.pi, n, 1, 1)
        length = wavelength[:, None, None] * r.uniform(0.5, 1.5, n, 1, 1)
        total = total + torch.cos(2 * math.pi * (x * angle.cos() + y * angle.sin()) / length + phase)
    return total / 4

def draw_masks(layer, angle, sway, r):
    """Where a layer's shapes, their cores and the beads on their rims are -> three (n, SIZE, SIZE) in 0..1.

    Every pixel looks at the nine lattice cells around it (Worley 1996), so the cost does not depend on how
    many shapes there are; what is random of a cell is a hash of its place."""
    p = {name: v[:, None, None, None] for name, v in layer.items() if v.ndim == 1}
    n, (x, y) = len(angle), pixels(r.device)
    turn = (angle + layer["turn"])[:, None, None]
    along, across = x * turn.cos() + y * turn.sin(), -x * turn.sin() + y * turn.cos()
    across = across + layer["sway"][:, None, None] * torch.sin(along / 14 + sway[:, None, None])
    pitch = layer["pitch"][:, None, None]
    cell = torch.stack([along / (pitch * layer["stretch"][:, None, None]), across / pitch], 1)
    cell = cell + r.uniform(0, 100, n, 2, 1, 1)
    near = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).T.to(r.device)
    home = cell[:, :, None].floor() + near[None, :, :, None, None]              # (n, 2, 9, SIZE, SIZE)
    primes = ((12.9898, 78.233), (39.346, 11.135), (73.156, 52.235), (27.17, 61.41), (5.31, 93.97))
    hashed = [torch.frac(torch.sin(home[:, 0] * a + home[:, 1] * b) * 43758.5453).abs() for a, b in primes]
    centre = [home[:, k] + 0.5 + p["jitter"] * (hashed[k] - 0.5) for k in (0, 1)]
    offset = [(cell[:, k, None] - centre[k]) * p["pitch"] for k in (0, 1)]
    radius = p["radius"] * torch.exp(p["spread"] * 2 * (hashed[2] - 0.5))
    spin = torch.where(p["aligned"], 0.0, hashed[3] * 2 * math.pi)
    u, v = offset[0] * p["stretch"], offset[1]
    u, v = u * spin.cos() + v * spin.sin(), -u * spin.sin() + v * spin.cos()
    axis = (u.abs() - 0.47 * p["pitch"] * (p["stretch"] - 1)).clamp(min=0)      # a long cell holds a capsule
    u, v = u.sign() * axis / p["aspect"].sqrt(), v * p["aspect"].sqrt()
    rho, phi, there = torch.hypot(u, v), torch.atan2(v, u), hashed[4] < p["share"]

    def inside(radius):
        return ((radius - rho + 0.5).clamp(0, 1) * there).amax(1)

    if "core" not in layer:
        return inside(radius), None, None
    edge = radius * outline(phi, p["lobes"], p["wave"], p["pointed"])
    inner = radius * outline(phi, p["core_lobes"], p["core_wave"], p["core_pointed"]) * p["core"]
    step = 2 * math.pi / p["beads"].clamp(min=1)
    tangent, radial = rho * (phi - (phi / step).round() * step), rho - p["bead_at"] * edge
    bead = (1 - torch.hypot(tangent / p["bead_length"], radial / p["bead_width"])) * p["bead_width"]
    return inside(edge), inside(inner), ((bead + 0.5).clamp(0, 1) * there * (p["beads"] > 0)).amax(1)

def outline(phi, lobes, wave, pointed):
    """Distance from the centre at these angles, 1 on average: round, wavy or a star."""
    star = 1 - 4 * (torch.remainder(lobes * phi / (2 * math.pi), 1) - 0.5).abs()
    return 1 + wave * torch.where(pointed, star, torch.cos(lobes * phi))
