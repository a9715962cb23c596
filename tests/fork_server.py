"""A fork server for test scripts: it imports what nearly every script needs, then forks one process per script.

A script runs as in a fresh Python, except that these imports and their shutdown are skipped. No script sees modules or
variables of another, and the package under test is not imported yet. Each line on stdin is a list of scripts, which run
at the same time; the answer is the list of their exit codes.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
from typing import Any, NoReturn

import sklearn.datasets  # noqa: F401
import timm  # noqa: F401

SECONDS = 600


def become(script: dict[str, Any]) -> NoReturn:
    signal.alarm(SECONDS)  # kills a script that hangs
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(script[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(script["cwd"])
    os.environ.clear()
    os.environ.update(script["env"])
    sys.path[:0] = filter(None, script["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv[:] = script["arguments"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    gc.collect()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


gc.collect()
gc.freeze()  # or the garbage collector of a fork would touch, and so copy, the imported objects
for line in sys.stdin:
    children = []
    for script in json.loads(line):
        if not (child := os.fork()):
            become(script)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.stdout.write(json.dumps(codes) + "\n")
    sys.stdout.flush()
