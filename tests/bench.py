"""Ours beside its peers, on this machine and in this run: `python tests/bench.py` or `... train sample first
fid distance load cache kept memory`.

    python tests/bench.py train sample --full --size 256 --batch 1      # SD1.5's widths, the default on a GPU
    python tests/bench.py train --cap 12e9                  # GPU: nothing may allocate more than 12 GB
    python tests/bench.py gpu               # what only a GPU can show, in less than 8 minutes; compiled last

Networks have random weights, the same for all. Each side's settings are tried one after the other and what is
faster is kept; then the fastest of ours and the fastest of the peer's take turns. Times are medians; a ratio
above 1 says that ours is faster. FLOPs are counted on the meta device, recomputation left out; their share is
of the rate of a large matrix multiplication. The last line is one JSON object."""
import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
import memory  # noqa: E402
import peers  # noqa: E402
from ldm.app import first_line, pick_device, read_json, save_json  # noqa: E402
from peers import Figures  # noqa: E402

# ---- measuring ---------------------------------------------------------------------------------------------

def once(step, device):
    """Figures of one call, without the peak."""
    start = time.perf_counter()
    found = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found if isinstance(found, Figures) else Figures(time.perf_counter() - start, 0)

def attempt(build, args, cap, warm=True):
    """Build a candidate and time it -> (Figures, step), or (why there are none, None).

    It has `cap` bytes of a GPU for itself: what another holds meanwhile is added to them."""
    if time.perf_counter() > args.deadline:
        return "left out: no time", None
    device, cuda = args.device, args.cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        total, before = torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device)
        limit = min(1.0, (cap + torch.cuda.memory_reserved(device)) / total)
        torch.cuda.set_per_process_memory_fraction(limit, device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = build()
        for _ in range((1 + cuda) * warm):  # compiles, makes the optimizer's state, fills the memory pool
            once(step, device)
        found, end = [once(step, device)], time.perf_counter() + 1
        while len(found) < args.repeats and time.perf_counter() < end:
            found.append(once(step, device))
    except Exception as problem:            # out of memory, no compiler, a package that is not installed
        return f"failed: {first_line(problem)}", None
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    peak = max(f.peak for f in found) or (torch.cuda.max_memory_allocated(device) - before if cuda else 0)
    return Figures(statistics.median(f.seconds for f in found), peak), step

def describe(side, chosen):
    """Its name in the table: "Diffusers, bfloat16, compiled default, channels_last"."""
    words = [f"{key} {value}" for key, value in chosen.items() if value not in (False, None)]
    return ", ".join([side, *words]).replace(" True", "").replace("dtype torch.", "")

def search(work, side, args):
    """Try a side's settings, one change after the other -> (name, step) of the fastest; None if all fail."""
    (build, settings), best, results = work.sides[side], None, args.results.setdefault(work.name, {})
    if values := args.compiled and settings.get("compiled"):
        settings = settings | dict(compiled=values[:1] if args.compiled == "no" else values[1:] or values)
    chosen = {key: values[0] for key, values in settings.items()}
    for key, value in [(None, None), *((k, v) for k, values in settings.items() for v in values[1:])]:
        trial = chosen | {key: value} if key else chosen
        name = describe(side, trial)
        found, step = attempt(partial(build, **trial), args, args.cap, work.warm)
        results[name] = dict(problem=found) if step is None else found._asdict()
        row(work, name, results[name], args)
        if step and (best is None or found.seconds < results[best[0]]["seconds"]):
            best, chosen = (name, step), trial
        step = None                         # frees the slower one before the next is built
        if args.json:
            save_json(args.json, args.results)
    return best

def measure(work, args):
    """Print and record a Work: every candidate that is tried, then ours and the peer's fastest in turns."""
    best = [search(work, side, args) for side in work.sides]
    if None in best:
        args.failed |= best[0] is None
        return
    times = {name: [] for name, _ in best}
    for k in range(args.repeats):
        for name, step in best if k == 0 or time.perf_counter() < args.deadline else ():
            times[name].append(once(step, args.device).seconds)
    results = args.results[work.name]
    ours, peer = (results[name] for name in times)
    for name, seconds in times.items():
        results[name]["seconds"] = statistics.median(seconds)
    ours |= dict(ratio=peer["seconds"] / ours["seconds"], peer=[*times][1])
    for name in times:
        row(work, name, results[name], args)

def row(work, name, result, args):
    """Print a line of the table."""
    if "problem" in result:
        print(f"| {work.name} | {name} | {result['problem']} | | | |", flush=True)
        return
    seconds, rate = result["seconds"], work.images * work.flop / result["seconds"]
    if rate:
        result["share"] = rate / args.rate
    share = f"{rate / 1e12:.3g} ({rate / args.rate:.0%})" if rate else ""
    size = f"{result['peak'] / 1e9:.2f} GB" if result["peak"] else ""
    ratio = f"{result['ratio']:.2f}x of {result['peer']}" if "ratio" in result else ""
    speed = f"{1000 * seconds:.4g} ms, {work.images / seconds:.3g} images/s"
    print(f"| {work.name} | {name} | {speed} | {ratio} | {size} | {share} |", flush=True)

def matmul_rate(args):
    """FLOP/s of a large matrix multiplication in the dtype of the frozen network."""
    n = 8192 if args.cuda else 1024
    a, b = (torch.randn(n, n, device=args.device).to(peers.dtypes(args)[0]) for _ in range(2))
    times = [once(lambda: [a @ b for _ in range(4)], args.device).seconds for _ in range(1 + args.repeats)]
    return 4 * 2 * n ** 3 / statistics.median(times[1:])

# ---- memory, and what only a GPU can show ------------------------------------------------------------------

def kept(args):
    """Bytes that a compiled training step keeps for the backward pass, batch 16 at 512 px, and the FLOPs that
    this costs."""
    for budget in (1.0, 0.7, 0.5, 0.3):
        size, _, flop = memory.compiled_step(budget=budget)
        args.results[f"kept, budget {budget}"] = dict(bytes=size, flop=flop)
        more = flop / args.results["kept, budget 1.0"]["flop"] - 1
        print(f"| kept for the backward pass, batch 16, 512 px | budget {budget} | {size / 2 ** 30:.2f} GiB "
              f"| | | {flop / 1e12:.2f} TFLOP a step ({more:+.1%}) |", flush=True)
    return ()

def card(args):
    """What training, sampling and caching hold, and which cards have as much."""
    print()
    memory.table()
    return ()

def largest(args):
    """The largest micro-batch of a step that is not compiled in 8, 12, 16 GB, among shares of --batch."""
    sizes = sorted({args.batch * k // 8 for k in (4, 6, 8, 12, 16, 24, 32)} - {0})
    fit, dtype = 0, peers.dtypes(args)[0]
    for cap in (8e9, 12e9, 16e9):
        for n in (n for n in sizes if n > fit):
            if not attempt(partial(peers.our_step, args, n, dtype, compiled=False), args, cap)[1]:
                break
            fit = n
        args.results[f"{cap / 1e9:.0f} GB"] = fit
        print(f"largest micro-batch in {cap / 1e9:.0f} GB of {sizes}: {fit}", flush=True)
    return ()

# Parts of `gpu` and the seconds that each may take, less than 8 minutes in all; the first matter most. To
# compile a step of SD1.5 took an H200's host (16 cores) more than 110 s, sampling about 50 s.
PARTS = {"tests": 60, "train": 65, "largest": 35, "sample": 45, "first": 60, "fid": 20, "sample compiled": 75,
         "train compiled": 115}

def gpu(args):
    """Each of PARTS in a process of its own; after each a line of JSON with all results so far."""
    same = "device", "width", "size", "batch", "images", "cap", "repeats"
    given = [f"--{name}={getattr(args, name)}" for name in same]
    for name, limit in PARTS.items():
        file, start = args.folder / f"{name}.json", time.perf_counter()
        steps = args.steps if name == "first" else max(1, args.steps // 3)
        work, _, compiled = name.partition(" ")
        command = [__file__, work, *given, f"--steps={steps}", f"--limit={0.8 * limit}", f"--json={file}",
                   f"--compiled={'only' if compiled else 'no'}"]
        if name == "tests":
            command = ["-m", "pytest", "-vs", "--tb=short", "-k", "not compiled", TESTS / "test_cuda.py"]
        print(f"\n{name}: at most {limit} s", flush=True)
        code = run_limited(command, limit)
        seconds = round(time.perf_counter() - start, 1)
        args.results[name] = dict(exit=code, seconds=seconds, results=read_json(file))
        args.failed |= code != 0
        print(summary(args), flush=True)
    return ()

def run_limited(command, seconds):
    """Run Python, end it and its children after these seconds -> exit code or "time limit"."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=TESTS.parent, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "time limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

# ---- the program -------------------------------------------------------------------------------------------

# In a run without names; each gives Works to measure.
WORKS = dict(train=peers.training, sample=peers.sampling, first=peers.first, fid=peers.features,
             distance=peers.distance, load=peers.loading, cache=peers.caching)
OTHERS = dict(kept=kept, memory=card, largest=largest, gpu=gpu)

def summary(args):
    """Machine, sizes and all results so far, as one line of JSON."""
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(args.device) if args.cuda else cpu
    dtype, rate = str(peers.dtypes(args)[0]).partition(".")[2], args.rate
    return json.dumps(dict(machine=machine, torch=torch.__version__, width=args.width, size=args.size,
                           batch=args.batch, dtype=dtype, flops=rate, results=args.results))

def parse_args(arguments):
    names = [*WORKS, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("work", nargs="*", metavar="WORK", help=f"{', '.join(names)} (default: {', '.join(WORKS)})")
    add("--width", type=int, help="of the U-Net's first level (default: 320 on a GPU, 64 on the CPU)")
    add("--full", dest="width", action="store_const", const=320, help="SD1.5's width, 320")
    add("--size", type=int, help="pixels (default: 512 on a GPU, 256 on the CPU)")
    add("--batch", type=int, help="images (default: 16 on a GPU, 2 on the CPU)")
    add("--steps", type=int, help="of sampling (default: 30 on a GPU, 2 on the CPU)")
    add("--images", type=int, help="for fid and cache (default: 387 on a GPU, 64 on the CPU)")
    add("--repeats", type=int, default=5, help="turns of the fastest (default: 5)")
    add("--cap", type=float, default=12e9, help="bytes of a GPU that a candidate may take (default: 12e9)")
    add("--compiled", choices=("no", "only"), help="of the settings (default: both)")
    add("--limit", type=float, default=1e9, help="seconds after which no other candidate is tried")
    add("--json", metavar="FILE", help="write results so far to it after each candidate")
    add("--device", default="auto")
    args = parser.parse_args(arguments)
    if unknown := set(args.work) - set(names):
        parser.error(f"{min(unknown)}: there are {', '.join(names)}")
    args.device = pick_device(args.device)
    args.cuda = args.device.type == "cuda"
    for name, *values in (("width", 64, 320), ("size", 256, 512), ("batch", 2, 16), ("steps", 2, 30),
                          ("images", 64, 387)):
        setattr(args, name, getattr(args, name) or values[args.cuda])
    args.results, args.failed, args.deadline = {}, False, time.perf_counter() + args.limit
    return args

def main(arguments=None):
    args = parse_args(arguments)
    torch._dynamo.config.recompile_limit = 64           # all candidates together
    args.rate = None if args.work == ["gpu"] else matmul_rate(args)     # nothing stays on the GPU meanwhile
    print(f"{summary(args)}\n\n| work | who | time | ratio | peak memory | TFLOP/s (share) |\n"
          "|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.work or WORKS:
            for work in (WORKS | OTHERS)[name](args):
                measure(work, args)
    if args.json:
        save_json(args.json, args.results)
    print(summary(args), flush=True)
    return int(args.failed)

if __name__ == "__main__":
    sys.exit(main())
