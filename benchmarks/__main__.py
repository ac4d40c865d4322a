"""`python -m benchmarks`: prints Markdown tables and writes what they show as JSON."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys


# XLA on CPU compiles small loops into one kernel and interprets larger ones; this makes
# it compile them all. It speeds up step-by-step rivals, so all ratios are given twice.
CPU_FLAG = (
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000"
)


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--repeats", type=int, help="timed runs of each (11)")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of time steps")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--one-flag", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 11
    if options.repeats < 1 or any(n < 1 for n in options.steps or ()):
        parser.error("--repeats and --steps must be positive")
    return options


def _environment() -> dict:
    import jax

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "diffrax", "equinox", "lineax", "optimistix")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": device.device_kind if device.platform != "cpu" else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit or None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def main(argv=None) -> dict:
    options = _parse(argv)

    import jax

    from benchmarks import _fixed_steps, _guesses

    on_cpu = jax.default_backend() == "cpu"
    sizes = options.steps or (
        [400] if options.quick else [10_000] if on_cpu else [10_000, 500_000]
    )
    results = {"environment": _environment(), "fixed_steps": []}
    flags = results["environment"]["xla_flags"] or "default XLA flags"
    print(f"### Fixed Tsit5 steps, {results['environment']['device']}, {flags}\n")
    # Single precision as its users have it, without 64-bit counters and times.
    for dtype in ("float32", "float64"):
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        for num_steps in sizes:
            results["fixed_steps"] += _fixed_steps.run(
                num_steps, options.repeats, dtype
            )
    print(_fixed_steps.table(results["fixed_steps"]), flush=True)
    if not options.one_flag:
        results["guesses"] = _guesses.run(options.quick)
        print("\n### Newton steps by guess, float64\n")
        print(_guesses.table(results["guesses"]), flush=True)
        if on_cpu and CPU_FLAG not in os.environ.get("XLA_FLAGS", ""):
            results["with_cpu_flag"] = _again_with_flag(options)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _again_with_flag(options) -> dict | None:
    """The same table in a process whose XLA compiles every loop."""
    import tempfile

    print(flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks", "--one-flag", "--out", str(out)]
        command += ["--repeats", str(options.repeats)]
        command += ["--quick"] * options.quick
        if options.steps:
            command += ["--steps", *map(str, options.steps)]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {CPU_FLAG}".strip()
        done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags})
        if done.returncode != 0:
            print("(this XLA does not know the flag: not measured)")
            return None
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
