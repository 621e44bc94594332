"""Shared by the programs: clear failures, arguments, atomic files, device, processes, signals.
Under torchrun every process runs the whole program on its shard of images; rank 0 writes what a run has."""
import argparse
import csv
import errno
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from dataclasses import field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from tqdm import tqdm

RANK, WORLD = (int(os.environ.get(name) or default) if dist.is_torchelastic_launched() else default
               for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))      # torchrun's
RANK0 = RANK == 0
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SEED = 2 ** 31          # torch's generator on the CPU uses the low 32 bits of a seed, here seed + image
ROOT = Path(__file__).resolve().parents[1]
sys.modules["ldm.files"] = sys.modules[__name__]        # its former name, for scripts of users

# ---- failures ------------------------------------------------------------------------------------
class Fail(Exception):
    """An error that the user can fix. Its message, one line, names the object, the problem, the remedy."""

def run_program(main):
    """Call main() as a program. Exit codes: 2 with one line for what the user can fix, 130, 143, or main's.
    Rank 0 alone prints more than failures, and only failures with --quiet."""
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")      # None where it is closed
    if not RANK0 or "--quiet" in sys.argv:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")        # which `progress` recognises
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):        # a console without α prints another character for it
            stream.reconfigure(errors="replace")
    SIGNALS.start()
    if WORLD == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        announce("note: WORLD_SIZE is set, but not by torchrun; one process does all")
    try:
        for text in sys.argv:
            if text != text.encode(errors="replace").decode():
                raise Fail(f"the argument {text!r} is not valid UTF-8; rename the file or folder")
            if re.fullmatch(r"(--[\w-]+=)?", text):
                raise Fail("an argument is empty, as an unset variable leaves it; pass a value, or omit it")
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as problem:
        if not (message := explain(problem)):
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)

def announce(line):
    """Print a line on stderr, once for all processes."""
    if RANK0:
        print(line, file=sys.stderr, flush=True)

class Signals:
    """SIGINT and SIGTERM end the program (130, 143), by an exception, so that temporary files are removed: at
    once or, while `deferred`, at `leave`."""
    received, deferred = 0, False
    KINDS = signal.SIGINT, signal.SIGTERM

    def start(self):
        """Handle both from now on."""
        vars(self).clear()
        for kind in self.KINDS:
            signal.signal(kind, self._handle)

    def _handle(self, kind, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C ends it at once
        self.received = self.received or kind
        if not self.deferred:
            self.leave()

    def leave(self):
        """End the program if a signal was received."""
        if self.received:
            announce(f"{Path(sys.argv[0]).name}: stopped; repeat the command to resume from what is saved")
            sys.exit(128 + self.received)

    def wait(self, function, *args, **kwargs):
        """Call a function of torch.distributed that waits for other processes in C++, where Python's handlers
        do not run: unless a stop is deferred, a signal ends the process."""
        sys.stdout.flush()              # which that end would lose
        handlers = {kind: signal.signal(kind, signal.SIG_DFL) for kind in self.KINDS if not self.deferred}
        try:
            return function(*args, **kwargs)
        finally:
            for item in handlers.items():
                signal.signal(*item)

SIGNALS = Signals()

def explain(problem):
    """The message for an exception that the user can act on, "" for an error of the program itself."""
    words, line = str(problem), first_line(problem)
    if isinstance(problem, Fail):
        return words
    if isinstance(problem, OSError):                    # disk full, read-only folder, no permission
        return f"{problem.strerror or problem}: {problem.filename or 'no file named'}"
    if isinstance(problem, MemoryError) or re.search("out of memory|DefaultCPUAllocator", words):   # of torch
        return f"out of memory; try a smaller --micro-batch (train.py), --batch or --size ({line})"
    if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot compile here; pass --no-compile ({line})"
    if isinstance(problem, dist.DistError) or (WORLD > 1 and "gloo" in words):
        return "another process has ended; fix the error printed above, then repeat the command to resume"
    return ""

@contextmanager
def foreign_file(path, problem="is damaged", advice="restore or remove it"):
    """Turn any exception of the block, which reads a foreign file, into one line with its name and advice."""
    try:
        yield
    except (Fail, MemoryError, torch.OutOfMemoryError, PermissionError):
        raise                           # not the file's fault
    except FileNotFoundError:
        raise Fail(f"{path} does not exist; restore it, or pass another") from None
    except Exception as cause:          # decoders of images, archives, pickles and JSON raise dozens of kinds
        raise Fail(f"{path} {problem} ({first_line(cause)}); {advice}") from None

def first_line(problem):
    """The first line of an exception's message, at most 160 characters; its type where it is empty."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]

# ---- arguments -----------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse with one line instead of the usage for a wrong argument."""
    def __init__(self, description):
        how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(description=description, **how)

    def error(self, message):
        raise Fail(f"{message}; --help lists the arguments")

def number(kind, low, high=10 ** 6):
    """An argparse type: an int or float from low to high. Refuses nan."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low} to {high}")
        return value
    parse.__name__ = kind.__name__          # as which argparse refuses what is no number
    return parse

def option(group, default, help, low=0, high=10 ** 6, **more):
    """A dataclass field that is also an argument --name of a program, of the field's type; see `add_options`.
    low, high: the range of a number; more: argparse's metavar, choices and nargs."""
    return field(default=default, metadata=dict(group=group, help=help, range=(low, high), more=more))

def add_options(parser, record):
    """Add an argument for each field of a dataclass of options; the result has only those that are given."""
    for title, members in itertools.groupby(fields(record), key=lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in members:
            kind, help = getattr(f.type, "__args__", [f.type])[0], f.metadata["help"]   # str of str | None
            how = dict(action="store_true") if kind is bool else dict(type=kind)
            if kind in (int, float):
                how = dict(type=number(kind, *f.metadata["range"]), metavar="N" if kind is int else "X")
            if kind is not bool and f.default is not None:
                help += f" (default: {f.default})"
            flag, how = f"--{f.name.replace('_', '-')}", how | f.metadata["more"]
            group.add_argument(flag, default=argparse.SUPPRESS, help=help, **how)

def safe_name(text):
    """A file name valid on every system: letters of any alphabet, digits, ".+-_"; at most 150 bytes."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._")
    return name.encode()[:150].decode(errors="ignore") or "image"

class _Lines:
    """A stream that prints what tqdm would redraw as lines."""
    def write(self, text):
        if text.strip():
            announce(text.strip())

def progress(*args, **kwargs):
    """tqdm's bar; off a terminal a line a minute, and nothing where nothing is printed."""
    if not sys.stderr.isatty():
        kwargs |= dict(file=_Lines(), delay=60, mininterval=60, miniters=1,             # seconds
                       bar_format="{desc}: {n_fmt} of {total_fmt}{postfix}, {rate_fmt}, {remaining} left")
    return tqdm(*args, disable=getattr(sys.stdout, "name", "") == os.devnull, **kwargs)

def command_line(program, *args):
    """The command that calls one of our programs from where the user is, quoted for the shell."""
    return shlex.join(["python", str(program if Path.cwd() == ROOT else ROOT / program), *map(str, args)])

# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def atomic_write(path, sync=True):
    """Yield a temporary path beside `path`; on success rename it to `path`, else remove it.
    A file under its final name is therefore complete, and an old one stays until the new one is. sync: even
    where the power fails, if the file system can (some of networks and of user space cannot)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}-{os.urandom(4).hex()}{path.suffix}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as f:
                try:
                    os.fsync(f.fileno())
                except OSError as problem:
                    if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                        raise
        os.replace(temporary, path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            problem.filename = path     # a full disk names no file, a read-only folder the temporary one
        raise

def save_tensors(path, tensors, header):
    """Write {name: tensor} and a header of strings as a safetensors file; equal content, equal bytes."""
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata=header)
    size = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()    # theirs changes from call to call
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[size:]))

def save_text(path, text):
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

def save_json(path, data):
    """Write a JSON file atomically, in ASCII: a path in it need not be valid UTF-8."""
    save_text(path, json.dumps(data, indent=1) + "\n")

def read_json(path):
    """The object in a JSON file; {} where the file does not exist."""
    if not Path(path).exists():
        return {}
    with foreign_file(path):
        return {} | json.loads(Path(path).read_text(encoding="utf-8-sig"))      # not of a list or a number

def save_csv(path, rows):
    """Write [{column: value}] with the columns of the last; what a row lacks, or None, is an empty cell."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[-1].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

def read_csv(path):
    """The rows of a table that `save_csv` wrote, or a spreadsheet saved again, as text; [] without a file."""
    return list(csv_reader(Path(path).read_bytes())) if Path(path).exists() else []

def csv_reader(data):
    """The bytes of a table in UTF-8 or UTF-16, with , ; or tabs -> csv.DictReader of its rows."""
    lines = data.decode(json.detect_encoding(data)).splitlines()
    return csv.DictReader(lines, delimiter=max(",;\t", key="".join(lines[:1]).count))

def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    if os.path.exists(path) and not os.path.isfile(path):       # reading a pipe would wait for ever
        raise Fail(f"{path} is no regular file; remove it")
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

# ---- device and memory ---------------------------------------------------------------------------
def pick_device(name="auto"):
    """'auto' (CUDA, then MPS, then CPU) or a name -> torch.device; under torchrun one GPU per process."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and WORLD == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"
    torch.backends.cudnn.benchmark = True       # the fastest kernel for each shape, of which there are few
    with foreign_file(f"--device {name}", "cannot be used here", "pass cuda, cpu or, for one process, mps"):
        if name.partition(":")[0] not in ("cuda", "mps", "cpu") or (name == "mps" and WORLD > 1):
            raise ValueError("not supported")
        return torch.empty(0, device=name).device

def frozen_dtype(device, name="auto", width=320):
    """The dtype of the frozen U-Net: `name`, or the device's fastest. width: of its first level.
    On a GPU bfloat16, or float16 where it has none; on a CPU with products in bfloat16 (AMX, AVX-512) that
    too, for a network as wide as SD1.5's: narrow ones gain nothing. Else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast and width >= 320 else torch.float32

def layout(device, dtype):
    """The memory format of convolutions: channels last on a GPU and in 16 bits, where they are faster so."""
    last = torch.device(device).type == "cuda" or dtype.itemsize == 2
    return torch.channels_last if last else torch.preserve_format

def to_device(x, device):
    """A tensor from the CPU on the device; the copy to a GPU is asynchronous."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

# ---- one process or many -------------------------------------------------------------------------
def join_processes(device):
    """Join the other processes of torchrun, where there are any."""
    if WORLD == 1:
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with foreign_file(f"process {RANK} of {WORLD}", "does not find the others of torchrun",
                      "where it did not start this one, unset TORCHELASTIC_RUN_ID"):
        store, *_ = SIGNALS.wait(next, dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    # timeout: the others wait while rank 0 prepares
    SIGNALS.wait(dist.init_process_group, "nccl" if cuda else "gloo", store=dist.PrefixStore("morph", store),
                 rank=RANK, world_size=WORLD, device_id=device if cuda else None, timeout=timedelta(hours=2))

def barrier():
    """Wait until every process arrives here."""
    if WORLD > 1:
        SIGNALS.wait(dist.barrier)

@contextmanager
def rank0_first():
    """Rank 0 runs the block first; the others then find the files that it made."""
    if not RANK0:
        barrier()
    yield
    if RANK0:
        barrier()

def broadcast(value):
    """Rank 0's value, in every process."""
    values = [value]
    if WORLD > 1:
        SIGNALS.wait(dist.broadcast_object_list, values)
    return values[0]

def check_same(what, value):
    """Fail where this process has another value than rank 0, as of other files or arguments on its node."""
    if broadcast(value) != value:
        raise Fail(f"process {RANK} of {WORLD} has other {what} than rank 0; all need its command and files")

def shard(items):
    """This process's share of a list: every WORLD-th item."""
    return items[RANK::WORLD]

def all_gather(rows):
    """Each process's results for its `shard` of a list -> the results for the whole list, in its order."""
    if WORLD == 1:
        return rows
    parts = [None] * WORLD
    SIGNALS.wait(dist.all_gather_object, parts, rows)
    return [parts[i % WORLD][i // WORLD] for i in range(sum(map(len, parts)))]

@torch.no_grad()
def all_reduce(tensors):
    """Sum each tensor over the processes, in place, in one message."""
    if WORLD > 1:
        flat = torch.nn.utils.parameters_to_vector(tensors)
        SIGNALS.wait(dist.all_reduce, flat)
        torch.nn.utils.vector_to_parameters(flat, tensors)
