"""The ablation study (Tables 3 and 6): twelve runs of train.py that differ in one factor, and their table sorted by FID.

    python -m ldm.ablation OUT --data chaoyang/                 # all twelve; goes on where it was interrupted
    python -m ldm.ablation OUT --data chaoyang/ --row 3         # this one only, say for one task of a cluster's array job
    python -m ldm.ablation OUT --table                          # the table of what is finished

All other arguments go to train.py. Writes OUT/r8-t4-d2-w1024-x10/ and so on, and OUT/table6.csv.
"""
import math
import sys
from pathlib import Path

from .app import Fail, Parser, call, number, read_csv, run_program, save_csv
from .runs import MAY_CHANGE, best_epoch, settings_of
from .weights import TensorFile

# The first row is the baseline; each of the others changes one factor (Table 3). Last, what the paper reports (Table 6).
ROWS = [dict(zip(("rank", "tokens", "depth", "width", "ratio", "paper_epoch", "paper_fid"), row)) for row in (
    #   rank  tokens  depth  width  ratio   best epoch, FID
    (8,    4,      2,     1024,  10,     8,  79.74),
    (4,    4,      2,     1024,  10,    12,  77.59),
    (16,   4,      2,     1024,  10,     6,  82.98),
    (8,    1,      2,     1024,  10,     6,  85.09),
    (8,    2,      2,     1024,  10,     5,  83.69),
    (8,    8,      2,     1024,  10,    12,  80.87),
    (8,    4,      3,     1024,  10,     8,  83.66),
    (8,    4,      2,      512,  10,     6,  84.61),
    (8,    4,      2,     2048,  10,     5,  83.57),
    (8,    4,      2,     1024,   1,    11,  90.72),
    (8,    4,      2,     1024,   5,     6,  79.94),
    (8,    4,      2,     1024,  20,     5,  80.64),
)]
FACTORS = ("rank", "alpha", "tokens", "depth", "hidden", "lr_ratio")     # as train.py names them
CFG = 1.3           # the guidance at which all rows are compared


def folder_of(out, row):
    return out / "r{rank}-t{tokens}-d{depth}-w{width}-x{ratio}".format(**row)


def train(out, row, rest):
    """Run train.py for a row; alpha is matched to the rank, as it is by default. Returns its exit code."""
    flags = dict(rank=row["rank"], tokens=row["tokens"], depth=row["depth"], hidden=row["width"], lr_ratio=row["ratio"],
                 val_cfg=CFG)
    flags = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", value)]
    return call("train.py", *rest, *flags, "--run", folder_of(out, row))


def tabulate(out):
    """The finished rows, sorted by the lowest FID of their epochs -> [{column of Table 6: value}].

    Fails where they cannot be compared.
    """
    table, common = [], {}
    for row in ROWS:
        folder = folder_of(out, row)
        log, settings = read_csv(folder / "log.csv"), settings_of(folder)
        if log and settings and (int(log[-1]["epoch"]) == settings["epochs"] or int(log[-1]["step"]) == settings["max_steps"]):
            for key in settings.keys() - {*FACTORS, *MAY_CHANGE}:
                if settings[key] != common.setdefault(key, settings[key]):
                    raise Fail(f"{folder} was trained with {key} {settings[key]}, other rows with {common[key]}: they cannot be "
                               "compared; remove it, and train the row again")
            column, best = best_epoch(log)
            shapes = TensorFile(folder / "adapter.safetensors").shapes.values()
            table.append({name: row[name] for name in ("rank", "tokens", "depth", "width", "ratio")} | {
                "best_epoch": int(best["epoch"]), column: round(float(best[column]), 4),
                "parameters": sum(map(math.prod, shapes)), "minutes": log[-1]["minutes"],
                "paper_epoch": row["paper_epoch"], "paper_fid": row["paper_fid"]})
    return sorted(table, key=lambda r: next(value for name, value in r.items() if name.startswith(("fid", "val_loss"))))


def main():
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--row", type=number(int, 1, len(ROWS)), metavar="N",
                        help="only this row of the table in ldm/ablation.py, 1 (the baseline) to 12")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, rest = parser.parse_known_args()
    rest += ["--quiet"] * args.quiet
    for row in [] if args.table else ROWS[args.row - 1:args.row] if args.row else ROWS:
        if code := train(args.out, row, rest):          # at once, where it is complete
            sys.exit(code)              # train.py has said why
    table = tabulate(args.out)
    if not table:
        raise Fail(f"{args.out} holds no finished run of the ablation study")
    save_csv(args.out / "table6.csv", table)
    print((args.out / "table6.csv").read_text(encoding="utf-8").replace(",", "\t"), end="")
    print(f"{len(table)} of {len(ROWS)} rows; the paper's FIDs are on Chaoyang at 512 px with Stable Diffusion 1.5 and UNI2-h")


if __name__ == "__main__":
    run_program(main)
