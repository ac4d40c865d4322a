"""`python -m benchmarks`: prints Markdown tables and writes what they show as JSON."""

import argparse
import pathlib


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


def main(argv=None) -> dict:
    options = _parse(argv)

    import jax

    from benchmarks import _fixed_steps, _guesses
    from benchmarks._process import (
        again_with_cpu_flag,
        can_use_cpu_flag,
        environment,
        write,
    )

    on_cpu = jax.default_backend() == "cpu"
    sizes = options.steps or (
        [400] if options.quick else [10_000] if on_cpu else [10_000, 500_000]
    )
    results = {"environment": environment(), "fixed_steps": []}
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
        if can_use_cpu_flag():
            arguments = ["--one-flag", "--repeats", str(options.repeats)]
            arguments += ["--quick"] * options.quick
            if options.steps:
                arguments += ["--steps", *map(str, options.steps)]
            results["with_cpu_flag"] = again_with_cpu_flag("benchmarks", arguments)
    write(results, options.out)
    return results


if __name__ == "__main__":
    main()
