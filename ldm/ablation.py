"""The ablation study (Tables 3 and 6): twelve runs of train.py that differ in one factor, sorted by FID.

    python -m ldm.ablation OUT --data chaoyang/                 # all twelve; resumes where it was interrupted
    python -m ldm.ablation OUT --data chaoyang/ --row 3         # only this one, as in an array job of a cluster
    python -m ldm.ablation OUT --table                          # only the table of the finished runs

All other arguments go to train.py. Writes OUT/r8-t4-d2-w1024-x10/ and so on, and OUT/table6.csv.
"""
import math
import sys
from pathlib import Path

from .app import Fail, Parser, call, number, read_csv, run_program, save_csv
from .runs import best_epoch, read_settings
from .weights import TensorFile

CFG = 1.3           # the guidance at which all rows are compared
FACTORS = ("rank", "tokens", "depth", "hidden", "lr_ratio")
# The first row is the baseline; each other row changes one factor (Table 3). Then the paper's result (Table 6).
ROWS = [
    #  factors             best epoch, FID
    ((8, 4, 2, 1024, 10), 8, 79.74),
    ((4, 4, 2, 1024, 10), 12, 77.59),
    ((16, 4, 2, 1024, 10), 6, 82.98),
    ((8, 1, 2, 1024, 10), 6, 85.09),
    ((8, 2, 2, 1024, 10), 5, 83.69),
    ((8, 8, 2, 1024, 10), 12, 80.87),
    ((8, 4, 3, 1024, 10), 8, 83.66),
    ((8, 4, 2, 512, 10), 6, 84.61),
    ((8, 4, 2, 2048, 10), 5, 83.57),
    ((8, 4, 2, 1024, 1), 11, 90.72),
    ((8, 4, 2, 1024, 5), 6, 79.94),
    ((8, 4, 2, 1024, 20), 5, 80.64),
]


def folder_of(out, factors):
    return out / "r{}-t{}-d{}-w{}-x{}".format(*factors)


def train(out, factors, rest):
    """Run train.py for a row -> its exit code. α follows the rank, which is its default."""
    flags = [text for name, value in zip(FACTORS, factors) for text in (f"--{name.replace('_', '-')}", value)]
    return call("train.py", *rest, *flags, "--val-cfg", CFG, "--run", folder_of(out, factors))


def tabulate(out):
    """The finished rows -> [{column of Table 6: value}], sorted by FID. Fails where they are not comparable."""
    table, first = [], None
    for factors, paper_epoch, paper_fid in ROWS:
        folder = folder_of(out, factors)
        log, settings = read_csv(folder / "log.csv"), read_settings(folder)
        if not log or (int(log[-1]["epoch"]) < settings.epochs and int(log[-1]["step"]) != settings.max_steps):
            continue
        first = first or settings
        for name in set(settings.differing(first)) - {*FACTORS, "alpha"}:
            raise Fail(f"{folder} was trained with {name} {getattr(settings, name)}, other rows with "
                       f"{getattr(first, name)}: they are not comparable; remove it, and train the row again")
        column, best = best_epoch(log)
        shapes = TensorFile(folder / "adapter.safetensors").shapes.values()
        table.append(dict(zip(FACTORS, factors)) | {
            "best_epoch": int(best["epoch"]), column: round(float(best[column]), 4),
            "parameters": sum(map(math.prod, shapes)), "minutes": log[-1]["minutes"],
            "paper_epoch": paper_epoch, "paper_fid": paper_fid})
    return sorted(table, key=lambda row: next(v for name, v in row.items() if name.startswith(("fid", "val_loss"))))


def main():
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--row", type=number(int, 1, len(ROWS)), metavar="N",
                        help="only this row of ROWS in ldm/ablation.py, 1 (the baseline) to 12")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, rest = parser.parse_known_args()
    rest += ["--quiet"] * args.quiet
    for factors, *_ in [] if args.table else ROWS[args.row - 1:args.row] if args.row else ROWS:
        if code := train(args.out, factors, rest):          # returns at once where the run is complete
            sys.exit(code)              # train.py has printed why
    table = tabulate(args.out)
    if not table:
        raise Fail(f"{args.out} contains no finished run of the ablation study")
    save_csv(args.out / "table6.csv", table)
    print((args.out / "table6.csv").read_text(encoding="utf-8").replace(",", "\t"), end="")
    print(f"{len(table)} of {len(ROWS)} rows; the paper's FIDs are on Chaoyang at 512 px with Stable Diffusion 1.5 "
          "and UNI2-h")


if __name__ == "__main__":
    run_program(main)
