"""Coverage-guided fuzzing: `python tests/fuzz/fuzz_run.py --minutes 5 [TARGET]...`, which `make fuzz` runs.

Each target runs in a process of its own (libFuzzer ends the process that it runs in), one after the other, for its
share of the time. What is new goes to `tests/.cache/fuzz/TARGET/`; `--keep` then merges what adds coverage into
`tests/fuzz/corpus/TARGET/`. An input that an oracle objects to is written to `tests/.cache/fuzz/found/` and the run
fails: it becomes a named test, and a fix. Needs the `fuzz` extra (atheris).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
CACHE = HERE.parent / ".cache" / "fuzz"
FOUND = CACHE / "found"
TARGETS = (
    "request_heads",
    "responses",
    "chunks",
    "event_streams",
    "json_requests",
    "forms",
    "usages",
    "frames",
    "configurations",
)
INSTRUMENTED = ["canal_trio.wire", "canal_trio.config", "canal_trio.upstream.frames"]
INPUT_BYTES = 1500


def child(target: str, arguments: list[str]) -> None:
    """One target, in this process, until libFuzzer ends it."""
    import atheris  # here: whoever reads this file need not have it

    sys.path.insert(0, str(HERE.parent / "gateway"))
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz_targets import TARGETS as targets

    # libFuzzer runs its own program once more to merge, so it gets one that can be run.
    program = CACHE / f"{target}.sh"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" --child {target} "$@"\n')
    program.chmod(0o700)
    atheris.Setup([str(program), *arguments], targets[target])
    atheris.Fuzz()


def start(target: str, *arguments: str | Path) -> int:
    """Run `child` in another process; its exit code."""
    command = [sys.executable, __file__, "--child", target, *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


def fuzz(target: str, seconds: int) -> bool:
    """Fuzz one target. True: nothing was found."""
    work = CACHE / target
    work.mkdir(parents=True, exist_ok=True)
    FOUND.mkdir(parents=True, exist_ok=True)
    dictionary = HERE / f"{target}.dict"
    options = [f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES}", f"-artifact_prefix={FOUND}/{target}-"]
    options += ["-print_final_stats=1", "-timeout=20", "-verbosity=0"]
    if dictionary.exists():
        options.append(f"-dict={dictionary}")
    return start(target, work, CORPUS / target, *options) == 0


def keep(target: str) -> None:
    """Make the corpus the smallest set that covers what the old one and the last runs cover."""
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder)
        if start(target, "-merge=1", f"-max_len={INPUT_BYTES}", merged, CORPUS / target, CACHE / target):
            sys.exit(f"the corpus of {target} could not be merged")
        kept = sorted(merged.iterdir())
        shutil.rmtree(CORPUS / target, ignore_errors=True)
        (CORPUS / target).mkdir(parents=True)
        for file in kept:
            data = file.read_bytes()
            (CORPUS / target / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="in all, shared by the targets")
    parser.add_argument("--keep", action="store_true", help="merge what was found into the corpus of the repository")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    chosen = parser.parse_args()
    targets = chosen.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there is {', '.join(TARGETS)}")
    clean = True
    for target in targets:
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        print(f"-- {target}", flush=True)
        clean = fuzz(target, max(1, round(chosen.minutes * 60 / len(targets)))) and clean
        if chosen.keep:
            keep(target)
    if not clean:
        print(f"Found something: see {FOUND}. It becomes a named test in tests/fuzz/, and a fix.", file=sys.stderr)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
