"""The group of all verbs, and how its errors leave the process.

Exit codes: 0 fine, 1 something failed while it ran, 2 wrong usage or environment, 130 interrupted
with its state kept.
"""

import sys
from importlib import import_module
from typing import Any

import click

from matrigami._words import nearest, what_is_missing

VERBS = {
    "analyze": (
        "matrigami.cli._analyze:analyze",
        "Say which structure the matrices of a file, a model or a kernel have.",
    ),
    "curvature": (
        "matrigami.cli._curvature:curvature",
        "Show the curvature of a trained model, and how well it is approximated.",
    ),
    "data": ("matrigami.cli._data:data", "Fetch the data sets of the studies."),
    "demo": ("matrigami.cli._demo:demo", "Show the ideas one by one, as pages that run."),
    "eval": (
        "matrigami.cli._evaluate:evaluate",
        "Compare a compressed model with the one that it was made of.",
    ),
    "export": (
        "matrigami.cli._evaluate:export",
        "Write a compressed model in the formats of other programs.",
    ),
    "list": (
        "matrigami.cli._list:list_",
        "List structures, optimizers, datasets, presets, tasks or models.",
    ),
    "prune": ("matrigami.cli._compress:prune", "Set weights of a model to zero."),
    "quantize": ("matrigami.cli._compress:quantize", "Round the weights of a model."),
    "structure": (
        "matrigami.cli._compress:structure",
        "Exchange the layers of a model for structured ones.",
    ),
    "study": (
        "matrigami.cli._study:study",
        "Compare structures at equal compute: run, fit, plot, report.",
    ),
    "train": (
        "matrigami.cli._train:train",
        "Train one model with any of the optimisers; resumes.",
    ),
    "version": ("matrigami.cli._version:version", "Print the version."),
}
"""Each verb: where its command is, and its line in the overview."""


class LazyGroup(click.Group):
    """Imports the module of a verb when the verb is used, so that `--help` is immediate.

    The names of the arguments are click's.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names of the verbs."""
        return list(VERBS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """The command of a verb."""
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        return getattr(import_module(module), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that is meant; the nearest of one that there is not."""
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            near = nearest(name, VERBS)
            raise click.UsageError(f"No such command {name!r}. Did you mean {near!r}?", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; an optional package that it lacks is one line."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "matrigami":
                raise
            raise ValueError(what_is_missing(str(ctx.invoked_subcommand), error)) from error

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """The overview, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """`--version`."""
    if value:
        from matrigami import __version__

        click.echo(f"matrigami {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def group() -> None:
    """Structured matrices: train with them, compress with them, and compare them at equal compute.

    \b
    Examples:
      matrigami study run --preset demo --out runs/demo
      matrigami quantize MODEL --calib FILE -o OUT
    """


def main(args: list[str] | None = None) -> None:
    """Entry point of `matrigami`; ends the process."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run one command line; what the library refuses becomes a message. Returns the exit code."""
    try:
        result: Any = group.main(args=args, prog_name="matrigami", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _told(error)
    except ValueError as error:
        click.echo(f"matrigami: {error}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("matrigami: interrupted", err=True)
        return 130
    except OSError as error:  # a full disk; or a reader that has had enough, which needs no words
        if not isinstance(error, BrokenPipeError):
            where = f"{error.filename}: " if error.filename else ""
            click.echo(
                f"matrigami: {where}{error.strerror or error}.\n"
                "See that it may be read or written, and that its disk has space.",
                err=True,
            )
        return 1
    return result if isinstance(result, int) else 0


def _told(error: click.ClickException) -> int:
    """Say what is wrong, with a command line also where its use is told. Returns the exit code."""
    if not isinstance(error, click.UsageError):
        error.show()
        return 1
    path = error.ctx.command_path if error.ctx else "matrigami"
    click.echo(f"{path}: {error.format_message()}\nSee `{path} --help`.", err=True)
    return 2
