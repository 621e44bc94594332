"""The benchmark, so that it does not fail of a slip where it is run: all parts at the smallest size."""
import contextlib
import io
import json

import pytest
import torch
from conftest import ROOT, program

import bench
import peers

@pytest.mark.parametrize("parts", [
    ("tests", "sample"), pytest.param(tuple(bench.PARTS), marks=pytest.mark.slow)])
def test_the_command_for_a_gpu_measures_its_parts(parts, monkeypatch, capsys):
    """On the CPU, in this process, nothing compiled; the CUDA tests have a file of their own."""
    def here(command, seconds):
        return 0 if "pytest" in command else bench.main([str(word) for word in command[1:]])

    def python(*arguments):
        out = io.StringIO()
        if arguments[0] != "-c":
            return program("sample.py", *arguments[1:], cwd=ROOT).stdout
        with contextlib.redirect_stdout(out):
            exec(arguments[1], {})
        return out.getvalue()
    monkeypatch.setattr(bench, "run_limited", here)
    monkeypatch.setattr(peers, "python", python)
    monkeypatch.setattr(torch, "compile", lambda network, **how: network)
    monkeypatch.setattr(peers.os, "cpu_count", lambda: 0)       # no processes that read images
    monkeypatch.setattr(bench, "PARTS", dict.fromkeys(parts, 600))
    if "fid" not in parts:
        monkeypatch.setattr(peers, "EITHER", (True,))
    how = ["--device=cpu", "--width=32", "--size=64", "--batch=1", "--images=2", "--steps=1", "--repeats=1"]
    code = bench.main(["gpu", *how])
    out = capsys.readouterr().out
    assert code == 0 and "failed" not in out, out
    found = json.loads(out.splitlines()[-1])["results"]
    assert tuple(found) == parts and out.count('{"machine"') == 3 * len(parts)
    if "largest" in parts:          # a CPU has no cap
        assert found["largest"]["results"] == {"8 GB": 4, "12 GB": 4, "16 GB": 4}
    for part in {*parts} - {"tests", "largest"}:
        [work] = found[part]["results"].values()
        assert len([result for result in work.values() if "ratio" in result]) == 1

@pytest.mark.parametrize("code, expected", [("import time; time.sleep(60)", "time limit"), ("1 / 0", 1)])
def test_a_part_that_takes_too_long_or_fails_does_not_stop_the_others(code, expected, capfd):
    assert bench.run_limited(["-c", code], 0.5 if expected == "time limit" else 60) == expected

def test_the_fastest_setting_is_found_and_what_fails_is_said(monkeypatch, capsys):
    """Seconds 4 - a - 2 b, but b fails without a: one change after the other ends at a and b."""
    def build(a, b):
        if b > a:
            raise RuntimeError("no b without a")
        return lambda: peers.Figures(4 - a - 2 * b, 5)
    args = bench.parse_args(["--device=cpu", "--repeats=3"])
    args.rate = 1.0
    sides = {"ours": (lambda: lambda: peers.Figures(0.5, 0), {}), "peer": (build, dict(a=(0, 1), b=(0, 1)))}
    bench.measure(peers.Work("x", 1, 0.25, sides), args)
    found = args.results["x"]
    assert found["ours"] == dict(seconds=0.5, peak=0, share=0.5, ratio=2, peer="peer, a 1, b 1")
    assert found["peer, a 1, b 1"]["seconds"] == 1 and len(found) == 4
    assert sum(bench.PARTS.values()) < 480
    for compiled, tried in (("no", {0}), ("only", {1, 2}), (None, {0, 1, 2})):
        args.results, args.compiled, seen = {}, compiled, set()
        build = lambda compiled: lambda: seen.add(compiled) or peers.Figures(1, 0)     # noqa: E731
        bench.search(peers.Work("z", 1, 0, {"ours": (build, dict(compiled=(0, 1, 2)))}), "ours", args)
        assert seen == tried
    args.deadline = 0
    bench.measure(peers.Work("y", 1, 0, dict(reversed(sides.items()))), args)
    assert args.failed and "left out: no time" in capsys.readouterr().out
