#!/usr/bin/env python3
"""Adapt Stable Diffusion 1.5 to patches seen through UNI2-h (Algorithm 1). The defaults are the paper's baseline.

    python train.py --data chaoyang/ --rank 4 --tokens 4        # the paper's best configuration
    python train.py --resume runs/chaoyang-512px-r4-t4          # go on with a run; to repeat its command does the same

Without --data, or with --sd15 toy, a small base of ours has other defaults than those below: ldm/toy/__init__.py, SETTINGS.

Writes runs/NAME: README.md (a model card), config.json, split.json, log.csv with the validation FID of every epoch (Table 4),
grids/ and the newest validation samples (real/, fake/), adapter.safetensors (the last), adapter-best.safetensors (lowest FID)
and state.safetensors (to go on from). What is computed once per image is kept in cache/ beside the run.
"""
import hashlib
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._functorch.config as functorch_config

from fid import frechet_distance_of_features
from ldm import toy
from ldm.app import (
    RANK0,
    WORLD,
    Fail,
    Parser,
    Signals,
    all_max,
    all_reduce,
    barrier,
    broadcast,
    check_same,
    first_line,
    frozen_dtype,
    join_processes,
    number,
    peak_memory,
    pick_device,
    progress,
    rank0_first,
    run_program,
    safe_name,
    save_csv,
    save_tensors,
    save_text,
    shard,
)
from ldm.data import Cache, contact_sheet, describe_split, load_rgb, read_dataset, resize_crop, subsample
from ldm.encoder import UNI2H, Inception, inception_available, open_encoder
from ldm.runs import (
    VALIDATION_STEPS,
    Lock,
    check_or_create,
    model_card,
    public_name,
    settings_of,
    split_of_run,
)
from ldm.schedule import T, add_noise
from ldm.toy.tissue import write_dataset
from ldm.unet import UNet
from ldm.vae import draw_latent
from ldm.weights import BUILT_IN, SD15, TensorFile, licence, load_unet, load_vae, open_sd15
from lora import inject, lora_parameters, save_adapter
from projector import Projector
from sample import Job, is_sample_of, latent_shape, make_images, name_references, save_image

DROPOUT = 0.05                                      # of the projector's hidden units
BETAS = (0.9, 0.999)
WEIGHT_DECAY = dict(lora=1e-3, projector=1e-4)
MAX_GRAD_NORM = 1.0         # the paper names no clipping; this is the default of Diffusers' training scripts
GRID = 8                    # reference | sample pairs of an epoch's picture
COMMIT_SECONDS = 300
MEMORY_BUDGET = 0.5         # share of what a compiled step keeps for the backward pass; the rest is computed again. Of SD1.5 at
                            # batch 16, 512 px: 5.3 GiB in place of 10.5, for 8.7 % more FLOPs (tests/test_speed.py)


# ---- everything random is a function of (seed, step) -----------------------------------------------------------------

STEP, ORDER, VALIDATION = range(3)


def generator(*key):
    """A CPU generator seeded by whole numbers, such as (seed, STEP, step); every other key gives an unrelated stream."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]))


def draw_noise(g, batch, latent, p, hidden):
    """All that one step draws, for a whole batch. latent: (4, h, w); p: of CFG dropout; hidden: (depth-1, d_h)."""
    return SimpleNamespace(
        mirrored=torch.rand(batch, generator=g) < 0.5,
        posterior=torch.randn(batch, *latent, generator=g),     # E(x) is a draw, as in Diffusers' scripts; the paper does not say
        noise=torch.randn(batch, *latent, generator=g),         # 5: ε
        t=torch.randint(0, T, (batch,), generator=g),           # 5: the paper's {1, ..., T}, counted from 0
        m=torch.rand(batch, 1, generator=g) < p,                # 7
        keep=(torch.rand(hidden[0], batch, hidden[1], generator=g) >= DROPOUT) / (1 - DROPOUT))


def subset(draws, indices):
    """The draws of some images of a batch."""
    indices = list(indices)
    return SimpleNamespace(**{
        k: v if v is None else v[:, indices] if k == "keep" else v[indices] for k, v in vars(draws).items()})


def draw_validation_noise(n, latent):
    """The fixed draws of the validation loss: timesteps spread evenly over the images, no dropout, no mirror image."""
    r = draw_noise(generator(VALIDATION), n, latent, p=0, hidden=(0, 0))
    r.mirrored[:], r.keep = False, None
    r.t = ((torch.arange(n) + 0.5) * T / n).long()[torch.randperm(n, generator=generator(VALIDATION, 1))]
    return r


def batch_of_step(seed, step, batch, n):
    """Indices of the images of a step: each epoch goes through a permutation of its own.

    The last batch of an epoch is filled up from the head of the permutation, as DistributedSampler does, so that every
    batch is whole: 5,398 images make 338 steps. (The paper does not say; dropping the rest would make 337.)
    """
    epoch, k = divmod(step, math.ceil(n / batch))
    order = torch.randperm(n, generator=generator(seed, ORDER, epoch))
    return order[torch.arange(k * batch, (k + 1) * batch) % n].tolist()


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------

def noise_prediction_loss(unet, projector, mean, logvar, e, r):
    """Lines 4 to 10 of Algorithm 1 -> ‖ε - ε_θ(z_t, t, c)‖² of each image, as a mean over its latent, (B,).

    mean, logvar (B, 4, h, w) and e (B, d_e): what the frozen encoders say of the images x. r: what `draw_noise` drew, lines 5 and 7.
    """
    z0 = draw_latent(mean, logvar, r.posterior)                     # 4: encode to latent space
    z_t = add_noise(z0, r.noise, r.t)                               # 6: forward diffusion (eq. 1)
    e = torch.where(r.m, projector.null, e)                         # 8: replace with the null embedding
    c = projector(e, r.keep)                                        # 9: project to cross-attention space (eqs. 3, 4)
    return (r.noise - unet(z_t, r.t, c)).square().mean((1, 2, 3))   # 10: noise prediction loss (eq. 2)


def learning_rate_factor(step, warm_up, total):
    """Linear up to 1 over `warm_up` steps, then a cosine down to 0 at `total` (the paper names no floor)."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


class Trainer:
    """The trainable parts, their optimizer and the log so far: all that a run is, and `commit` writes all of it."""

    def __init__(self, args, unet, projector, cache, train, latent, device):
        """train: [(name, hash)] of the training images. latent: (4, h, w)."""
        self.args, self.cache, self.train, self.latent, self.device = args, cache, train, latent, device
        self.unet, self.projector = unet, projector
        self.compiled = device.type == "cuda" and not args.no_compile
        self.network = torch.compile(unet, dynamic=False) if self.compiled else unet
        functorch_config.activation_memory_budget = MEMORY_BUDGET
        self.hidden = (projector.shape["depth"] - 1, projector.shape["hidden"])
        self.per_process = math.ceil(args.batch / WORLD)             # images at a time in each process
        self.steps_per_epoch = math.ceil(len(train) / args.batch)       # of whole batches, see batch_of_step
        self.total = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.warm_up = min(self.steps_per_epoch, max(1, self.total // 2))       # half of a run that is one epoch or shorter
        lora, rest = lora_parameters(unet), dict(projector.named_parameters())
        self.named = {f"unet.{n}": p for n, p in lora.items()} | {f"projector.{n}": p for n, p in rest.items()}
        self.parameters = [p.requires_grad_() for p in self.named.values()]
        self.optimizer = torch.optim.AdamW([
            dict(params=list(lora.values()), base=args.lr, weight_decay=WEIGHT_DECAY["lora"]),
            dict(params=list(rest.values()), base=args.lr * args.lr_ratio, weight_decay=WEIGHT_DECAY["projector"])],
            lr=args.lr, betas=BETAS)
        self.step, self.history, self.losses, self.best = 0, [], [], math.inf
        self.minutes, self.clock = 0.0, time.perf_counter()     # spent up to the last commit, and when that was

    def epoch_is_due(self):
        """Whether the end of an epoch, or of the run, is reached and its row of the log is still to be written."""
        at_end = self.step % self.steps_per_epoch == 0 or self.step == self.total
        return at_end and self.step > (self.history[-1]["step"] if self.history else 0)

    def learning_rates(self, step):
        """Those of LoRA and of the projector at a step."""
        return [group["base"] * learning_rate_factor(step, self.warm_up, self.total) for group in self.optimizer.param_groups]

    def load_batch(self, hashes, r):
        """The cached images and the draws of a batch, on the device."""
        r = SimpleNamespace(**{k: v if v is None else v.to(self.device) for k, v in vars(r).items()})
        return [x.to(self.device) for x in self.cache.batch(hashes, r.mirrored.tolist())], r

    def train_step(self):
        """One turn of Algorithm 1's loop. Fails, before anything is changed, if the loss or its gradient is not finite.

        Every process draws for the whole batch and works on its share; loss and gradient are summed over them.
        """
        args = self.args
        indices = batch_of_step(args.seed, self.step, args.batch, len(self.train))                      # 3
        whole = draw_noise(generator(args.seed, STEP, self.step), args.batch, self.latent, args.cfg_drop, self.hidden)
        share = shard(range(args.batch))
        images, r = self.load_batch([self.train[indices[i]][1] for i in share], subset(whole, share))
        loss = noise_prediction_loss(self.network, self.projector, *images, r).sum() / args.batch       # 4 to 10
        self.optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        all_reduce([loss, *(p.grad for p in self.parameters)])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        value, norm = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Fail(f"step {self.step}: loss {value}, gradient norm {norm}; nothing was updated, and the last good state is "
                       f"kept. timesteps {whole.t.tolist()}, images {', '.join(self.train[i][0] for i in indices)}. "
                       "Try a lower --lr, or look at these images")
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates(self.step)):
            group["lr"] = rate
        self.optimizer.step()                                                                           # 11
        self.step += 1
        self.losses.append(value)
        return value, norm

    @torch.no_grad()
    def validation_loss(self, hashes):
        """Mean over the images on fixed noise and timesteps; batches are whole, the last one filled up and cut off again."""
        n, size = len(hashes), self.per_process
        draws, losses = draw_validation_noise(n, self.latent), torch.zeros(n, device=self.device)
        for start in shard(range(0, n, size)):
            at = [i % n for i in range(start, start + size)]
            images, r = self.load_batch([hashes[i] for i in at], subset(draws, at))
            losses[start:start + size] = noise_prediction_loss(self.network, self.projector, *images, r)[:n - start]
        all_reduce([losses])
        return losses.mean().item()

    def commit(self, folder, header, best=False):
        """Write the adapter (where it is the best, also as that), the state and the log; each is there whole or as it was before.

        Fails where a parameter is not finite.
        """
        if not all(p.isfinite().all() for p in self.parameters):
            raise Fail(f"step {self.step}: a trained parameter is not finite; the last good state is kept. Try a lower --lr")
        self.minutes, self.clock = self.spent(), time.perf_counter()
        if not RANK0:
            return
        for name in ["adapter-best.safetensors"] * best + ["adapter.safetensors"]:
            save_adapter(folder / name, self.unet, self.projector, header | {"step": str(self.step)})
        moments = {f"{name}/{key}": self.optimizer.state[p][key] for name, p in self.named.items()
                   if p in self.optimizer.state for key in ("exp_avg", "exp_avg_sq")}
        save_tensors(folder / "state.safetensors", {**self.named, **moments}, {
            "step": str(self.step), "best": repr(self.best), "losses": json.dumps(self.losses),
            "history": json.dumps(self.history), "minutes": repr(self.minutes)})
        self.save_log(folder)

    def spent(self):
        """Minutes of training, those before an interruption included."""
        return self.minutes + (time.perf_counter() - self.clock) / 60

    def save_log(self, folder):
        if self.history:
            save_csv(folder / "log.csv", self.history)

    @torch.no_grad()
    def restore(self, path):
        """Go back to what `commit` wrote."""
        file = TensorFile(path)
        try:
            self.step, self.best = int(file.header["step"]), float(file.header["best"])
            self.minutes = float(file.header.get("minutes", 0))
            self.losses, self.history = json.loads(file.header["losses"]), json.loads(file.header["history"])
            state = {}
            for i, (name, p) in enumerate(self.named.items()):
                p.copy_(file.get(name).view_as(p))
                if f"{name}/exp_avg" in file.names:
                    state[i] = {"step": torch.tensor(float(self.step))} | {
                        key: file.get(f"{name}/{key}").view_as(p).clone() for key in ("exp_avg", "exp_avg_sq")}
            ends = [0, *(row["step"] for row in self.history), self.step, self.total]
            rows = all(row.keys() == self.history[0].keys() >= {"epoch", "val_loss"} for row in self.history)
            numbers = self.minutes + sum(self.losses)
            if not rows or ends != sorted(ends) or len(self.losses) != self.step - ends[-3] or not math.isfinite(numbers):
                raise ValueError("its step and its log do not fit")
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as problem:
            raise Fail(f"{path} is damaged ({first_line(problem)}); restore it, or pass another --run") from None
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


class ValidationSamples:
    """One sample of each validation image, and their Fréchet distance from the images themselves (Table 4).

    The images at the model's size stay in the run's real/, the newest samples in fake/: fid.py gives the same number of them.
    """

    def __init__(self, folder, references, hashes, space, device, size, anew):
        """references: {title: path}. hashes: of the same images, in the cache. anew: write real/ though it is there, and remove
        from real/ and fake/ what an earlier choice of images left there; whatever else lies there stays.
        """
        self.folder, self.hashes, self.space, self.device = folder, hashes, space, device
        self.column = "fid" if space.kind == "inception" else "fid_encoder"
        self.real, self.fake = ({title: folder / part / f"{title}.png" for title in references} for part in ("real", "fake"))
        if RANK0:
            for title, path in references.items():
                if anew or not self.real[title].exists():
                    save_image(self.real[title], resize_crop(load_rgb(path), size), reference=title)
            for part in (folder / "real", folder / "fake") if anew else ():
                for path in part.glob("*/*.png"):
                    title = path.relative_to(part).with_suffix("").as_posix()
                    linked = os.path.realpath(path) != os.path.join(os.path.realpath(part), f"{title}.png")
                    if title not in references and not linked and is_sample_of(path, title):
                        path.unlink()
            if references:
                save_image(folder / "patch.png", load_rgb(next(iter(self.real.values()))))
        barrier()
        self.features = space.extract(list(self.real.values()), device) if len(references) > 1 else None
        self.score = self.column if len(references) > 1 else "val_loss"         # the log's column whose lowest value is the best

    def make(self, trainer, vae_file, epoch):
        """Sample with the weights as they are, image i with seed i; save samples and grid -> the distance; of one image None."""
        n, fake = len(self.hashes), list(self.fake.values())
        if not n:
            return None
        e = dict(zip(self.fake, trainer.cache.batch(self.hashes, [False] * n)[2]))
        jobs = [Job(path, title, trainer.args.val_cfg, i) for i, (title, path) in enumerate(self.fake.items())]
        make_images(jobs, e, trainer.network, trainer.projector, load_vae(vae_file, trainer.device), VALIDATION_STEPS,
                    trainer.latent, trainer.per_process, fill=trainer.compiled)
        if RANK0:
            pairs = subsample(list(zip(self.real.values(), fake)), GRID)
            grid = contact_sheet([[load_rgb(path) for path in pair] for pair in pairs])
            save_image(self.folder / "grids" / f"epoch{epoch:02d}.png", grid)
        return frechet_distance_of_features(self.features, self.space.extract(fake, self.device)) if n > 1 else None


# ---- the program ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = Parser(__doc__, prints_results=False)
    data = parser.add_argument_group("data and weights")
    data.add_argument("--data", metavar="DIR",
                      help="train.json and test.json as in Chaoyang, a folder per class, or images (default: toy tissue)")
    data.add_argument("--split", default="paper", metavar="HOW",
                      help="paper (pooled, by case, 5398:387:375), official, or a file")
    data.add_argument("--sd15", metavar="PATH", help=f"Diffusers folder, CompVis file, hub repository, or toy (default: {SD15})")
    data.add_argument("--uni2h", default=UNI2H.repository, metavar="PATH", help="folder or file of the weights, hub repository, or toy")
    data.add_argument("--size", type=number(int, 8, 8192), default=512, help="side of the images in pixels")
    data.add_argument("--limit", type=number(int, 1), metavar="N", help="use at most N images of each part")
    model = parser.add_argument_group("model")
    model.add_argument("--rank", type=number(int, 1, 4096), default=8, help="r of LoRA")
    model.add_argument("--alpha", type=number(float, 0, open_low=True), help="α of LoRA (default: the rank)")
    model.add_argument("--tokens", type=number(int, 1, 4096), default=4, help="condition tokens n_c")
    model.add_argument("--hidden", type=number(int, 1, 65536), default=1024, help="width d_h of the projector")
    model.add_argument("--depth", type=number(int, 2, 3), default=2, help="linear layers of the projector, 2 or 3")
    model.add_argument("--token-norm", action="store_true", help="LayerNorm on the tokens (another reading of Table 2)")
    train = parser.add_argument_group("training")
    train.add_argument("--lr", type=number(float, 0), default=5e-5, help="learning rate of LoRA")
    train.add_argument("--lr-ratio", type=number(float, 0), default=10.0, help="projector's learning rate over LoRA's")
    train.add_argument("--cfg-drop", type=number(float, 0, 1), default=0.1, help="p of the null embedding, per image")
    train.add_argument("--epochs", type=number(int, 1), default=12, help="passes over the training images")
    train.add_argument("--batch", type=number(int, 1), default=16, help="images per step")
    train.add_argument("--max-steps", type=number(int, 1, 10 ** 9), metavar="N",
                       help="stop after N steps, the schedule shortened to them")
    train.add_argument("--seed", type=number(int, 0, 2 ** 63), default=0, help="of all that is random, but for the split")
    valid = parser.add_argument_group("validation")
    valid.add_argument("--val-samples", type=number(int, 0), metavar="N",
                       help="validation images that are sampled for FID and grid (default: all)")
    valid.add_argument("--val-every", type=number(int, 1), default=1, metavar="K",
                       help="sample at every Kth epoch, and at the last")
    valid.add_argument("--val-cfg", type=number(float, 0), default=1.5, metavar="W", help="their guidance")
    valid.add_argument("--features", choices=("inception", "encoder"),
                       help="of the FID (default: inception, but encoder where its weights are not at hand)")
    valid.add_argument("--inception", metavar="FILE", help="pytorch-fid's weights (default: torch.hub's cache)")
    where = parser.add_argument_group("run")
    where.add_argument("--run", metavar="DIR", help="folder of the run (default: under runs/, named by its settings)")
    where.add_argument("--resume", metavar="DIR", help="go on with this run, with its own settings")
    where.add_argument("--parameters", action="store_true", help="print the number of parameters (Table 2) and leave")
    where.add_argument("--device", default="auto", help="cuda, mps or cpu")
    where.add_argument("--no-compile", action="store_true", help="do not torch.compile the U-Net (it is done on CUDA only)")
    args = parser.parse_args()
    if args.sd15 == "toy" or not (args.sd15 or args.data or args.resume or args.parameters):
        parser.set_defaults(sd15="toy", uni2h="toy", **toy.SETTINGS)
        args = parser.parse_args()
    elif args.sd15 is None:
        args.sd15 = SD15
    if args.resume:
        if args.run:
            raise Fail("pass --resume with the run to go on with, or --run for a new one, not both")
        saved = settings_of(args.resume)
        if saved is None:
            raise Fail(f"--resume {args.resume}: no run of train.py is there")
        mine = ("run", "resume", "device", "no_compile", "quiet")        # of this call, not of the run
        again = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in saved.items()
                 if k not in mine and v is not None and v is not False]
        args = parser.parse_args([*again, *sys.argv[1:], f"--run={args.resume}"])
    if args.data is None and not args.parameters:
        if args.sd15 != "toy":
            raise Fail("pass --data with a folder of patches; only the toy base (--sd15 toy) brings its own")
        if args.split != "paper":
            raise Fail("--split is for a dataset of yours: pass it with --data")
    if args.alpha is None:
        args.alpha = float(args.rank)
    for name in ("data", "sd15", "uni2h", "split", "inception"):
        if name == "data" and (args.data is None or (args.resume and args.data == toy.DATA)):
            args.data = toy.DATA                # drawn beside the run, whatever else has this name
            continue
        value, may_be_folder = getattr(args, name), name in ("data", "sd15", "uni2h")
        path = Path(os.path.expanduser(value or "-"))
        named = name in ("sd15", "uni2h") and value in BUILT_IN
        if not named and (path.is_file() or (path.is_dir() and may_be_folder)):
            setattr(args, name, str(path.resolve()))
    if args.run is None:
        args.run = f"runs/{safe_name(Path(args.data).name)}-{args.size}px-r{args.rank}-t{args.tokens}"
    if args.features is None:           # a run keeps its kind, whatever has come into the cache or gone since
        default = "inception" if inception_available(args.inception) else "encoder"
        args.features = (settings_of(args.run) or {}).get("features") or default
    return args


def main():
    args, signals = parse_args(), Signals()
    if args.parameters:
        return print(count_parameters(args), file=sys.__stdout__ if args.quiet else None)
    device, folder = pick_device(args.device), Path(args.run)
    join_processes(device)
    if WORLD > args.batch:
        raise Fail(f"--batch {args.batch} gives {WORLD} processes less than an image each; start fewer")
    args.features = broadcast(args.features)
    with rank0_first():
        if args.data != toy.DATA:       # a wrong folder is found before gigabytes are downloaded
            data, patches = Path(args.data), read_dataset(args.data)
        # what can be wrong with the arguments is found here, on the meta device, before anything is computed or written
        unet_file, vae_file = open_sd15(args.sd15)
        encoder = open_encoder(args.uni2h)
        latent = latent_shape(load_unet(unet_file, "meta"), load_vae(vae_file, "meta"), args.size)
        if args.data == toy.DATA:
            if not args.resume:
                print("No --data: a small run on procedural tissue with the toy base, minutes on a laptop, to see the method work.\n"
                      "For the real thing: python train.py --data FOLDER (Stable Diffusion 1.5 and UNI2-h come from the hub)",
                      flush=True)
            data = write_dataset(folder.parent / toy.DATA, **toy.TISSUE)
            patches = read_dataset(data)
        lock = Lock(folder) if RANK0 and folder.is_dir() else None
        started = (folder / "state.safetensors").exists()
        if not started and (folder / "log.csv").exists():       # written after the first state
            raise Fail(f"{folder} has lost its state.safetensors, without which the run cannot go on; restore it, or pass "
                       "another --run")
        split = split_of_run(folder, patches, args.split, started)
        names = {part: subsample(split[part], args.limit) for part in ("train", "val")}

        sha256 = dict(vae=vae_file.fingerprint(), encoder=encoder.fingerprint(), base=unet_file.fingerprint())
        space = Inception(args.inception) if args.features == "inception" else encoder
        sha256["features"] = space.short_hash
        check_or_create(folder, args, sha256)
        lock = lock or (Lock(folder) if RANK0 else None)           # noqa: F841: held until this function ends
        if RANK0:
            save_text(folder / "split.json", describe_split(split, patches))
    check_same("weights", sha256)
    cases = len({p.case for p in patches})
    print(f"{len(patches)} patches of {cases} cases in {len({p.label for p in patches})} classes: "
          + ", ".join(f"{part} {len(ns)}" for part, ns in split.items())
          + ("; nothing tells which patches are of one case, so one may be in two parts" if cases == len(patches) else ""))
    cache = Cache(folder.parent / "cache", sha256["vae"], sha256["encoder"], args.size)
    encoders = partial(load_encoders, vae_file, encoder, device)
    hashes = {part: cache.fill([data / name for name in names[part]], encoders) for part in names}
    sha256["images"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    with rank0_first():
        check_or_create(folder, args, sha256)

    torch.manual_seed(args.seed)
    lora_init = torch.Generator().manual_seed(args.seed)            # apart from the projector's, whatever the rank
    unet = inject(load_unet(unet_file, device, frozen_dtype(device)), args.rank, args.alpha, lora_init)
    projector = Projector(cache.width, args.hidden, args.tokens, unet.context, args.depth, args.token_norm).to(device)
    print(parameter_table(unet, projector))
    trainer = Trainer(args, unet, projector, cache, list(zip(names["train"], hashes["train"])), latent, device)
    header = {key: str(value) for key, value in dict(
        base=public_name(args.sd15), base_sha256=sha256["base"], vae_sha256=sha256["vae"], encoder=public_name(args.uni2h),
        encoder_sha256=sha256["encoder"], encoder_licence=encoder.recipe.licence,
        licence=licence(args.sd15, encoder.recipe.terms), resolution=args.size, seed=args.seed).items()}
    if started:
        trainer.restore(folder / "state.safetensors")
        if RANK0:
            trainer.save_log(folder)        # which may have been written before or after the state
        print(f"{folder}: found, goes on after step {trainer.step} of {trainer.total}")

    title, hash_of = {p.name: p.title for p in patches}, dict(zip(names["val"], hashes["val"]))
    chosen = subsample(sorted(names["val"], key=title.get), args.val_samples)
    references = name_references([(title[name], data / name) for name in chosen], {})[0]
    samples = ValidationSamples(folder, references, [hash_of[name] for name in chosen],
                                space, device, args.size, anew=not started)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)      # what caching took is another matter
    train_epochs(trainer, samples, hashes["val"], vae_file, folder, header, signals)
    if RANK0:
        save_text(folder / "README.md", model_card(folder))         # once more: a run may have been killed after its last commit
    peak = max(row["peak_memory_gb"] for row in trainer.history)
    print(f"{folder}: complete after {trainer.step} steps; best {samples.score} {trainer.best:.4f}; peak memory {peak:.2f} GB. "
          f"Next: python sample.py --run {folder} --ref {'patch' if references else 'PATCH'}.png")


def train_epochs(trainer, samples, val_hashes, vae_file, folder, header, signals):
    """Steps to the end; after each epoch `end_epoch`. Leaves with 128 + signal, after a whole step that is committed."""
    args, device = trainer.args, trainer.device
    with progress(total=trainer.total, initial=trainer.step, desc="training", unit="step") as bar:
        signals.deferred = True
        clock = trainer.clock = time.perf_counter()
        step_then = trainer.step
        while True:
            if trainer.epoch_is_due():
                best = trainer.best
                row = end_epoch(trainer, samples, val_hashes, vae_file, signals, trainer.step - step_then, clock)
                trainer.commit(folder, header, trainer.best < best)
                if RANK0:
                    save_text(folder / "README.md", model_card(folder))
                words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None]
                bar.write(" ".join(words))
                clock, step_then = time.perf_counter(), trainer.step
            if trainer.step == trainer.total:
                break
            loss, norm = trainer.train_step()
            now = time.perf_counter()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", norm=f"{norm:.3f}", lr=f"{trainer.optimizer.param_groups[0]['lr']:.1e}",
                            images_per_s=f"{(trainer.step - step_then) * args.batch / max(now - clock, 1e-9):.1f}", refresh=False)
            stop = all_max(signals.received, device)       # all processes leave after the same step
            if trainer.epoch_is_due() or stop or now - trainer.clock > COMMIT_SECONDS:
                trainer.commit(folder, header)
            if stop:
                bar.write(f"{folder}: saved at step {trainer.step} of {trainer.total}; the same command goes on")
                barrier()             # for the first one, which writes
                sys.exit(128 + stop)


def end_epoch(trainer, samples, val_hashes, vae_file, signals, steps, clock):
    """Validation loss and samples with the weights as they are; adds a row to the history -> the row. Not committed yet.

    steps: how many were taken since `clock`. Where the row's score is the lowest so far it becomes `trainer.best`.
    """
    args, seconds = trainer.args, max(time.perf_counter() - clock, 1e-9)
    signals.deferred = False                # all is committed: to leave while validating or drawing loses nothing
    signals.leave()
    row = dict(epoch=math.ceil(trainer.step / trainer.steps_per_epoch), step=trainer.step,
               train_loss=sum(trainer.losses) / len(trainer.losses), val_loss=trainer.validation_loss(val_hashes),
               **dict(zip(("lr_lora", "lr_projector"), trainer.learning_rates(trainer.step - 1))),
               images_per_second=round(steps * args.batch / seconds, 2) or None,
               peak_memory_gb=round(peak_memory(trainer.device), 2))
    due = row["epoch"] % args.val_every == 0 or trainer.step == trainer.total
    row[samples.column] = samples.make(trainer, vae_file, row["epoch"]) if due else None
    signals.deferred = True
    if row[samples.score] is not None:
        trainer.best = min(trainer.best, row[samples.score])
    row["minutes"] = round(trainer.spent(), 2)
    trainer.history, trainer.losses = trainer.history + [row], []
    return row


def load_encoders(vae_file, encoder, device):
    """-> (encode, embed) for Cache.fill, which lets go of them, and so of the two networks, before training starts."""
    vae, network = load_vae(vae_file, device), encoder.load(device)

    @torch.no_grad()
    def encode(x):
        return [part.cpu() for part in vae.encode(x.to(device))]
    return encode, partial(encoder.embed, network)


def count_parameters(args):
    """Table 2 for these arguments; for Stable Diffusion 1.5 and UNI2-h themselves no file is needed."""
    with torch.device("meta"):
        unet = UNet() if args.sd15 == SD15 else load_unet(open_sd15(args.sd15)[0], "meta")
    width = 1536 if args.uni2h == UNI2H.repository else open_encoder(args.uni2h).width
    projector = Projector(width, args.hidden, args.tokens, unet.context, args.depth, args.token_norm)
    return parameter_table(inject(unet, args.rank, args.alpha), projector)


def parameter_table(unet, projector):
    """The trainable parameters in the form of the paper's Table 2."""
    lora, null = (sum(p.numel() for p in ps) for ps in (lora_parameters(unet).values(), [projector.null]))
    mlp = sum(p.numel() for p in projector.parameters()) - null
    total, frozen = lora + mlp + null, sum(p.numel() for p in unet.parameters()) - lora
    rows = [(name, f"{n:,}", f"{n / total:.1%}" if n / total >= 0.001 else "<0.1%") for name, n in (
        ("LoRA adapters", lora), ("Projector MLP", mlp), ("Null embedding", null), ("Total trainable", total))]
    rows += [("Stable Diffusion backbone (frozen)", f"{frozen:,}", ""), ("Trainable/backbone", "", f"{total / frozen:.2%}")]
    return "\n".join(f"{name:<36}{n:>14}{share:>9}" for name, n, share in [("Component", "Parameters", "Share")] + rows)


if __name__ == "__main__":
    run_program(main)
