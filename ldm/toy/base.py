"""Makes the toy base: a small VAE, encoder and U-Net of the very classes that load Stable Diffusion 1.5 and UNI2-h.

They are trained on pictures of shapes and textures in stain-like colours, never on toy tissue: the base plays SD1.5's part,
which knows images in general, and is brought to tissue by LoRA and projector alone.

    python -m ldm.toy.base OUT                  # hours on 2 cores; goes on where it was interrupted
    python -m ldm.toy.base OUT --scale 0.001    # the same in a minute, to see that it works

OUT becomes a folder for --sd15 and --uni2h: unet/, vae/ and model.safetensors (the encoder) in float16, and log.csv.
"""
import csv
import math
from functools import partial
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from projector import Projector, build_encoder, load_encoder, preprocess
from train import draw, generator, noise_prediction_loss

from ..files import Fail, Parser, number, run, save_tensors, save_text
from ..schedule import alpha_bar
from ..unet import UNet
from ..vae import SCALE, VAE
from ..weights import TensorFile, load_vae
from .tissue import STAINS, inside, lattice, noise, polar

SIZE = 64
WORLDS, PER_WORLD = 4000, 4         # 16,000 pictures; every four worlds that follow each other share their colours
HELD_OUT = 64                       # worlds kept for the validation losses, at most half of all
VAE_SHAPE = dict(channels=(32, 64, 64), layers=1)               # 4 x 4 pixels to one latent pixel
UNET_SHAPE = dict(channels=(64, 96, 128), layers=1, context=128)
ENCODER_SHAPE = dict(width=192, depth=2)
STEPS = dict(vae=4500, encoder=1500, unet=14000)
RATE = dict(vae=1e-3, encoder=5e-4, unet=5e-4)
PICTURES, FIT_VAE, FIT_ENCODER, FIT_UNET = range(10, 14)        # first keys of the random streams


# ---- pictures --------------------------------------------------------------------------------------------------------

def draw_world(index):
    """What the pictures of one world share: colours, ground, one layer of shapes, and at times finer ones on it -> dict."""
    colours, rng = np.random.default_rng([PICTURES, 1, index // 4, 1]), np.random.default_rng([PICTURES, 2, index, 1])
    stain_like = STAINS + colours.normal(0, 0.12, (2, 3))
    dyes = stain_like if colours.random() < 0.8 else colours.uniform(0, 1, (2, 3))
    dyes = dyes.clip(0.02) / np.linalg.norm(dyes.clip(0.02), axis=1, keepdims=True)
    return dict(
        dyes=dyes * colours.uniform(0.6, 1.4, (2, 1)), ground=colours.uniform((0, 0.1), (0.4, 0.6)),
        wavelength=np.exp(rng.uniform(2, 3.5)), roughness=rng.uniform(0, 0.25),
        layers=[draw_layer(rng, 12, 44)] + [draw_layer(rng, 5, 16) for _ in range(rng.integers(0, 2))])


def draw_layer(rng, smallest, largest):
    """One kind of shape: where, how large, how long, how wavy its outline, full, hollow or with a core, and in which inks."""
    kind = rng.choice(["shapes", "stripes", "cells"], p=[0.75, 0.15, 0.1])
    pitch = np.exp(rng.uniform(np.log(smallest), np.log(largest)))
    return dict(
        kind=kind, pitch=pitch, jitter=rng.choice([0.05, 0.15, 0.4]), share=rng.uniform(0.3, 1), radius=pitch * rng.uniform(0.2, 0.55),
        spread=rng.uniform(0, 0.3), aspect=np.exp(rng.exponential(0.4)), aligned=rng.random() < 0.5, lobes=rng.integers(2, 10),
        wave=rng.choice([0, rng.uniform(0.05, 0.6)]), pointed=rng.random() < 0.5, rim=rng.choice([0, rng.uniform(0.15, 0.5)]),
        ink=draw_ink(rng), core=draw_ink(rng) if rng.random() < 0.5 else None, opaque=rng.uniform(0.7, 1))


def draw_ink(rng):
    return rng.choice([0, 0.1, 0.4, 0.9], 2) * rng.uniform(0.8, 1.2, 2)


def draw_picture(world, rng):
    """A picture of a world -> uint8 (SIZE, SIZE, 3)."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    ink = np.stack([g + world["roughness"] * noise(rng, x, y, world["wavelength"]) for g in world["ground"]])
    for layer in world["layers"]:
        mask, core = np.zeros_like(x), np.zeros_like(x)
        direction = rng.uniform(0, np.pi)
        if layer["kind"] == "shapes":
            for cx, cy in lattice(rng, layer["pitch"], layer["jitter"], SIZE):
                if rng.random() < layer["share"]:
                    add_shape(mask, core, rng, layer, cx, cy, direction if layer["aligned"] else rng.uniform(0, np.pi))
        elif layer["kind"] == "stripes":
            across = x * np.cos(direction) + y * np.sin(direction) + layer["wave"] * layer["pitch"] * noise(rng, x, y, 3 * layer["pitch"])
            mask = inside((across % layer["pitch"]), layer["radius"])
        else:
            centres = np.array(lattice(rng, max(layer["pitch"], 8), max(layer["jitter"], 0.15), SIZE))
            near = np.partition(np.hypot(*(np.stack([x, y])[:, None] - centres.T[:, :, None, None])), 1, axis=0)[:2]
            mask = inside(near[1] - near[0], 0.5 + 0.15 * layer["radius"])
        for m, colour in ((mask, layer["ink"]), (core, layer["core"])):
            if colour is not None:
                ink += layer["opaque"] * m * (colour[:, None, None] - ink)
    light = np.exp(-np.tensordot(world["dyes"].T, ink.clip(0), 1)) + rng.normal(0, 0.01, (3, SIZE, SIZE))
    return (255 * light.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)


def add_shape(mask, core, rng, layer, cx, cy, angle):
    """Add one shape to the mask, and its inner part, a smaller copy, to the core; without a core a rim makes it hollow."""
    r = layer["radius"] * np.exp(rng.normal(0, layer["spread"]))
    reach = r * (1 + layer["wave"]) * layer["aspect"] ** 0.5 + 2
    rows, cols = (slice(*np.clip([int(c - reach), int(c + reach) + 1], 0, SIZE)) for c in (cy, cx))
    y, x = np.mgrid[rows, cols] + 0.5
    if x.size:
        rho, phi = polar(x, y, cx, cy, angle, layer["aspect"])
        swing = np.abs((layer["lobes"] * phi / (2 * np.pi)) % 1 * 2 - 1) * 2 - 1 if layer["pointed"] else np.cos(layer["lobes"] * phi)
        edge = r * (1 + layer["wave"] * swing)
        inner = inside(rho, edge * (1 - layer["rim"])) if layer["rim"] else 0
        mask[rows, cols] = np.maximum(mask[rows, cols], inside(rho, edge) - (inner if layer["core"] is None else 0))
        core[rows, cols] = np.maximum(core[rows, cols], inner)


def pictures_of(index):
    world, rng = draw_world(index), np.random.default_rng([PICTURES, 3, index, 1])
    return np.stack([draw_picture(world, rng) for _ in range(PER_WORLD)])


def make_pictures(worlds):
    """-> uint8 (worlds, PER_WORLD, SIZE, SIZE, 3)."""
    with ProcessPoolExecutor() as pool:
        return np.stack(list(tqdm(pool.map(pictures_of, range(worlds), chunksize=16), "pictures", worlds, disable=None)))


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


def fit_vae(pictures, steps, out, log):
    """L1 at full and at an eighth of the resolution (which holds the hues) and a light KL term; at the end the latents are brought to mean 0 and standard deviation 1/0.18215."""
    torch.manual_seed(FIT_VAE)
    train, held = hold_out(pictures)
    vae, flat, held = VAE(**VAE_SHAPE), train.reshape(-1, SIZE, SIZE, 3), as_batch(held[:, 0])

    def loss(step):
        g = generator(FIT_VAE, step)
        x = as_batch(flat[torch.randint(len(flat), (16,), generator=g).numpy()])
        mean, logvar = (part.float() for part in vae.encode(x))
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=g)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = vae.decode(z * SCALE) - x
        return error.abs().mean() + F.avg_pool2d(error, 8).abs().mean() + 5e-5 * kl

    @torch.no_grad()
    def validate():
        """Reconstruction of held-out worlds in dB (peak signal-to-noise ratio)."""
        error = (vae.decode(vae.encode(held)[0] * SCALE).clamp(-1, 1) - held).square().mean((1, 2, 3))
        return (10 * torch.log10(4 / error)).mean().item()

    fit("vae", vae, loss, steps, RATE["vae"], out, validate, log)
    with torch.no_grad():           # exactly the same autoencoder, with other units for its latents
        mean = torch.cat([vae.encode(as_batch(part))[0] for part in np.array_split(flat[::max(1, len(flat) // 512)], 8)])
        shift, scale = mean.mean((0, 2, 3)), 1 / (SCALE * mean.std((0, 2, 3)))
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
    return fit("encoder", encoder.train(), loss, steps, RATE["encoder"], out, validate, log)


def fit_unet(pictures, vae, encoder, steps, out, log):
    """Algorithm 1 with everything trainable, through a projector that is then thrown away; its cross-attention stays alive.

    The nearly noiseless timesteps, where little can be learnt and the loss is large, weigh less: min(1, 5/SNR) (Hang et al. 2023).
    """
    torch.manual_seed(FIT_UNET)
    a = alpha_bar().float()
    weight = (5 * (1 - a) / a).clamp(max=1)
    unet, projector = UNet(**UNET_SHAPE), Projector(ENCODER_SHAPE["width"], 256, 4, UNET_SHAPE["context"])
    flat, held = pictures.reshape(-1, SIZE, SIZE, 3), len(hold_out(pictures)[1]) * PER_WORLD
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = [flat[i:i + 64] for i in range(0, len(flat), 64)]
        rows = [(*vae.encode(as_batch(p)), encoder(preprocess([Image.fromarray(q) for q in p])))
                for p in tqdm(parts, "latents and embeddings", disable=None)]
    mean, logvar, e = (torch.cat(column).float() for column in zip(*rows))
    latent = mean.shape[1:]

    def loss(step, at=None, p=0.1):
        g = generator(FIT_UNET, step)
        at = torch.randint(len(flat) - held, (16,), generator=g) if at is None else at
        r = draw(g, len(at), latent, p, hidden=(1, 256))
        return (weight[r.t] * noise_prediction_loss(unet, projector, mean[at], logvar[at], e[at], r)).mean()

    @torch.no_grad()
    def validate():
        return loss(10 ** 9, torch.arange(len(flat) - held, len(flat), 2), p=0).item()

    both = torch.nn.ModuleDict({"unet": unet, "projector": projector})
    fit("unet", both, loss, steps, RATE["unet"], out, validate, log)
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
    log = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    for name in ("vae", "encoder"):
        if "unet" in args.only and name not in args.only and not (args.out / FILES[name]).exists():
            raise Fail(f"the U-Net needs {args.out / FILES[name]}: make it first (--only {name})")
    pictures, done = make_pictures(max(64, 4 * int(args.scale * WORLDS / 4))), {}
    makers = dict(vae=partial(fit_vae, pictures), encoder=partial(fit_encoder, pictures),
                  unet=lambda *rest: fit_unet(pictures, done["vae"], done["encoder"], *rest))
    loaders = dict(vae=load_vae, encoder=load_encoder)
    for name, file in FILES.items():
        path = args.out / file
        if name in args.only and not path.exists():
            network = makers[name](max(2, int(args.scale * STEPS[name])), args.out, log)
            save_tensors(path, {n: t.half() for n, t in network.state_dict().items()}, {"format": "pt"})
        if name in loaders and path.exists():
            done[name] = loaders[name](TensorFile(path))


if __name__ == "__main__":
    run(main)
