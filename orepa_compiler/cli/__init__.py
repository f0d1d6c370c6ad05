"""Defines the command line: orepa plan, export, verify, bench and int8, and orepa-export."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from orepa_compiler import __version__
from orepa_compiler.cli.bench import bench_command
from orepa_compiler.cli.export import export_command
from orepa_compiler.cli.given.options import EXIT_CODES, ExitCode, NotVerified
from orepa_compiler.cli.given.project import project_options
from orepa_compiler.cli.int8 import int8_command
from orepa_compiler.cli.plan import plan_command
from orepa_compiler.cli.verify import verify_command
from orepa_compiler.errors import Interrupted, ReparamError

# typer exports this one's subclass only, and every wrong command line raises this one.
_UsageError: Any = typer.BadParameter.__mro__[1]

# What a shell gives a program that Ctrl-C ended.
_INTERRUPTED = 130


def _typer(help: str) -> typer.Typer:
    return typer.Typer(
        help=help,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"orepa-compiler {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
]

app = _typer("Train conv nets with OREPA blocks, collapse them to plain convs, check the result.")
export_app = _typer("")
app.command("plan", epilog=EXIT_CODES)(plan_command)
app.command("export", epilog=EXIT_CODES)(export_command)
app.command("verify", epilog=EXIT_CODES)(verify_command)
app.command("int8", epilog=EXIT_CODES)(int8_command)
app.command("bench", epilog=EXIT_CODES)(bench_command)
export_app.command(epilog=EXIT_CODES)(export_command)


@app.callback(invoke_without_command=True)
def _orepa(context: typer.Context, version: Version = False) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """`orepa`: runs a command and returns its exit code."""
    return _run(app, "orepa", sys.argv[1:] if arguments is None else arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """`orepa-export`: runs it and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in given:
        return _run(app, "orepa-export", ["--version"])
    return _run(export_app, "orepa-export", given)


def _run(commands: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    def stop(message: str, code: int) -> int:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return code

    command = typer.main.get_command(commands)
    try:
        # The whole line, for pages: what an option became does not tell how it was given.
        line = shlex.join([name, *arguments])
        defaults = project_options(command)
        with _silence(arguments):
            found = command.main(
                list(arguments),
                prog_name=name,
                standalone_mode=False,
                default_map=defaults,
                obj=line,
            )
        return int(found or 0)
    except _UsageError as error:
        # Some versions of typer say of a choice that it is a "Value error", too.
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        called = _called(command, name, arguments)
        return stop(f"{message}; see {called} --help", ExitCode.USAGE)
    except NotVerified as error:
        return stop(str(error), ExitCode.NOT_VERIFIED)
    except Interrupted as error:
        return stop(str(error), _INTERRUPTED)
    except ReparamError as error:
        return stop(str(error), ExitCode.USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return stop("stopped by Ctrl-C; nothing was left half written", _INTERRUPTED)
    except Exception as error:
        reason = f"stopped by {type(error).__name__}: {error}; --debug shows where"
        return stop(reason, ExitCode.NOT_VERIFIED)


def _called(command: Any, name: str, arguments: Sequence[str]) -> str:
    """The command whose help says more: `orepa export` where its own options are wrong."""
    first = next((word for word in arguments if not word.startswith("-")), "")
    return f"{name} {first}" if first in getattr(command, "commands", ()) else name


@contextlib.contextmanager
def _silence(arguments: Sequence[str]) -> Iterator[None]:
    """With --quiet, nothing goes to stdout; warnings and errors stay on stderr."""
    if not {"--quiet", "-q"} & set(arguments):
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
