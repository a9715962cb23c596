"""The command ``bonn-qat``: parse, call a verb, print."""

import typer

from bonn_qat.cli import networks, runs
from bonn_qat.cli.exits import NOT_WRITTEN, Stopped, fail, why
from bonn_qat.errors import BonnQatError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Train and compare 1-bit networks.")
for command in (
    runs.train,
    runs.compare,
    runs.reproduce,
    runs.report,
    networks.summary,
    networks.bench,
    networks.export,
    networks.schemes,
):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0; 1 when a run failed; 2 for bad input, 3 for results that cannot be written, as on a full disk, 130 for Ctrl-C,
    143 for SIGTERM, each with one line on stderr.
    """
    from bonn_qat.distributed import process_group

    try:
        with process_group():
            code: int | None = app(args=arguments, standalone_mode=False)
    except Stopped as stopped:
        return fail(stopped.code, str(stopped))
    except BonnQatError as error:
        return fail(2, str(error))
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        return fail(3, why(error))
    except Exception as error:
        # typer's own, of whichever library it has its parser from
        if not hasattr(error, "format_message"):
            raise
        words = error.format_message()
        return fail(2, words) if words else 2  # the help was printed
    return code or 0
