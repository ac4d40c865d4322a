"""In what surroundings a benchmark runs, and the same with other XLA flags."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile


# XLA on CPU compiles small loops into one kernel and interprets larger ones; this makes
# it compile them all. It speeds up step-by-step rivals, so all ratios are given twice.
CPU_FLAG = (
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000"
)


def environment() -> dict:
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


@contextlib.contextmanager
def precision(dtype: str):
    """Single precision as its users have it, without 64-bit counters and times."""
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def has_cpu_flag() -> bool:
    return CPU_FLAG in os.environ.get("XLA_FLAGS", "")


def can_use_cpu_flag() -> bool:
    import jax

    return jax.default_backend() == "cpu" and not has_cpu_flag()


def run_with_cpu_flag(module: str, arguments: list[str]) -> bool:
    """`python -m module arguments` where XLA compiles every loop; whether it worked."""
    print(flush=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {CPU_FLAG}".strip()
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags})
    if done.returncode != 0:
        print("(it failed, or this XLA does not know the flag: not measured)")
    return done.returncode == 0


def again_with_cpu_flag(module: str, arguments: list[str]) -> dict | None:
    """What `python -m module arguments --out FILE` writes there; `None` where it
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "results.json"
        if not run_with_cpu_flag(module, [*arguments, "--out", str(out)]):
            return None
        return json.loads(out.read_text())


def write(results: dict, out: pathlib.Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved, so that an interruption leaves what there was.
        beside = out.with_name(f"{out.name}.new")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(out)
