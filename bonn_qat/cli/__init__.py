"""The command ``bonn-qat``: parse the arguments, call the library, print.

``--help`` and TAB completion load neither torch nor rich: each command imports what it needs in its body.
"""

import contextlib
import os

import click

import bonn_qat
from bonn_qat.cli import networks, runs
from bonn_qat.cli.exits import DISCONNECTED, INTERRUPTED, NOT_WRITTEN, Stopped, culprit, fail, one_line_warnings, why
from bonn_qat.cli.options import command
from bonn_qat.errors import BonnQatError, first_line, is_disconnection, is_out_of_memory

_COMPLETE = "_BONN_QAT_COMPLETE"


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"bonn-qat {bonn_qat.__version__}")
        context.exit()


class _Group(click.Group):
    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)  # click would sort them


@click.group(
    cls=_Group,
    context_settings={"max_content_width": 120},
    epilog='TAB completion in bash: eval "$(_BONN_QAT_COMPLETE=bash_source bonn-qat)"; also zsh_source, fish_source.',
)
@click.option(
    "--version", is_flag=True, callback=_print_version, expose_value=False, is_eager=True,
    help="Show the version and exit.",
)  # fmt: skip
def app() -> None:
    """Train and compare 1-bit networks."""


for function in (
    runs.train,
    runs.compare,
    runs.reproduce,
    runs.report,
    networks.summary,
    networks.bench,
    networks.export,
    networks.evaluate,
    networks.predict,
    networks.schemes,
):
    app.add_command(command(function))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0; 1 when a run failed; with one line on stderr: 1 for a lack of memory, another process of the group that ended, or
    code that called sys.exit, 2 for bad input, 3 for results that cannot be written, as on a full disk, 130 for Ctrl-C,
    143 for SIGTERM.
    """
    try:
        with one_line_warnings(), _process_group():
            code: int | None = app.main(arguments, standalone_mode=False)
    except Stopped as stopped:
        return fail(stopped.code, str(stopped))
    except BonnQatError as error:
        return fail(2, str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return fail(2, error.format_message())
    except click.Abort:
        return fail(INTERRUPTED, "interrupted")
    except SystemExit as end:
        if end.code or _COMPLETE in os.environ:
            raise
        return fail(1, f"{culprit(end) or 'some code'} ended the command; --no-plugins leaves the plugins out")
    except Exception as error:
        if is_out_of_memory(error):
            return fail(1, f"there is not enough memory ({first_line(error)})")
        if is_disconnection(error):
            return fail(1, DISCONNECTED)
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
            return fail(3, why(error))
        if plugin := culprit(error):
            return fail(1, plugin)
        raise
    return code or 0


def _process_group() -> contextlib.AbstractContextManager[None]:
    """A process group if a launcher started this process, without importing torch if none did."""
    if "WORLD_SIZE" not in os.environ:
        return contextlib.nullcontext()
    from bonn_qat.distributed import process_group

    return process_group()
