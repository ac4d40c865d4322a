"""`python -m benchmarks`: measures families of cases, prints Markdown tables, and
writes what they show as JSON.
"""

import argparse
import importlib
import pathlib
import tempfile

from . import FAMILIES


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument(
        "--only", nargs="+", choices=FAMILIES, default=FAMILIES, help="these families"
    )
    parser.add_argument(
        "--names", nargs="+", help="of their cases those of these names, as in tables"
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each (7; quick: 3)")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="numbers of time steps, for every family"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="a file of results (JSON), in which those of the same cases are replaced",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing; bring docs/benchmarks.md up to benchmarks/results/",
    )
    parser.add_argument(
        "--flag",
        action=argparse.BooleanOptionalAction,
        help="on a CPU, measure again with loops compiled whole (unless --quick)",
    )
    options = parser.parse_args(argv)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 7
    if options.flag is None:
        options.flag = not options.quick
    if options.repeats < 1 or any(n < 1 for n in options.steps or ()):
        parser.error("--repeats and --steps must be positive")
    return options


def _arguments(options, family: str, out: pathlib.Path) -> list[str]:
    """The same for one family, without another run after it."""
    arguments = ["--only", family, "--repeats", str(options.repeats), "--no-flag"]
    arguments += ["--quick"] * options.quick + ["--out", str(out)]
    if options.names:
        arguments += ["--names", *options.names]
    if options.steps:
        arguments += ["--steps", *map(str, options.steps)]
    return arguments


def _measure(options, out: pathlib.Path) -> list[dict]:
    import jax

    from . import _report, _runner
    from ._case import Plan
    from ._process import can_use_cpu_flag, run_with_cpu_flag
    from ._results import Results, read

    results = Results(out)
    on_gpu = jax.default_backend() != "cpu"
    steps = tuple(options.steps) if options.steps else None
    for family in options.only:
        print(f"\n### {family}\n", flush=True)
        cases = importlib.import_module(f"{__package__}._{family}").cases(
            Plan(options.quick, on_gpu, steps)
        )
        cases = [c for c in cases if not options.names or c.name in options.names]
        # Each is written down at once, should the rest not come to an end.
        rows = [results.add(_runner.measure(case, options.repeats)) for case in cases]
        print(_report.family_text(family, rows) if rows else "No case.", flush=True)
        if options.flag and can_use_cpu_flag():
            run_with_cpu_flag("benchmarks", _arguments(options, family, out))
    return read(out)


def main(argv=None) -> list[dict]:
    options = _parse(argv)
    if options.report:
        from . import _report

        print("\n".join(f"written: {name}" for name in _report.report()))
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or pathlib.Path(folder) / "results.json"
        rows = _measure(options, out)
    if not options.quick and options.flag:
        from . import _targets

        print(f"\n### targets\n\n{_targets.table(rows)}", flush=True)
    return rows


if __name__ == "__main__":
    main()
