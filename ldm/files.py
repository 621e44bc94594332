"""What the three programs share at their doors: clear failures, whole files, and the choice of device."""
import argparse
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from . import parallel

quiet = False           # --quiet


class Fail(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do. `run` turns it into exit code 2."""


def run(main):
    """Call main() as a program: no traceback for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a console that has no α shows another sign for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))       # an exception, so that files are cleaned up
    try:
        main()
    except Fail as problem:
        sys.exit(_complain(problem))
    except OSError as problem:              # disk full, read-only folder, no permission: the message names the file
        sys.exit(_complain(f"{problem.strerror or problem}: {problem.filename or 'no file named'}"))
    except (MemoryError, RuntimeError) as problem:
        memory = "DefaultCPUAllocator" in str(problem) or "out of memory" in str(problem)      # torch on the CPU, on Apple's GPUs
        if memory or isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
            sys.exit(_complain(f"out of memory; try a smaller --batch or --size ({first_line(problem)})"))
        if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(_complain(f"torch.compile cannot compile here; pass --no-compile ({first_line(problem)})"))
        if parallel.WORLD > 1 and (isinstance(problem, torch.distributed.DistError) or "gloo" in str(problem)):
            sys.exit(_complain("another process has ended, and so this one does; what it said is above. Mend that, and repeat "
                               "the command to go on"))
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def first_line(problem):
    """The first line of an exception's message, for one line of our own; its kind where it says nothing."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]


@contextmanager
def foreign_file(path, problem="is damaged", advice="restore or remove it"):
    """Turn any exception of the block, which reads a foreign file, into one line with the file's name and the advice."""
    try:
        yield
    except Fail:
        raise
    except FileNotFoundError:
        raise Fail(f"{path} does not exist") from None
    except Exception as cause:          # decoders of images, archives, pickles and JSON raise dozens of kinds
        raise Fail(f"{path} {problem} ({first_line(cause)}); {advice}") from None


def _complain(problem):
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return 2


def call(program, *args, **options):
    """Run one of our programs -> its exit code. Where this process is told to leave, it lets the program leave first."""
    child = subprocess.Popen([sys.executable, str(Path(__file__).resolve().parents[1] / program), *map(str, args)], **options)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


class Parser(argparse.ArgumentParser):
    """argparse with the defaults in --help and one line, not the whole usage, for a wrong argument."""

    def __init__(self, description, prints_results=True):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.prints_results = prints_results

        self.add_argument("--quiet", action="store_true", help="no progress bars; print nothing but results and failures")

    def parse_known_args(self, *args, **kwargs):
        for text in sys.argv:
            if text != text.encode(errors="replace").decode():
                raise Fail(f"the argument {text!r} is not valid UTF-8; rename the file or folder")
        found, rest = super().parse_known_args(*args, **kwargs)
        global quiet
        quiet = found.quiet
        if quiet and not self.prints_results:
            sys.stdout = parallel.null_stream()
        return found, rest

    def error(self, message):
        raise Fail(f"{message}; --help lists the arguments")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=118)

    def _get_help_string(self, action):
        hidden = any(action.default is x for x in (None, False, argparse.SUPPRESS))     # by identity: 0 equals False
        shown = not hidden and "default" not in action.help
        return action.help + (" (default: %(default)s)" if shown else "")


def number(kind, low, high=10 ** 6, open_low=False):
    """An argparse type: an int or float between low and high; nan is refused, and low itself where open_low."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (open_low and value == low):
            article = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {article} {'above' if open_low else 'from'} {low} to {high}")
        return value
    return parse


def pick_device(name="auto"):
    """'auto' (CUDA, then Apple's MPS, then the CPU) or a name of torch's -> torch.device; under torchrun a GPU each."""
    several = parallel.WORLD > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if several and name == "mps":
        raise Fail("--device mps is for one process: start the program without torchrun, or pass --device cpu")
    if several and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', parallel.RANK)}"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        why = first_line(problem) if name.partition(":")[0] in ("cuda", "mps", "cpu") else "it is none of cuda, mps and cpu"
        raise Fail(f"--device {name} cannot be used here: {why}") from None


def same_everywhere(what, value):
    """Fail where this process has found something else than the first one: another file under the same path of another node."""
    if parallel.broadcast(value) != value:
        raise Fail(f"process {parallel.RANK} of {parallel.WORLD} finds other {what} than the first one does; all must see the "
                   "same files")


def progress(*args, **kwargs):
    """tqdm's bar: none where stderr is no terminal, with --quiet, nor in any but the first of several processes."""
    return tqdm(*args, disable=None if parallel.RANK0 and not quiet else True, **kwargs)


def frozen_dtype(device):
    """bfloat16 for the frozen U-Net where the GPU has it, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; on success it is flushed to the disk and renamed to it, else removed.

    So a file under its final name is whole, whatever happens, and an old one stays until the new one is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            problem.filename = path         # a full disk names no file, a folder without permission the temporary one
        raise


def save_tensors(path, tensors, header):
    """Write {name: tensor} with a header of strings as one safetensors file, whole or not at all."""
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata=header)
    size = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()        # the library's order changes from call to call:
    text += b" " * (-len(text) % 8)                                             # the same content makes the same file
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[size:]))


def save_text(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_csv(path, rows):
    """Write [{column: value}], all with the same columns; None as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save_text(path, text.getvalue())


def read_csv(path):
    """The rows of a table of ours, all values as text; [] where there is none."""
    path = Path(path)
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def read_json(path):
    """The object in a JSON file of ours; {} where there is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as problem:
        raise Fail(f"{path} is damaged ({first_line(problem)}); restore or remove it") from None
    if not isinstance(data, dict):
        raise Fail(f"{path} is not a file of this program's; restore or remove it")
    return data


def safe_name(text):
    """A file name that every system accepts: letters of any alphabet, digits, dot, dash and underscore, 150 bytes at most."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._").encode()[:150].decode(errors="ignore") or "image"
