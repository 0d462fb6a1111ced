"""The console script `fpsattention`: outside the package, so that it can say why a broken install does not import."""

import json
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def main() -> int:
    """Run the command line of the package; status 1, and what is known of the reason, when that does not import."""
    try:
        from fpsattention.cli.main import main
    except ImportError as error:
        message = f"the package cannot be imported: {error}\n{_advice(error)}"
        print(f"fpsattention: error: {message}", file=sys.stderr)
        if "--json" in sys.argv[1:]:
            try:
                print(json.dumps({"ok": False, "error": message}), flush=True)
            except OSError:  # dropped, or at exit Python tries again, fails and ends with status 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return main()


def _advice(error: ImportError) -> str:
    if (error.name or "").partition(".")[0] not in ("fpsattention", ""):
        return f"{error.name} comes from another package: pip install {error.name.partition('.')[0]}"
    folder = Path(__file__).with_name("fpsattention")
    found = [path.name for path in folder.glob("_C*")]
    there = f"there is {', '.join(found)}" if found else "there is no file _C*"
    return (
        f"Python {sys.version.split()[0]} needs the compiled module _C{EXTENSION_SUFFIXES[0]} in {folder}; {there}. "
        "A wheel is for one version of Python on Linux x86-64: install the one for yours, or from source."
    )
