"""Adapt Stable Diffusion 1.5 to patches seen through UNI2-h (Algorithm 1); by default the paper's baseline.

    python train.py --data chaoyang/ --rank 4 --tokens 4        # the paper's best configuration
    python train.py --resume runs/chaoyang-512px-r4-t4          # resume; repeating the command does the same

Without --data, or with --sd15 toy, a small base of ours has its own defaults: TOY in ldm/runs.py."""
import hashlib
import json
import math
import shutil
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch._functorch.config as functorch_config

from fid import frechet_distance
from ldm.app import (RANK0, SIGNALS, WORLD, Fail, all_gather, all_reduce, barrier, broadcast, check_same,
                     command_line, foreign_file, frozen_dtype, join_processes, pick_device, progress,
                     rank0_first, run_program, save_csv, save_tensors, save_text, shard, to_device)
from ldm.data import (Cache, describe_split, hash_files, load_rgb, make_split, note_equal_images,
                      read_dataset, read_split, save_image, save_sheet, subsample, write_toy_tissue)
from ldm.encoder import Inception, cached_inception, open_encoder
from ldm.runs import (MAY_DIFFER, THIS_CALL, TOY_DATA, Lock, check_or_create, model_card, name_references,
                      parameter_table, parse_settings, public_name, read_settings)
from ldm.schedule import T, add_noise
from ldm.vae import draw_latent
from ldm.weights import TensorFile, licence, load_unet, load_vae, open_sd15
from lora import inject, lora_parameters, save_adapter
from projector import Projector
from sample import Job, Model, Sampling, latent_shape, make_images, write_real

DROPOUT = 0.05                          # of the projector's hidden units
MAX_GRAD_NORM = 1.0                     # the paper names none; the default of Diffusers' scripts
SAVE_SECONDS = 300
FEW = 10                                # among fewer validation images chance chooses: the best is the last
# Share of a compiled step's activations kept for the backward pass, the rest being recomputed. SD1.5 at batch
# 16, 512 px: 5.3 GiB instead of 10.5, for 8.7 % more FLOPs (tests/test_speed.py).
MEMORY_BUDGET = 0.5
# Numbers in a step at its peak, per image, latent pixel and channel of the first level: 120 with checkpoints
# (`python tests/bench.py memory`), more compiled.
ACTIVATIONS = 170
MOMENTS = "exp_avg", "exp_avg_sq"       # of AdamW
LOSS_SCALE = 2.0 ** 16                  # for float16, whose smallest number is 6e-8: the gradients' factor

def learning_rate_factor(step, warm_up, total):
    """Linear up to 1 over `warm_up` steps, then a cosine down to 0 at `total` (the paper names no floor)."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
    return (step + 1) / warm_up if step < warm_up else cosine

# ---- everything random is a function of (seed, step) -------------------------------------------------
STEP, ORDER, VALIDATION, INITIAL = range(4)

def generator(*key):
    """A CPU generator for integers such as (seed, STEP, step); each key has a stream of its own."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[4:8]))

@dataclass
class Draws:
    """All random numbers of a step, for B images. Numbers in comments: the lines of Algorithm 1."""
    mirrored: torch.Tensor              # (B,) bool
    posterior: torch.Tensor             # (B, 4, h, w)  4: E(x) is a sample, as in Diffusers
    eps: torch.Tensor                   # (B, 4, h, w)  5: ε
    t: torch.Tensor                     # (B,)          5: the paper's {1, ..., T}, counted from 0
    null: torch.Tensor                  # (B, 1) bool   7: m
    dropout: torch.Tensor | None        # (B, depth-1, d_h): of the projector's units, 0 or 1/(1 - DROPOUT)

    def subset(self, indices, device):
        """The numbers of some images of the batch, on the device; `mirrored` stays where it is."""
        mirrored, *rest = (x if x is None else x[list(indices)] for x in vars(self).values())
        return Draws(mirrored, *(x if x is None else to_device(x, device) for x in rest))

def draw_batch(g, batch, z_shape, cfg_drop, layers, width):
    """The Draws of a whole batch. z_shape: (4, h, w) of a latent; layers, width: with dropout."""
    return Draws(
        mirrored=torch.rand(batch, generator=g) < 0.5, posterior=torch.randn(batch, *z_shape, generator=g),
        eps=torch.randn(batch, *z_shape, generator=g),
        t=torch.randint(0, T, (batch,), generator=g),                                       # 5
        null=torch.rand(batch, 1, generator=g) < cfg_drop,                                  # 7
        dropout=(torch.rand(layers, batch, width, generator=g) >= DROPOUT).transpose(0, 1) / (1 - DROPOUT))

def draw_validation(n, z_shape):
    """The fixed Draws of the validation loss: evenly spread timesteps, no dropout, no mirroring."""
    draws = draw_batch(generator(VALIDATION), n, z_shape, cfg_drop=0, layers=0, width=0)
    t = ((torch.arange(n) + 0.5) * T / n).long()[torch.randperm(n, generator=generator(VALIDATION, 1))]
    return replace(draws, mirrored=torch.zeros(n, dtype=torch.bool), t=t, dropout=None)

def batch_of_step(seed, step, batch, n):
    """Indices of the images of a step; each epoch is a permutation of its own. The last batch is filled from
    its start, as in DistributedSampler: 5,398 images make 338 full batches (the paper does not say)."""
    epoch, k = divmod(step, math.ceil(n / batch))
    order = torch.randperm(n, generator=generator(seed, ORDER, epoch))
    return order[torch.arange(k * batch, (k + 1) * batch) % n].tolist()

# ---- Algorithm 1 -------------------------------------------------------------------------------------
def noise_prediction_loss(unet, projector, mean, logvar, e, draws):
    """Lines 4 to 10 of Algorithm 1 -> ‖ε - ε_θ(z_t, t, c)‖² of each image, as a mean over its latent, (B,).
    mean, logvar (B, 4, h, w) and e (B, d_e): the frozen encoders' outputs for the images x."""
    z0 = draw_latent(mean, logvar, draws.posterior)                         # 4: encode to latent space
    z_t = add_noise(z0, draws.eps, draws.t)                                 # 6: forward diffusion (eq. 1)
    e = torch.where(draws.null, projector.null, e)                          # 8: replace with e_∅
    c = projector(e, draws.dropout)                                         # 9: to the context (eqs. 3, 4)
    return (draws.eps - unet(z_t, draws.t, c)).square().mean((1, 2, 3))     # 10: the loss (eq. 2)

class Trainer:
    """Line 1 of Algorithm 1: what is trained, its optimizer, the log; a run's whole state, for `save`."""
    def __init__(self, settings, unet, projector, cache, images, z_shape, device):
        """images: [(name, hash)] of the training images. z_shape: (4, h, w) of a latent."""
        self.settings, self.device, self.z_shape = settings, device, z_shape
        self.unet, self.projector, self.cache, self.images = unet, projector, cache, images
        self.compiled = device.type == "cuda" and not settings.no_compile
        functorch_config.activation_memory_budget = MEMORY_BUDGET
        self.network = torch.compile(unet, dynamic=False, fullgraph=True) if self.compiled else unet
        for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            level.checkpointing = device.type != "cpu" and not self.compiled
        self.micro_batch = self.images_per_pass()
        self.scale = self.largest_scale = LOSS_SCALE if unet.conv_in.weight.dtype == torch.float16 else 1.0
        self.steps_per_epoch = math.ceil(len(images) / settings.batch)       # see batch_of_step
        self.total = min(settings.epochs * self.steps_per_epoch, settings.max_steps or math.inf)
        self.warm_up = min(self.steps_per_epoch, max(1, self.total // 2))   # half of a run of one epoch
        lora, rest = lora_parameters(unet), dict(projector.named_parameters())
        parts = {"unet": lora, "projector": rest}
        self.named = {f"{part}.{name}": p for part, found in parts.items() for name, p in found.items()}
        self.parameters = [p.requires_grad_() for p in self.named.values()]
        groups = [dict(params=list(lora.values()), base=settings.lr, weight_decay=1e-3),
                  dict(params=list(rest.values()), base=settings.lr * settings.lr_ratio, weight_decay=1e-4)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
        self.step, self.history, self.losses, self.best = 0, [], [], math.inf
        self.stop, self.prefetched = 0, None     # a signal to any process; `load_step` of the next step
        self.began = self.saved_at = time.perf_counter()    # began: earlier by the minutes of earlier calls

    def images_per_pass(self):
        """--micro-batch; or this process's share of the batch, in as few equal parts as fit the memory."""
        share, first = math.ceil(self.settings.batch / WORLD), self.unet.conv_in.weight
        if self.settings.micro_batch or self.device.type != "cuda":
            return min(share, self.settings.micro_batch or share)
        image = ACTIVATIONS * len(first) * math.prod(self.z_shape[1:]) * first.element_size()
        fit = min(all_gather([max(1, int(0.9 * torch.cuda.mem_get_info(self.device)[0] / image))]))
        return math.ceil(share / math.ceil(share / fit))

    def load_part(self, hashes, draws, part, size):
        """Images `part` of a batch -> (how many, cached mean, logvar, e, and Draws), all on the device."""
        at = (list(part) * size)[:size] if self.compiled else list(part)        # compiled: for one shape
        draws = draws.subset(at, self.device)
        cached = self.cache.batch([hashes[i] for i in at], draws.mirrored.tolist())
        return len(part), *(to_device(x, self.device) for x in cached), draws

    def load_step(self, step):
        """-> indices and Draws of the whole batch; a `load_part` for each pass of this process's share."""
        s, shape, size = self.settings, self.projector.shape, self.micro_batch
        indices = batch_of_step(s.seed, step, s.batch, len(self.images))                            # 3
        draws = draw_batch(generator(s.seed, STEP, step), s.batch, self.z_shape, s.cfg_drop,
                           layers=shape["depth"] - 1, width=shape["hidden"])
        hashes, own = [self.images[i][1] for i in indices], shard(range(s.batch))
        passes = [own[i:i + size] for i in range(0, len(own), size)]
        return indices, draws, [self.load_part(hashes, draws, part, size) for part in passes]

    def train_step(self):
        """One iteration of Algorithm 1 -> (loss, gradient norm), summed over passes and processes. Fails,
        before the update, if not finite; what overflowed in float16 is computed again with half the scale."""
        indices, draws, passes = this = self.prefetched or self.load_step(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for n, *inputs in passes:
            losses = noise_prediction_loss(self.network, self.projector, *inputs)                   # 4 to 10
            loss = losses[:n].sum() / self.settings.batch
            (self.scale * loss).backward()
            total += loss.detach()
        stop = torch.full_like(total, SIGNALS.received)
        all_reduce([total, stop, *(p.grad for p in self.parameters)])
        for p in self.parameters if self.scale > 1 else ():
            p.grad /= self.scale
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.prefetched = self.load_step(self.step + 1)              # while a GPU computes
        loss, norm, self.stop = torch.stack([total, norm, stop]).tolist()       # waits for it
        if math.isfinite(loss) and not math.isfinite(norm) and self.scale > 1:
            self.scale, self.prefetched = self.scale / 2, this
            return self.train_step()
        if not math.isfinite(loss + norm):
            names = ", ".join(self.images[i][0] for i in indices)
            raise Fail(f"step {self.step}: loss {loss}, gradient norm {norm}, timesteps {draws.t.tolist()}, "
                       f"images {names}; the last state is kept. Try a lower --lr, or check these images")
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * learning_rate_factor(self.step, self.warm_up, self.total)
        self.optimizer.step()                                                                       # 11
        self.step += 1
        if self.step % 1000 == 0:
            self.scale = min(2 * self.scale, self.largest_scale)
        self.losses.append(loss)
        return loss, norm

    @torch.no_grad()
    def validation_loss(self, hashes):
        """With fixed Draws -> {"val_loss": mean, "val_loss_0" to "_9": at each tenth of the timesteps}."""
        n, size = len(hashes), self.micro_batch * (1 + self.compiled)   # 2: one graph with guided sampling
        draws, losses = draw_validation(n, self.z_shape), torch.zeros(n, device=self.device)
        for start in shard(range(0, n, size)):
            k, *inputs = self.load_part(hashes, draws, range(start, min(start + size, n)), size)
            losses[start:start + k] = noise_prediction_loss(self.network, self.projector, *inputs)[:k]
        all_reduce([losses])
        row, losses, tenth = {"val_loss": losses.mean().item()}, losses.cpu(), draws.t * 10 // T
        return row | {f"val_loss_{k}": losses[tenth == k].mean().item() if k in tenth else None
                      for k in range(10)}

    def epoch_is_due(self):
        """Whether an epoch, or the run, is complete and its row of the log is not yet written."""
        at_end = self.step % self.steps_per_epoch == 0 or self.step == self.total
        return at_end and self.step > (self.history[-1]["step"] if self.history else 0)

    def save(self, folder, header, best=False):
        """Write adapter (if best, twice), state and log. Fails if a parameter is not finite."""
        if not all(p.isfinite().all() for p in self.parameters):
            raise Fail(f"step {self.step}: not finite; the last good state is kept. Try a lower --lr")
        self.saved_at = time.perf_counter()
        if not RANK0:
            return
        for name in ["adapter-best.safetensors"] * best + ["adapter.safetensors"]:
            save_adapter(folder / name, self.unet, self.projector, header | {"step": str(self.step)})
        moments = {f"{name}/{key}": self.optimizer.state[p][key] for name, p in self.named.items()
                   if p in self.optimizer.state for key in MOMENTS}
        state = dict(step=self.step, best=self.best, losses=self.losses, history=self.history,
                     minutes=(self.saved_at - self.began) / 60, scale=self.scale)
        state = {key: json.dumps(value) for key, value in state.items()}
        save_tensors(folder / "state.safetensors", {**self.named, **moments}, state)
        if self.history:
            save_csv(folder / "log.csv", self.history)

    @torch.no_grad()
    def restore(self, path):
        """Return to the state that `save` wrote."""
        file = TensorFile(path)
        with foreign_file(path, advice="restore it, or pass another --run"):
            header = {"minutes": 0, "scale": self.scale} | file.header      # an old state lacks them
            self.step, minutes = int(header["step"]), float(header["minutes"])
            self.best, scale = float(header["best"]), float(header["scale"])        # 1: not of float16
            self.scale = self.largest_scale if scale == 1 else min(scale, self.largest_scale)
            self.losses, self.history = json.loads(header["losses"]), json.loads(header["history"])
            state = dict(file.read(file.names))
            for name, p in self.named.items():
                p.copy_(state[name].view_as(p))
                if f"{name}/exp_avg" in state:
                    moments = {key: state[f"{name}/{key}"].view_as(p).to(p, copy=True) for key in MOMENTS}
                    step = torch.tensor(float(self.step), device=self.device)
                    self.optimizer.state[p] = dict(step=step, **moments)
            ends = [0, *(row["step"] for row in self.history if row.keys() >= {"epoch", "val_loss"})]
            steps = [*ends, self.step, self.total]
            complete = steps == sorted(steps) and len(self.losses) == self.step - ends[-1]  # since the last
            drawn = all(p.any() for name, p in self.named.items() if name.endswith((".A", ".weight")))
            sane = all(x.isfinite().all() and (x.min() >= 0 or "_sq" not in n) for n, x in state.items())
            if not (complete and drawn and sane and math.isfinite(self.scale + minutes + sum(self.losses))):
                raise ValueError("its log does not match its step, a matrix is 0, or a number is impossible")
        self.began, self.prefetched = time.perf_counter() - 60 * minutes, None

def train(trainer, validation, folder, header):
    """Steps to the end; `end_epoch` after each epoch. -> the exit code where a signal stopped it."""
    with progress(total=trainer.total, initial=trainer.step, desc="training", unit="step") as bar:
        SIGNALS.deferred, seconds = True, []        # seconds: of each step of this epoch
        while True:                                                                                 # 2
            if trainer.epoch_is_due():
                row, best = end_epoch(trainer, validation, seconds)
                trainer.save(folder, header, best)
                if RANK0:
                    save_text(folder / "README.md", model_card(folder))
                shown = {k: v for k, v in row.items() if v is not None and not k.startswith("val_loss_")}
                bar.write(" ".join(f"{k} {v:.4g}" for k, v in shown.items()))
                seconds = []
            if trainer.step == trainer.total:                                                       # 12
                return None
            began = time.perf_counter()
            loss, norm = trainer.train_step()                                               # 3 to 11
            seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss:.4f}", norm=f"{norm:.3f}", refresh=False,
                            images_per_s=f"{trainer.settings.batch / seconds[-1]:.1f}")
            bar.update()
            late = time.perf_counter() - trainer.saved_at > SAVE_SECONDS
            # with several processes it comes with the gradients, so that all stop after the same step
            stop = trainer.stop or (WORLD == 1 and SIGNALS.received)
            if stop or late or trainer.epoch_is_due():
                trainer.save(folder, header)
            if stop:
                bar.write(f"{folder}: saved at step {trainer.step}; repeat the command to resume")
                barrier()                   # rank 0 writes
                return 128 + (SIGNALS.received or signal.SIGTERM)

def end_epoch(trainer, validation, seconds):
    """Validate -> the row of the log, not saved yet; whether these weights are the best, as fake/ then is."""
    SIGNALS.deferred = False                # all is saved: a stop during validation or sampling loses nothing
    SIGNALS.leave()
    epoch, settings = math.ceil(trainer.step / trainer.steps_per_epoch), trainer.settings
    lr = settings.lr * learning_rate_factor(trainer.step - 1, trainer.warm_up, trainer.total)
    speed = round(settings.batch / fmean(seconds[1:]), 2) if seconds[1:] else None      # the first compiles
    peak = torch.cuda.max_memory_allocated(trainer.device) / 1e9 if trainer.device.type == "cuda" else None
    row = dict(epoch=epoch, step=trainer.step, train_loss=fmean(trainer.losses),
               **trainer.validation_loss(validation.hashes), lr_lora=lr, lr_projector=lr * settings.lr_ratio,
               images_per_second=speed, peak_memory_gb=peak)
    due = not validation.sampled or epoch % settings.val_every == 0 or trainer.step == trainer.total
    row[validation.column] = validation.distance(trainer, epoch) if due else None
    SIGNALS.deferred = True
    best = due and (validation.few or row[validation.score] < trainer.best)
    if best:
        trainer.best = row[validation.score]
    validation.finish(best)
    row["minutes"] = round((time.perf_counter() - trainer.began) / 60, 2)
    trainer.history, trainer.losses = trainer.history + [row], []
    return row, best

class Validation:
    """The loss of all validation images; the distance of one sample of each, image i with seed i (Table 4).
    fid.py gives the same of real/, the images at the model's size, and fake/, the best adapter's samples."""
    def __init__(self, inputs, hashes, device):
        """hashes: of all validation images' files."""
        settings, self.hashes, self.vae_file = inputs.settings, hashes, inputs.vae_file
        self.folder, self.made = inputs.folder, inputs.folder / ".fake"
        self.extract = partial(inputs.space.extract, device=device)
        title = {p.name: p.title for p in inputs.patches}
        pairs = sorted(zip(inputs.names["val"], hashes), key=lambda pair: title[pair[0]])
        pairs = subsample(pairs, settings.val_samples)
        self.sampled = [digest for _, digest in pairs]
        sources, _ = name_references([(title[name], inputs.data / name) for name, _ in pairs], {})
        for old in [self.made, *[self.folder / "real"] * (not inputs.started)] if RANK0 else ():
            shutil.rmtree(old, ignore_errors=True)          # of a run that was killed
        real = write_real(self.folder / "real", sources, settings.size)
        how, self.real = Sampling(cfg=settings.val_cfg, steps=settings.val_steps), list(real.values())
        self.jobs = [Job(self.made / f"{name}.png", name, i, how) for i, name in enumerate(sources)]
        if RANK0 and self.real:
            save_image(self.folder / "patch.png", load_rgb(self.real[0]))
        barrier()
        several = len(real) > 1
        self.column = "fid" if inputs.space.kind == "inception" else "fid_encoder"
        self.score = self.column if several else "val_loss"     # the best adapter has its lowest value
        self.few = len(self.sampled if several else hashes) < FEW       # or is the last: no chance
        self.features = self.extract(self.real) if several else None
        if self.few:
            print(f"note: with under {FEW} validation images adapter-best and fake/ are of the last epoch")
        elif self.score == "fid_encoder" and settings.uni2h != "toy":
            print("note: without --inception FILE the encoder's own features choose the best adapter")

    def distance(self, trainer, epoch):
        """Sample with the weights as they are -> the distance; None for fewer than two images."""
        if not self.sampled:
            return None
        e = trainer.cache.batch(self.sampled, [False] * len(self.sampled))[2]
        model = Model(trainer.network, trainer.projector, load_vae(self.vae_file, trainer.device),
                      trainer.z_shape, trainer.micro_batch, trainer.compiled, "in training")
        make_images(model, self.jobs, {job.reference: row for job, row in zip(self.jobs, e)})
        fake = [job.path for job in self.jobs]
        if RANK0:
            grid = subsample(list(zip(self.real, fake)), 8)
            save_sheet(self.folder / f"grids/epoch{epoch:02d}.png", grid, ["reference", "sample"] * len(grid))
        if self.features is not None:
            return frechet_distance(self.features, self.extract(fake))

    def finish(self, best):
        """Make the newest samples those of fake/ if they are the best; else remove them."""
        if RANK0 and best and self.made.exists():
            shutil.rmtree(self.folder / "fake", ignore_errors=True)
            self.made.rename(self.folder / "fake")
        elif RANK0:
            shutil.rmtree(self.made, ignore_errors=True)

# ---- the program: open, build, train -----------------------------------------------------------------
def main():
    settings, resumed = parse_settings(__doc__)
    device = pick_device(settings.device)
    join_processes(device)
    inputs = Inputs(settings, resumed)
    trainer, validation, header = build(inputs, device)
    if stop := train(trainer, validation, inputs.folder, header):
        return stop
    if RANK0:           # again: a run that was killed while it saved may lack them
        save_csv(inputs.folder / "log.csv", trainer.history)
        save_text(inputs.folder / "README.md", model_card(inputs.folder))
    ref = "patch.png" if validation.sampled else "PATCH.png"
    command = command_line("sample.py", "--run", inputs.folder, "--ref", ref)
    print(f"{inputs.folder}: complete after {trainer.step} steps; {'last' if validation.few else 'best'} "
          f"{validation.score} {trainer.best:.4f}. Next: {command}")

class Inputs:
    """A run's folder, made or found, and what it reads, opened and checked; nothing is computed yet."""
    def __init__(self, settings, resumed):
        self.folder = folder = Path(settings.run)
        toy = settings.data == TOY_DATA                 # the toy tissue is drawn beside the run
        self.data = folder.parent / TOY_DATA if toy else Path(settings.data)
        if WORLD > settings.batch:
            raise Fail(f"--batch {settings.batch}: fewer images than {WORLD} processes; start fewer")
        # the features of the validation FID: those that the run began with, else by what is available
        features = settings.features or getattr(read_settings(folder), "features", None) or (
            "inception" if settings.inception or cached_inception().is_file() else "encoder")
        self.settings = settings = replace(settings, features=broadcast(features))
        with rank0_first():
            self.started = (folder / "state.safetensors").exists()      # there is something to resume from
            read = partial(read_dataset, case=settings.case, say=None if self.started else print)
            patches = None if toy else read(self.data)      # before gigabytes are downloaded
            if patches and not self.started and folder.resolve().is_relative_to(self.data.resolve()):
                raise Fail(f"--run {folder} is inside the dataset {self.data}; pass another --run")
            self.unet_file, self.vae_file = open_sd15(settings.sd15, settings.vae)
            self.encoder = open_encoder(settings.uni2h, settings.encoder)
            # on the meta device: arguments that do not fit are found before anything is computed or written
            unet, vae = load_unet(self.unet_file, "meta"), load_vae(self.vae_file, "meta")
            self.z_shape = latent_shape(unet, vae, settings.size)
            if toy and not resumed:
                print("No --data: a small run on procedural tissue with the toy base, minutes on a laptop. "
                      "For the real thing: python train.py --data FOLDER", flush=True)
            self.patches = patches or read(write_toy_tissue(self.data))
            self.lock = Lock(folder) if RANK0 and folder.is_dir() else None
            if not self.started and (folder / "log.csv").exists():      # it is written after a state
                raise Fail(f"{folder}/state.safetensors is missing; restore it, or pass another --run")
            path, how = folder / "split.json", settings.split
            saved = read_split(path, self.patches) if self.started or path.exists() else None
            split = saved if self.started else make_split(self.patches, how)
            if saved not in (None, split):
                raise Fail(f"{path} is not the split of --split {how}; pass --split {path}, or remove it")
            self.names = split | {part: subsample(split[part], settings.limit) for part in ("train", "val")}
            self.space = Inception(settings.inception) if settings.features == "inception" else self.encoder
            self.sha256 = dict(vae=self.vae_file.fingerprint(), encoder=self.encoder.fingerprint(),
                               base=self.unet_file.fingerprint(), features=self.space.fingerprint()[:8])
            check_or_create(folder, settings, self.sha256)
            self.lock = self.lock or (Lock(folder) if RANK0 else None)
            if RANK0:
                save_text(path, describe_split(split, self.patches))
        own = MAY_DIFFER - {"micro_batch"} | THIS_CALL
        check_same("settings or weights", [replace(settings, **dict.fromkeys(own)), self.sha256])
        describe(self.patches, self.names)

def describe(patches, split):
    """Print the dataset and its split, of each class too, with an example and its case."""
    parts = ", ".join(f"{part} {len(names)}" for part, names in split.items())
    print(f"{len(patches)} patches of {len({p.case for p in patches})} cases: {parts}")
    for label in sorted({p.label for p in patches}):
        own = {p.name: p for p in patches if p.label == label}
        counts, example = (len(own.keys() & names) for names in split.values()), next(iter(own.values()))
        print(f"    {label}: {' | '.join(map(str, counts))}, such as {example.name} of case {example.case}")

def build(inputs, device):
    """Cache the encoders' outputs; build or restore the rest -> Trainer, Validation, adapter header."""
    settings, folder, encoder, sha256 = inputs.settings, inputs.folder, inputs.encoder, dict(inputs.sha256)
    cache = Cache(folder.parent / "cache", sha256["vae"], sha256["encoder"], settings.size)
    def encoders():         # which the cache frees before the U-Net is loaded
        return load_vae(inputs.vae_file, device).encode, partial(encoder.embed, encoder.load(device))
    paths = {part: [inputs.data / name for name in names] for part, names in inputs.names.items()}
    hashes = {part: cache.fill(paths[part], encoders) for part in ("train", "val")}
    if device.type == "cuda":           # of the encoders
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    sha256["images"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    if RANK0 and not inputs.started:
        hashes["test"] = hash_files(paths["test"])
        note_equal_images(inputs.names, hashes, inputs.patches)
    check_or_create(folder, settings, sha256)
    dtype = broadcast(frozen_dtype(device, settings.dtype, inputs.unet_file.shapes["conv_in.weight"][0]))
    unet = load_unet(inputs.unet_file, device, dtype)
    inject(unet, settings.rank, settings.alpha, torch.Generator().manual_seed(settings.seed))
    torch.manual_seed(generator(settings.seed, INITIAL).initial_seed())         # for the projector
    shape = settings.hidden, settings.tokens, unet.context, settings.depth, settings.token_norm
    projector = Projector(encoder.width, *shape).to(device)
    images = list(zip(inputs.names["train"], hashes["train"]))
    trainer = Trainer(settings, unet, projector, cache, images, inputs.z_shape, device)
    print(parameter_table(unet, projector) + "\nnote: the first step compiles for minutes" * trainer.compiled)
    if inputs.started:
        trainer.restore(folder / "state.safetensors")
        print(f"{folder}: found, resumes after step {trainer.step} of {trainer.total}")
    names = dict(base=settings.sd15, vae=settings.vae, encoder=encoder.source)
    recipe, header = encoder.recipe, {key: public_name(name or "") for key, name in names.items()}
    header |= dict(base_sha256=sha256["base"], vae_sha256=sha256["vae"], encoder_sha256=sha256["encoder"],
                   resolution=str(settings.size), seed=str(settings.seed), dtype=str(dtype).partition(".")[2],
                   encoder_recipe=recipe.name, encoder_licence=recipe.licence,
                   licence=licence(settings.sd15, recipe.terms))
    return trainer, Validation(inputs, hashes["val"], device), header

if __name__ == "__main__":
    run_program(main)
