"""Set-up and commands: python run.py demo | test | serve | bench | doctor. See --help."""

import os
import subprocess
import sys

# this file alone must be readable by older Pythons, so that they get a sentence, not a traceback
ROOT = os.path.dirname(os.path.abspath(__file__))


def take_python(argv):
    """Split `--python PATH` off the arguments; ADASPA_PYTHON stands in for it."""
    path, rest = os.environ.get("ADASPA_PYTHON"), []
    i = 0
    while i < len(argv):
        if argv[i] == "--python":
            if i + 1 == len(argv):
                sys.exit("--python needs the path of a Python behind it.")
            path = argv[i + 1]
            i += 1
        elif argv[i].startswith("--python="):
            path = argv[i].split("=", 1)[1]
        else:
            rest.append(argv[i])
        i += 1
    return path, rest


def main():
    path, argv = take_python(sys.argv[1:])
    if path:
        os.environ.pop("ADASPA_PYTHON", None)
        command = [path, os.path.join(ROOT, "run.py")]
        command.extend(argv)
        try:
            return subprocess.call(command)
        except OSError as error:
            sys.stderr.write("Cannot start " + path + ": " + str(error) + "; check --python.\n")
            return 1
        except KeyboardInterrupt:
            return 130
    if sys.version_info < (3, 10):  # noqa: UP036  this is where the minimum is said
        sys.stderr.write(
            "Python {}.{} is too old; start again with Python 3.10 to 3.13, for example:"
            " python3.12 run.py --help\n".format(*sys.version_info[:2])
        )
        return 1
    sys.path.insert(0, os.path.join(ROOT, "tests"))
    from pathlib import Path

    from tools import commands

    commands.end_cleanly()
    return commands.main(argv, Path(ROOT))


if __name__ == "__main__":
    sys.exit(main())
