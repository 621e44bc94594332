"""Makes the toy base: a small VAE, encoder and U-Net of the very classes that load Stable Diffusion 1.5 and UNI2-h.

They are trained on pictures of shapes and textures in stain-like colours, never on toy tissue: the base plays SD1.5's part,
which knows images in general, and is brought to tissue by LoRA and projector alone.

    python -m ldm.toy.base OUT                  # an hour and a half on 2 cores; goes on where it was interrupted
    python -m ldm.toy.base OUT --scale 0.001    # the same in a minute, to see that it works

OUT becomes a folder for --sd15 and --uni2h: unet/, vae/ and model.safetensors (the encoder) in float16, and log.csv.
"""
import math
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from projector import Projector
from train import draw_noise, generator, noise_prediction_loss

from ..app import Fail, Parser, number, read_csv, run_program, save_tensors, save_text
from ..encoder import Encoder, build_encoder, preprocess
from ..schedule import T, alpha_bar
from ..unet import UNet
from ..vae import SCALE, VAE, draw_latent
from ..weights import TensorFile, load_vae
from .tissue import STAINS, inside, lattice, noise, polar

SIZE = 64
WORLDS, PER_WORLD = 4000, 4         # 16,000 pictures of each kind; every four worlds that follow each other share their colours
HELD_OUT = 64                       # worlds kept for the validation losses, at most half of all
VAE_SHAPE = dict(channels=(32, 64, 64), layers=1)               # 4 x 4 pixels to one latent pixel
UNET_SHAPE = dict(channels=(64, 96, 128), layers=1, context=128)
ENCODER_SHAPE = dict(width=192, depth=2)
STEPS = dict(vae=2000, encoder=1000, unet=12000, details=9000)
RATE = dict(vae=1e-3, encoder=5e-4, unet=1e-3, details=1e-3)
PICTURES, FIT_VAE, FIT_ENCODER, FIT_UNET = range(10, 14)        # first keys of the random streams


# ---- pictures --------------------------------------------------------------------------------------------------------

def draw_world(index):
    """What the pictures of one world share: colours, ground, a layer of large shapes and of small spots on them -> dict.

    From WORLDS on the shapes are regular, their cores may have an outline of their own, and there are more spots.
    """
    colours, rng = np.random.default_rng([PICTURES, 1, index // 4, 1]), np.random.default_rng([PICTURES, 2, index, 1])
    stain_like = STAINS + colours.normal(0, 0.12, (2, 3))
    dyes = stain_like.clip(0.02) / np.linalg.norm(stain_like.clip(0.02), axis=1, keepdims=True)
    ground = colours.uniform((0, 0.1), (0.4, 0.6))
    spots = draw_layer(rng, ground, 5, 11) | dict(kind="shapes", rim=0, where=rng.integers(0, 3))
    world = dict(dyes=dyes * colours.uniform(0.7, 1.3, (2, 1)), ground=ground, wavelength=np.exp(rng.uniform(2, 3.5)),
                 roughness=rng.uniform(0, 0.15), shapes=draw_layer(rng, ground, 22, 60), spots=[spots] if rng.random() < 0.5 else [])
    if index >= WORLDS:
        shapes = world["shapes"]
        shapes |= dict(kind=rng.choice(["shapes", "stripes"], p=[0.75, 0.25]), jitter=rng.choice([0.05, 0.12]), share=1, spread=0.05,
                       radius=shapes["pitch"] * rng.uniform(0.36, 0.52), rim=rng.choice([0, rng.uniform(0.12, 0.8)], p=[0.15, 0.85]),
                       aspect=np.exp(rng.exponential(0.15)), inner=draw_layer(rng, ground, 22, 60) if rng.random() < 0.5 else shapes["inner"])
        world["spots"] = [draw_layer(rng, shapes[under], 4.5, 9) | dict(kind="shapes", rim=0, spread=0.1, share=1, where=where)
                          for under, where in (("body", 3), (rng.choice(["body", "ground"]), rng.integers(0, 5))) if rng.random() < 0.5]
    return world


def draw_layer(rng, ground, smallest, largest):
    """One kind of shape: where, how large, how long, how wavy its outline, with a rim or full, and in which inks."""
    pitch, body = np.exp(rng.uniform(np.log(smallest), np.log(largest))), draw_ink(rng, ground)
    layer = dict(
        kind=rng.choice(["shapes", "stripes", "cells"], p=[0.72, 0.2, 0.08]), pitch=pitch, jitter=rng.choice([0.05, 0.12, 0.3]),
        share=rng.choice([1, rng.uniform(0.4, 1)]), radius=pitch * rng.uniform(0.28, 0.52), spread=rng.choice([0.05, 0.25]),
        aspect=np.exp(rng.exponential(0.35)), aligned=rng.random() < 0.5, lobes=rng.integers(2, 10),
        wave=rng.choice([0, rng.uniform(0.05, 0.6)]), pointed=rng.random() < 0.5, rim=rng.choice([0, rng.uniform(0.15, 0.75)], p=[0.3, 0.7]),
        body=body, ground=ground, core=draw_ink(rng, body) if rng.random() < 0.6 else None)
    return layer | dict(inner=layer)


def draw_ink(rng, under):
    """Amounts of the two dyes (2,) that stand out from what is under them."""
    while True:
        ink = rng.choice([0, 0.2, 0.5, 1.0], 2) * rng.uniform(0.8, 1.2, 2)
        if np.abs(ink - under).sum() > 0.4:
            return ink


def draw_picture(world, rng):
    """A picture of a world -> uint8 (SIZE, SIZE, 3)."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    ink = np.stack([g + world["roughness"] * noise(rng, x, y, world["wavelength"]) for g in world["ground"]])
    body, core = draw_masks(world["shapes"], rng, x, y)
    paint(ink, body, world["shapes"]["body"])
    if world["shapes"]["core"] is not None:
        paint(ink, core, world["shapes"]["core"])
    for spots in world["spots"]:
        where = (1, body, 1 - body.clip(0, 1), (body - core).clip(0), core)[spots["where"]]     # all over, in, around, on the rim, in the core
        paint(ink, where * draw_masks(spots, rng, x, y)[0], spots["body"])
    light = np.exp(-np.tensordot(world["dyes"].T, ink.clip(0), 1)) + rng.normal(0, 0.01, (3, SIZE, SIZE))
    return (255 * light.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)


def paint(ink, mask, colour):
    ink += mask * (colour[:, None, None] - ink)


def draw_masks(layer, rng, x, y):
    """Where a layer's shapes and their cores are -> two (SIZE, SIZE) in 0..1. Shapes without a core of their own are hollow."""
    mask, core = np.zeros_like(x), np.zeros_like(x)
    direction, hollow = rng.uniform(0, np.pi), layer["rim"] and layer["core"] is None
    if layer["kind"] == "shapes":
        for cx, cy in lattice(rng, layer["pitch"], layer["jitter"], SIZE):
            if rng.random() < layer["share"]:
                add_shape(mask, core, rng, layer, cx, cy, direction if layer["aligned"] else rng.uniform(0, np.pi))
    elif layer["kind"] == "stripes":
        across = x * np.cos(direction) + y * np.sin(direction) + 0.5 * layer["wave"] * layer["radius"] * noise(rng, x, y, 2 * layer["pitch"])
        rho = np.abs((across + rng.uniform(0, 99)) % layer["pitch"] - layer["pitch"] / 2)
        mask = inside(rho, 0.8 * layer["radius"])
        core = inside(rho, 0.8 * layer["radius"] * (1 - layer["rim"])) * (layer["rim"] > 0)
    else:
        centres = np.array(lattice(rng, layer["pitch"], max(layer["jitter"], 0.15), SIZE))
        near = np.partition(np.hypot(*(np.stack([x, y])[:, None] - centres.T[:, :, None, None])), 1, axis=0)[:2]
        mask = inside(near[1] - near[0], 0.5 + 0.2 * layer["radius"])
        hollow = False
    return (mask - core).clip(0) if hollow else mask, core


def add_shape(mask, core, rng, layer, cx, cy, angle):
    """Add one shape to the mask, and its inner part, a smaller copy, to the core; without a core a rim makes it hollow."""
    r = layer["radius"] * np.exp(rng.normal(0, layer["spread"]))
    reach = r * (1 + layer["wave"]) * layer["aspect"] ** 0.5 + 2
    rows, cols = (slice(*np.clip([int(c - reach), int(c + reach) + 1], 0, SIZE)) for c in (cy, cx))
    y, x = np.mgrid[rows, cols] + 0.5
    if x.size:
        rho, phi = polar(x, y, cx, cy, angle, layer["aspect"])
        mask[rows, cols] = np.maximum(mask[rows, cols], inside(rho, r * outline(layer, phi)))
        if layer["rim"]:
            core[rows, cols] = np.maximum(core[rows, cols], inside(rho, r * outline(layer["inner"], phi) * (1 - layer["rim"])))


def outline(layer, phi):
    """Distance from the centre at these angles, 1 on average: round, wavy or a star."""
    swing = np.abs((layer["lobes"] * phi / (2 * np.pi)) % 1 * 2 - 1) * 2 - 1 if layer["pointed"] else np.cos(layer["lobes"] * phi)
    return 1 + layer["wave"] * swing


def pictures_of(index):
    world, rng = draw_world(index), np.random.default_rng([PICTURES, 3, index, 1])
    return np.stack([draw_picture(world, rng) for _ in range(PER_WORLD)])


@cache      # VAE, encoder and U-Net take the same ones
def make_pictures(first, worlds):
    """-> uint8 (worlds, PER_WORLD, SIZE, SIZE, 3), from world `first` on; not to be changed."""
    with ProcessPoolExecutor() as pool:
        made = pool.map(pictures_of, range(first, first + worlds), chunksize=16)
        return np.stack(list(tqdm(made, "pictures", worlds, disable=None)))


def hold_out(pictures):
    """-> (those to train on, those to validate on), by worlds."""
    n = min(HELD_OUT, len(pictures) // 2)
    return pictures[:-n], pictures[-n:]


def as_batch(pictures):
    """uint8 (B, H, W, 3) -> x (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- fitting -----------------------------------------------------------------------------------------------------------

class Float32(TorchFunctionMode):
    """Group norm and attention in float32 under autocast: on the CPU they are slower in bfloat16, the former five times."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.scaled_dot_product_attention):
            with torch.autocast("cpu", enabled=False):
                return function(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def fit(name, network, loss, steps, rate, out, validate, log):
    """Adam on loss(step), with a short warm-up and a cosine to zero; goes on from OUT/NAME.state.safetensors."""
    network.train().requires_grad_()
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    path, start, running = out / f"{name}.state.safetensors", 0, []
    if path.exists():
        file = TensorFile(path)
        start = int(file.header["step"])
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(file.get(n))
                optimizer.state[p] = {"step": torch.tensor(float(start))} | {
                    k: file.get(f"{k}/{n}").clone() for k in ("exp_avg", "exp_avg_sq")}
    warm_up, every = min(200, steps // 4 + 1), max(1, min(250, steps // 4))
    for step in (bar := tqdm(range(start, steps), name, steps, start, disable=None)):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16), Float32():
            value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        running.append(value.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            log.append(dict(network=name, step=step + 1, loss=f"{np.mean(running):.4f}", validation=f"{validate():.4f}"))
            running = []
            bar.write(str(log[-1]))
            moments = {f"{k}/{n}": optimizer.state[p][k] for n, p in parameters.items() for k in ("exp_avg", "exp_avg_sq")}
            save_tensors(path, {**parameters, **moments}, {"step": str(step + 1)})
            save_text(out / "log.csv", "network,step,loss,validation\n" + "".join(",".join(map(str, r.values())) + "\n" for r in log))
    return network.eval().requires_grad_(False)


def small_picture(x, factor):
    """x (B, 3, H, W) -> (B, 3, H/factor, W/factor): the averages, their contrast raised above that of the picture's mean."""
    small = F.avg_pool2d(x, factor)
    mean = small.mean((2, 3), keepdim=True)
    return 4 * (small - mean) + 2 * (mean - torch.tensor([0.55, 0.1, 0.7])[:, None, None])


def fit_vae(pictures, steps, out, log):
    """L1 at full and at an eighth of the resolution (which holds the hues), a light KL term, and latents that are a small picture.

    Three channels are held to the averages of 4 x 4 pixels; only the fourth is free, for detail, and half as strong at the end.
    A U-Net as small as this learns shapes from such latents, and none from free ones, which are rough.
    """
    torch.manual_seed(FIT_VAE)
    train, held = hold_out(pictures)
    vae, flat, held = VAE(**VAE_SHAPE), train.reshape(-1, SIZE, SIZE, 3), as_batch(held[:, 0])

    def loss(step):
        g = generator(FIT_VAE, step)
        x = as_batch(flat[torch.randint(len(flat), (16,), generator=g).numpy()])
        mean, logvar = (part.float() for part in vae.encode(x))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        tie = (SCALE * mean[:, :3] - small_picture(x, vae.factor)).square().mean()
        error = vae.decode(draw_latent(mean, logvar, torch.randn(mean.shape, generator=g))) - x
        return error.abs().mean() + F.avg_pool2d(error, 8).abs().mean() + tie + 5e-5 * kl

    @torch.no_grad()
    def validate():
        """Reconstruction of held-out worlds in dB (peak signal-to-noise ratio)."""
        error = (vae.decode(vae.encode(held)[0] * SCALE).clamp(-1, 1) - held).square().mean((1, 2, 3))
        return (10 * torch.log10(4 / error)).mean().item()

    fit("vae", vae, loss, steps("vae"), RATE["vae"], out, validate, log)
    with torch.no_grad():           # exactly the same autoencoder, with other units for the channel of detail
        mean = torch.cat([vae.encode(as_batch(part))[0] for part in np.array_split(flat[::max(1, len(flat) // 512)], 8)])
        shift, scale = mean.mean((0, 2, 3)), 0.5 / (SCALE * mean.std((0, 2, 3)))
        shift[:3], scale[:3] = 0, 1
        n = vae.latent
        vae.quant_conv.weight[:n] *= scale[:, None, None, None]
        vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - shift) * scale
        vae.quant_conv.bias[n:] += 2 * scale.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
        vae.post_quant_conv.weight /= scale[None, :, None, None]
    return vae


def fit_encoder(pictures, steps, out, log):
    """Two pictures of one world are alike (InfoNCE, van den Oord et al. 2018); four worlds of the same colours stand side by
    side in every batch, so that colour alone does not tell. A random quarter of the tokens is seen at a time."""
    import timm
    torch.manual_seed(FIT_ENCODER)
    encoder, groups = build_encoder(**ENCODER_SHAPE), len(hold_out(pictures)[0]) // 4
    encoder.patch_drop = timm.layers.PatchDropout(0.75, num_prefix_tokens=encoder.num_prefix_tokens)

    def agreement(worlds, g):
        pair = [pictures[w, torch.randperm(PER_WORLD, generator=g)[:2].numpy()] for w in worlds]
        e = encoder(preprocess([Image.fromarray(p) for k in (0, 1) for p in (pair_[k] for pair_ in pair)]))
        a, b = F.normalize(e.float(), dim=-1).chunk(2)
        similarity, target = a @ b.T / 0.1, torch.arange(len(a))
        return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

    def loss(step):
        g = generator(FIT_ENCODER, step)
        chosen = torch.randperm(groups, generator=g)[:8]
        return agreement([4 * c + k for c in chosen.tolist() for k in range(4)], g)

    @torch.no_grad()
    def validate():
        encoder.eval()
        value = agreement(range(len(pictures) - 32, len(pictures)), generator(0)).item()
        encoder.train()
        return value

    torch.manual_seed(FIT_ENCODER)      # PatchDropout draws from the global generator
    return fit("encoder", encoder, loss, steps("encoder"), RATE["encoder"], out, validate, log)


def fit_unet(worlds, vae, encoder, steps, out, log):
    """Algorithm 1 with everything trainable, through a projector that is then thrown away: first plain shapes, then detailed ones.

    Noise is weighed by what it says of the picture. At high t the error of ẑ_0 is 1/ᾱ times that of ε, and there alone can the
    condition lower it much: an earlier base, unweighted, did not learn to use it. At low t little can be learnt and the loss is large:
    min(1, 5/SNR) (Hang et al. 2023). The timesteps of a batch are spread evenly.
    """
    torch.manual_seed(FIT_UNET)
    unet, projector = UNet(**UNET_SHAPE), Projector(ENCODER_SHAPE["width"], 256, 4, UNET_SHAPE["context"])
    both = torch.nn.ModuleDict({"unet": unet, "projector": projector}).to(memory_format=torch.channels_last)
    a = alpha_bar().float()
    weight = (5 * (1 - a) / a).clamp(max=1) * (1 / a).clamp(max=50)

    def stage(name, first):
        @cache
        def data():
            flat, rows = make_pictures(first, worlds).reshape(-1, SIZE, SIZE, 3), []
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                for i in tqdm(range(0, len(flat), 64), "latents and embeddings", disable=None):
                    part = flat[i:i + 64]
                    rows.append((*vae.encode(as_batch(part)), encoder(preprocess([Image.fromarray(p) for p in part]))))
            return [torch.cat(column).float() for column in zip(*rows)]

        held = len(hold_out(range(worlds))[1]) * PER_WORLD

        def loss(step, at=None, p=0.1):
            g, (mean, logvar, e) = generator(FIT_UNET, step), data()
            at = torch.randint(len(e) - held, (16,), generator=g) if at is None else at
            r = draw_noise(g, len(at), mean.shape[1:], p, hidden=(1, 256))
            r.t = ((torch.arange(len(at)) + torch.rand(len(at), generator=g)) * T / len(at)).long()
            return (weight[r.t] * noise_prediction_loss(unet, projector, mean[at], logvar[at], e[at], r)).mean()

        @torch.no_grad()
        def validate():
            n = len(data()[0])
            return loss(10 ** 9, torch.arange(n - held, n, 2), p=0).item()

        fit(name, both, loss, steps(name), RATE[name], out, validate, log)

    stage("unet", 0)
    stage("details", WORLDS)
    return unet


# ---- the program -------------------------------------------------------------------------------------------------------

FILES = dict(vae="vae/diffusion_pytorch_model.safetensors", encoder="model.safetensors", unet="unet/diffusion_pytorch_model.safetensors")


def main():
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--scale", type=number(float, 0, 1), default=1.0, help="of the number of worlds and steps")
    parser.add_argument("--only", nargs="+", choices=FILES, default=list(FILES), help="parts to make (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "log.csv"
    log = read_csv(path)
    for name in ("vae", "encoder"):
        if "unet" in args.only and name not in args.only and not (args.out / FILES[name]).exists():
            raise Fail(f"the U-Net needs {args.out / FILES[name]}: make it first (--only {name})")
    worlds, done = max(64, 4 * int(args.scale * WORLDS / 4)), {}

    def steps(name):
        return max(2, int(args.scale * STEPS[name]))

    makers = dict(vae=lambda *rest: fit_vae(make_pictures(0, worlds), *rest), encoder=lambda *rest: fit_encoder(make_pictures(0, worlds), *rest),
                  unet=lambda *rest: fit_unet(worlds, done["vae"], done["encoder"], *rest))
    loaders = dict(vae=load_vae, encoder=lambda file: Encoder(file).load())
    for name, file in FILES.items():
        path = args.out / file
        if name in args.only and not path.exists():
            network = makers[name](steps, args.out, log)
            save_tensors(path, {n: t.half() for n, t in network.state_dict().items()}, {"format": "pt"})
        if name in loaders and path.exists():
            done[name] = loaders[name](TensorFile(path))


if __name__ == "__main__":
    run_program(main)
