"""Makes an embedded base: a small VAE, encoder and U-Net of the classes that load the real ones.

    python tests/make_base.py OUT --patches DIR                 # CPU or GPU, a day or minutes; resumes
    python tests/make_base.py OUT --scale 0.0005 --batch 8      # a few steps of each part

Roles are the paper's. The encoder plays UNI2-h: it learns H&E without labels, and pictures. VAE and U-Net
play Stable Diffusion 1.5; they learn pictures, H&E and toy tissue in equal parts: without labels, tissue of
slides that nothing else draws, of the patches only the training cases of train.py's own split.

OUT becomes a folder for --sd15 and --uni2h: unet/, vae/ and model.safetensors (the encoder) in float16, and
log-*.csv. The parts: vae, encoder, unet, and decoder, the VAE's once more. The embedded base was made in
several pieces, each from the last one's weights (--start), whose steps ldm/toy/log.csv has one after another:
on a GPU with batches of 256 to 768, and on a CPU with 24 images a step (the VAE from step 2,400 on, where its
latents were whitened), 64 (the U-Net from step 9,050 on, on these latents) and 16 (the decoder).
"""
import math
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from pictures import SIZE, Random, draw_pictures, draw_worlds                               # noqa: E402
from tissue import draw_patch, draw_slide                                                   # noqa: E402

from ldm.app import Parser, number, pick_device, read_csv, run_program, save_csv, save_tensors    # noqa: E402
from ldm.data import load_rgb, read_dataset, split_patches                                  # noqa: E402
from ldm.encoder import UNI2H, build_encoder, open_encoder                                  # noqa: E402
from ldm.schedule import T, alpha_bar                                                       # noqa: E402
from ldm.unet import UNet                                                                   # noqa: E402
from ldm.vae import SCALE, VAE, draw_latent                                                 # noqa: E402
from ldm.weights import TensorFile, load_vae                                                # noqa: E402
from projector import Projector                                                             # noqa: E402
from train import Draws, noise_prediction_loss                                              # noqa: E402

VAE_SHAPE = dict(channels=(32, 64, 128), layers=1, groups=8)
LATENT = (4, 16, 16)            # 4 x 4 pixels to one latent pixel
UNET_SHAPE = dict(channels=(64, 96, 192), layers=1, context=128)
ENCODER_SHAPE = dict(width=192, depth=3)
STAGES = {      # steps, images per step, learning rate
    "vae": (2400, 256, 1.5e-3), "encoder": (900, 512, 1e-3), "unet": (4700, 768, 1e-3),
    "decoder": (3200, 128, 2e-4)}
FILES = {"vae": "vae-l1/diffusion_pytorch_model.safetensors", "encoder": "model.safetensors",
         "unet": "unet/diffusion_pytorch_model.safetensors",
         "decoder": "vae/diffusion_pytorch_model.safetensors"}
PROJECTOR = "projector.safetensors"     # the U-Net's own, for --start
NOISE = 0.25                    # on latents, of their deviation, at most
POOL = 36_864                   # images made in advance, of each kind equally many
SAVE_SECONDS = 120
FIRST_SLIDE = 10 ** 9           # of the toy tissue here; no run, judge or test draws a slide of these numbers
EBHI = ("H&E patches of EBHI-Seg (Shi et al. 2023, https://doi.org/10.3389/fmed.2023.1114673, CC BY 4.0), "
        "training cases only")

# ---- images ------------------------------------------------------------------------------------------

class Patches:
    """The training patches of a dataset, on the device, without labels."""

    def __init__(self, folder, device):
        patches = read_dataset(folder)
        train = set(split_patches(patches)["train"])
        patches = [patch for patch in patches if patch.name in train]
        images = [np.asarray(load_rgb(Path(folder) / patch.name)) for patch in patches]
        side = min(min(image.shape[:2]) for image in images)
        images = torch.from_numpy(np.stack([image[:side, :side] for image in images]))
        self.images = images.permute(0, 3, 1, 2).to(device)
        cases = sorted({patch.case for patch in patches})
        self.cases = torch.tensor([cases.index(patch.case) for patch in patches], device=device)

    def crop(self, which, share, r):
        """Square crops of patches `which` (n,), this share of a side, turned -> x (n, 3, s, s)."""
        full, n, device = self.images.shape[-1], len(which), self.images.device
        side = int(share * full)
        rows, columns = ((r.uniform(0, 1, n) * (full - side + 1)).long()[:, None]
                         + torch.arange(side, device=device) for _ in range(2))
        x = self.images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return to_input(turned(x.permute(0, 3, 1, 2), r))

    def draw(self, n, r):
        """n crops at one scale, half of the time whole, at SIZE and as the encoder sees them, at 224 pixels.

        Patches as users bring them must be among them: a decoder that learnt from crops alone draws nuclei of
        whole ones as theirs, too large and with an edge."""
        x = self.crop(r.integers(0, len(self.images), n), min(1, r.uniform(0.45, 1.5, 1).item() ** 0.7), r)
        small = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
        return small, enlarged(x)

def tissue_patch(i):
    """A patch of toy tissue, the classes in turn, each of a slide of its own -> uint8 (SIZE, SIZE, 3)."""
    return np.asarray(draw_patch(draw_slide(i % 4, FIRST_SLIDE + i), SIZE))

def draw_images(args, r, part=256):
    """A third of args.pool pictures, then as many crops of patches (if there are any) and patches of tissue,
    in parts -> x (n, 3, SIZE, SIZE) in [-1, 1], and as the encoder sees them."""
    third = args.pool // 3
    for i in range(0, third, part):
        x = draw_pictures(draw_worlds(min(part, third - i), r), r)
        yield x, enlarged(x)
    for i in range(0, third if args.patches is not None else 0, part):
        yield args.patches.draw(min(part, third - i), r)
    if not (path := args.out / "tissue.safetensors").exists():
        with multiprocessing.get_context("fork").Pool() as workers:
            images = torch.from_numpy(np.stack(workers.map(tissue_patch, range(third), chunksize=32)))
        save_tensors(path, {"images": images.permute(0, 3, 1, 2).contiguous()}, {})
    for images in load_file(path)["images"].split(part):
        x = to_input(images.to(args.device))
        yield x, enlarged(x)

def to_input(x):
    """uint8 -> [-1, 1]."""
    return x.float() / 127.5 - 1

def enlarged(x):
    """To the size at which the encoder takes images."""
    return F.interpolate(x, (UNI2H.size, UNI2H.size), mode="bilinear")

def normalise(x):
    """x in [-1, 1] as the encoder takes it: ldm.encoder.preprocess, for tensors."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (UNI2H.mean, UNI2H.std))
    return (x / 2 + 0.5 - mean) / std

def turned(x, r):
    """Each image turned and mirrored at random."""
    for how in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)):
        x = torch.where(r.chance(0.5, len(x))[:, None, None, None], how(x), x)
    return x

def stained(x, r, amount):
    """x (n, 3, H, W) with each channel's optical density multiplied and shifted at random."""
    density = -torch.log((x / 2 + 0.5).clamp(min=1 / 255))
    scale, shift = 1 + amount * r.normal(len(x), 3, 1, 1), 0.3 * amount * r.normal(len(x), 3, 1, 1)
    return torch.exp(-(density * scale.clamp(0.3, 2) + shift)).clamp(0, 1) * 2 - 1

def make_pool(args):
    """What draw_images gives -> uint8 (n, 3, SIZE, SIZE)."""
    return torch.cat([((x + 1) * 127.5).round().byte() for x, _ in draw_images(args, Random(args.device, 0))])

def pick(pool, n, r):
    """n images of a pool, each turned at random -> x (n, 3, SIZE, SIZE) in [-1, 1]."""
    return to_input(turned(pool[r.integers(0, len(pool), n)], r))

def encode(vae, x):
    """The posterior's mean and log-variance in one pass, as training wants; VAE.encode splits its batch."""
    return vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)

def decode(vae, z0):
    """z_0 -> x, in one pass."""
    return vae.decoder(vae.post_quant_conv(z0 / SCALE)).float()

def noisy_latent(mean, logvar, r):
    """A draw of z_0 with noise as sampled latents have it: of a deviation up to NOISE times their own."""
    z0 = draw_latent(mean, logvar, r.normal(*mean.shape))
    spread = z0.detach().std((0, 2, 3), keepdim=True)
    return z0 + NOISE * r.uniform(0, 1, len(z0), 1, 1, 1) * spread * r.normal(*z0.shape)

def start(network, name, args):
    """The network with the weights of --start, if there are any, on the device."""
    if args.start:
        network.load_state_dict({n: t.float() for n, t in load_file(args.start / FILES[name]).items()})
    return network.to(args.device, memory_format=torch.channels_last)

# ---- training ----------------------------------------------------------------------------------------

def fit(name, parts, loss, args, betas=(0.9, 0.99), decay=0.999, beside=None):
    """AdamW on loss(step) with warm-up and cosine. The parts end as the moving average of their weights.

    Resumes from OUT/NAME.state.safetensors, written every two minutes. parts: {name: network}; beside: a
    network that `loss` trains itself (its optimizer starts anew when resumed).
    """
    steps, batch, rate = args.stages[name]
    networks = nn.ModuleDict(parts).train().to(args.device)
    named = {n: p for n, p in networks.named_parameters() if p.requires_grad}
    average = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=rate, betas=betas, weight_decay=1e-4, fused=True)
    path, step, log = args.out / f"{name}.state.safetensors", 0, read_csv(args.out / f"log-{name}.csv")
    moments = ("exp_avg", "exp_avg_sq")
    if path.exists():
        file = TensorFile(path)
        stored = dict(file.read(file.names))
        step = int(file.header["step"])
        log = [row for row in log if int(row["step"]) <= step]
        if beside is not None:
            beside.load_state_dict({n: stored[f"beside/{n}"] for n in beside.state_dict()})
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(stored[n])
                average[n].copy_(stored[f"average/{n}"])
                state = {k: stored[f"{k}/{n}"].clone().to(args.device) for k in moments}
                optimizer.state[p] = {"step": torch.tensor(float(step), device=args.device), **state}
    every, losses, saved = max(1, steps // 60), [], time.perf_counter()
    while step < steps:
        warm_up = min(1, (step + 1) / min(300, steps // 4 + 1))
        optimizer.param_groups[0]["lr"] = rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda"):
            value = loss(step, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), list(named.values()), weight)
        losses, step = [*losses, value.detach()], step + 1
        if step % every == 0 or step == steps:
            log.append(dict(step=step, loss=f"{torch.stack(losses).mean().item():.4f}"))
            print(name, *log[-1].values(), flush=True)
            save_csv(args.out / f"log-{name}.csv", log)
            losses = []
        if time.perf_counter() - saved > SAVE_SECONDS:
            state = {f"{k}/{n}": optimizer.state[p][k] for n, p in named.items() for k in moments}
            state |= {f"average/{n}": p for n, p in average.items()}
            state |= {f"beside/{n}": p for n, p in beside.state_dict().items()} if beside is not None else {}
            save_tensors(path, named | state, {"step": str(step)})
            saved = time.perf_counter()
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(average[n])
    networks.eval().requires_grad_(False)

def make_vae(args):
    """L1 of pixels, of their differences, at a quarter of the size and of mean colours; a light KL term;
    noise on the latents, so that they hold nothing that a sampler's errors hide; scale-equivariance.

    The latter (Skorokhodov et al. 2025, Kouzelis et al. 2025): a latent of half the size decodes to a picture
    of half the size. It takes out of the latents high frequencies that a small U-Net cannot learn.
    """
    torch.manual_seed(0)
    vae, pool = start(VAE(**VAE_SHAPE), "vae", args), make_pool(args)

    def error(d):
        slopes = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
        coarse = F.avg_pool2d(d, 4).abs().mean() + d.mean((2, 3)).abs().mean()
        return d.abs().mean() + slopes + coarse + common(d)

    def loss(step, batch):
        r = Random(args.device, 1, step)
        x = pick(pool, batch, r)
        mean, logvar = encode(vae, x)
        z = noisy_latent(mean, logvar, r)
        value = error(decode(vae, z) - x) + 3e-5 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        if step % 3:
            return value
        return value + 0.3 * error(decode(vae, F.avg_pool2d(z[::2], 2)) - F.avg_pool2d(x[::2], 2))

    fit("vae", {"vae": vae}, loss, args)
    whiten(vae, torch.cat([encode(vae, pick(pool, 256, Random(args.device, 2, i)))[0] for i in range(8)]))
    return vae

@torch.no_grad()
def whiten(vae, mean):
    """The same autoencoder, with latents of mean 0, deviation 1 and no correlation of channels, as noise has:
    it would drown what they hold in a direction of little variance. mean (n, 4, h, w): some as they are."""
    mean, n = mean.transpose(0, 1).flatten(1), vae.latent
    values, vectors = torch.linalg.eigh(SCALE ** 2 * mean.cov())
    w = vectors * values.rsqrt() @ vectors.T                # symmetric: each channel stays near its own
    shift, quant, post = mean.mean(1), vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight.copy_((post.weight[:, :, 0, 0] @ w.inverse())[:, :, None, None])
    quant.weight[:n] = torch.einsum("ab,bcij->acij", w, quant.weight[:n])
    quant.bias[:n] = w @ (quant.bias[:n] - shift)
    quant.bias[n:] += w.square().sum(1).log()                       # exact where the channels' are equal

def common(d):
    """The mean error of a batch, d (n, 3, H, W), is the network's own, at its edges for instance."""
    return 2 * d.mean(0).abs().mean()

def make_encoder(args):
    """Two pictures of a world, or two views of a patch, are alike (InfoNCE, van den Oord et al. 2018).

    Views differ in place, scale, direction, stain and, half of them, in resolution. Worlds of equal colours
    stand side by side, so that colour alone does not tell; other patches of the same case count neither way.
    The head that is compared is thrown away (Chen et al. 2020).
    """
    import timm
    torch.manual_seed(2)
    width, patches = ENCODER_SHAPE["width"], args.patches
    encoder = build_encoder(**ENCODER_SHAPE)
    encoder.patch_drop = timm.layers.PatchDropout(0.5, num_prefix_tokens=encoder.num_prefix_tokens)
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 128))

    def view(which, r):
        x = stained(enlarged(patches.crop(which, r.uniform(0.45, 1, 1).item(), r)), r, 0.12)
        coarse = enlarged(F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True))
        return torch.where(r.chance(0.5, len(x))[:, None, None, None], coarse, x)

    def contrast(views, same):
        a, b = F.normalize(head(encoder(normalise(views))).float(), dim=-1).chunk(2)
        target = torch.arange(len(a), device=a.device)
        similarity = (a @ b.T / 0.1).masked_fill(same & (target[:, None] != target), -1e4)
        return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

    def loss(step, batch):
        r = Random(args.device, 4, step)
        n = batch if patches is None else batch // 2
        worlds = draw_worlds(n, r)
        views = torch.cat([turned(draw_pictures(worlds, r), r) for _ in range(2)])
        value = contrast(enlarged(stained(views, r, 0.05)), torch.zeros_like(views[:n, 0, 0, 0]).bool())
        if patches is not None:
            which = r.integers(0, len(patches.images), n)
            same = patches.cases[which][:, None] == patches.cases[which]
            value = value + contrast(torch.cat([view(which, r), view(which, r)]), same)
        return value

    fit("encoder", {"encoder": encoder, "head": head}, loss, args)
    encoder.patch_drop = nn.Identity()
    return encoder

def make_unet(args):
    """Algorithm 1 with everything trainable, through a projector that only --start keeps.

    Timesteps are spread over the batch, half of them below T/4, and weighed: at high t the error of ẑ_0 is
    1/ᾱ times that of ε, and there alone can the condition lower it much. Low t keeps its weight, which
    min(1, 5/SNR) (Hang et al. 2023) takes: what it decides is small in the latents, but not in the image.
    """
    torch.manual_seed(3)
    device = args.device
    unet = start(UNet(**UNET_SHAPE), "unet", args)
    projector = Projector(ENCODER_SHAPE["width"], 256, 4, UNET_SHAPE["context"]).to(device)
    if args.start and (args.start / PROJECTOR).exists():
        projector.load_state_dict(load_file(args.start / PROJECTOR))
    if device.type == "cuda":
        unet.compile(dynamic=False)
    weight = (1 / alpha_bar().float().to(device)).clamp(max=50)
    if not (path := args.out / "pool.safetensors").exists():
        save_tensors(path, describe_pool(args), {})
    pool = {n: t.to(device) for n, t in load_file(path).items()}

    def loss(step, batch):
        r = Random(device, 5, step)
        at = r.integers(0, len(pool["e"]), batch)
        u = (torch.arange(batch, device=device) + r.uniform(0, 1, batch)) / batch
        t = (T * u.square()).long()
        draws = Draws(mirrored=None, posterior=r.normal(batch, *LATENT), eps=r.normal(batch, *LATENT), t=t,
                      null=r.chance(0.1, batch, 1), dropout=None)
        mean, logvar = pool["latents"][at].float().chunk(2, 1)
        return (weight[t] * noise_prediction_loss(unet, projector, mean, logvar, pool["e"][at], draws)).mean()

    fit("unet", {"unet": unet, "projector": projector}, loss, args)
    save_tensors(args.out / PROJECTOR, projector.state_dict(), {})
    return unet

@torch.no_grad()
def describe_pool(args):
    """Latents (n, 8, h, w), means beside log-variances, and embeddings e (n, d_e) of pictures and crops."""
    vae = load_vae(TensorFile(args.out / FILES["vae"]), args.device)
    encoder = open_encoder(args.out / FILES["encoder"]).load(args.device)
    rows = [(torch.cat(encode(vae, small), 1).half(), encoder(normalise(large)))
            for small, large in draw_images(args, Random(args.device, 7))]
    return dict(zip(("latents", "e"), map(torch.cat, zip(*rows))))

class Critic(nn.Module):
    """A patch discriminator: x (n, 3, H, W) and its latent -> its layers' outputs, the last one a score.

    It sees the latent so that it can tell texture that belongs there from texture that does not.
    """

    def __init__(self, width=48):
        super().__init__()
        shape = [(3 + LATENT[0], width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1),
                 (4 * width, 4 * width, 1), (4 * width, 1, 1)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4 if s == 2 else 3, s, padding=1) for a, b, s in shape)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) if 0 < i < 4 else nn.Identity()
                                   for i, (_, b, _) in enumerate(shape))

    def forward(self, x, z):
        x, found = torch.cat([x, F.interpolate(z, x.shape[2:])], 1), []
        for layer, norm in zip(self.layers, self.norms):
            x = norm(layer(x))
            found.append(x)
            x = F.leaky_relu(x, 0.2)
        return found

def make_decoder(args):
    """The VAE's decoder once more, against a discriminator (hinge loss), so that it does not blur.

    Its features serve as the perceptual term; its own term is weighed so that its gradient at the last layer
    stays a quarter of the others' (Esser et al. 2021), in a moving average, as that of one batch swings.
    """
    torch.manual_seed(1)
    vae = load_vae(TensorFile(args.out / FILES["vae"]), args.device)
    vae.decoder.requires_grad_()
    vae.post_quant_conv.requires_grad_()
    critic, last, weight = Critic().to(args.device), vae.decoder.conv_out.weight, torch.zeros(())
    optimizer = torch.optim.Adam(critic.parameters(), lr=2 * args.stages["decoder"][2], betas=(0.5, 0.9))
    pool = make_pool(args)

    def loss(step, batch):
        nonlocal weight
        r = Random(args.device, 3, step)
        x = pick(pool, batch, r)
        with torch.no_grad():
            z = noisy_latent(*encode(vae, x), r)
        y, twice = decode(vae, z), torch.cat([z, z])
        real, fake = critic(torch.cat([x, y.detach()]), twice)[-1].float().chunk(2)
        optimizer.zero_grad()
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        optimizer.step()
        critic.requires_grad_(False)
        layers = [layer.float().chunk(2) for layer in critic(torch.cat([x, y]), twice)]
        critic.requires_grad_()
        features = sum((b - a).abs().mean() / a.abs().mean() for a, b in layers[:-1]) / (len(layers) - 1)
        d = y - x
        faithful = d.abs().mean() + F.avg_pool2d(d, 4).abs().mean() + common(d) + 0.25 * features
        fooled = -layers[-1][1].mean()
        if step % 10 == 0:
            gradients = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (faithful, fooled)]
            ratio = gradients[0].norm() / (gradients[1].norm() + 1e-6)
            weight = weight + (0.1 if weight else 1) * ((0.25 * ratio).clamp(max=1e3) - weight)
        return faithful + min(1, step / 200) * weight * fooled

    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    fit("decoder", parts, loss, args, (0.5, 0.9), beside=critic)
    return vae

# ---- the program -------------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--patches", metavar="DIR", help="a dataset of H&E patches (default: pictures alone)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="a base whose VAE and U-Net to go on from")
    parser.add_argument("--scale", type=number(float, 0, 10), default=1.0, help="of the number of steps")
    parser.add_argument("--batch", type=number(int, 8), metavar="N", help="images per step (default: STAGES)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="default: all parts")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    args.device, args.out = pick_device(args.device), args.out.resolve()
    args.patches = Patches(args.patches, args.device) if args.patches else None
    args.pool = max(48, round(min(1, args.scale) * POOL))
    args.stages = {name: (max(2, round(args.scale * steps)), args.batch or batch, rate)
                   for name, (steps, batch, rate) in STAGES.items()}
    makers = {"vae": make_vae, "encoder": make_encoder, "decoder": make_decoder, "unet": make_unet}
    for name in args.only:
        path = args.out / FILES[name]
        if not path.exists():
            tensors = {n: t.half().contiguous() for n, t in makers[name](args).state_dict().items()}
            images = ["procedural pictures", *["toy tissue without labels"] * (name != "encoder"),
                      *[EBHI] * (args.patches is not None)]
            groups = {"norm_num_groups": str(VAE_SHAPE["groups"])} if name in ("vae", "decoder") else {}
            save_tensors(path, tensors, {"format": "pt", "trained_on": ", ".join(images), **groups})

if __name__ == "__main__":
    run_program(main)
