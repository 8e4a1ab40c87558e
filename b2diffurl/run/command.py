"""A command of this project: its settings from the command line, its errors in one line."""

import errno
import pathlib
import re
import sys
import traceback

from ..errors import SharedError, UserError
from . import processes
from .config import check

GO_ON = "then the same command goes on"
NO_ROOM = {
    errno.ENOSPC: f"Free some space (config.keep.* limits what a run keeps), {GO_ON}",
    errno.EDQUOT: f"Free some of your quota (config.keep.* limits what a run keeps), {GO_ON}",
    errno.EROFS: "Give a config.save_path that can be written, and start where log/ can be",
    errno.EACCES: "Give a config.save_path that you may write, and start where log/ can be",
}


def run_main(main, locked=False, **options):
    """Parse the command line, check the configuration, call main(config, **options); a UserError is one line, exit 1.

    locked: hold the run's lock meanwhile.
    options: further string flags of the command with their defaults; a default of None makes the flag required.
    """
    try:
        _call(main, locked, options)
    except BaseException as error:
        if processes.size() > 1:
            said = error.code if isinstance(error, SystemExit) else traceback.format_exc().rstrip()
            if isinstance(said, str):
                print(said, file=sys.stderr)
            processes.give_up()
        raise
    processes.leave()


def _call(main, locked, options):
    """run_main, with SystemExit for what is said in one line."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        more = "".join(
            f" [--{name} VALUE]" if default is not None else f" --{name} VALUE" for name, default in options.items()
        )
        print(f"{program()} --config config/stage_process.py:PRESET [--config.x.y=value ...]{more}")
        print("Presets and settings: config/stage_process.py. Pages: README.md and docs/.")
        return
    try:
        config, options = parse(sys.argv, options)
        if locked:
            from . import lock

            lock.hold(pathlib.Path(config.save_path) / config.exp_name)
        main(config, **options)
    except UserError as error:
        if isinstance(error, SharedError) and processes.rank():
            sys.exit(1)
        sys.exit(f"{program()}: {error}")
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what = f"{error.strerror}: {error.filename or config.save_path}"
        sys.exit(f"{program()}: {what}; what was finished is whole. {NO_ROOM[error.errno]}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        sizes = "config.sample.batch_size, config.reward.batch_size or config.train.batch_size"
        sys.exit(f"{program()}: out of GPU memory: lower {sizes}, whichever this step uses")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last finished step")


def program():
    """What the command is called in its messages: the script's name, or the package's after `python -m`."""
    path = pathlib.Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def parse(argv, options=None):
    """Command line -> (checked ConfigDict, {option: value}). Raises UserError for anything unknown or badly typed."""
    from absl import flags
    from ml_collections import config_flags

    values, options = flags.FlagValues(), options or {}
    original, sys.argv = sys.argv, argv  # config_flags looks for its overrides there, not in what it is given
    try:
        config_flags.DEFINE_config_file("config", "config/stage_process.py", flag_values=values)
        for name, default in options.items():
            flags.DEFINE_string(name, default, f"{name} of the command", flag_values=values)
        rest = values(argv)[1:]
        config = values["config"].value
        config.exp_name  # noqa: B018 - a file that did not load says so only when it is used
    except (AttributeError, KeyError) as error:
        raise UserError(f"no such setting: {_blame(argv, error)} (config/stage_process.py lists them)") from None
    except (flags.Error, TypeError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # the reason is below its traceback
        raise UserError(f"{lines[-1]} (config/stage_process.py lists presets and settings)") from None
    finally:
        sys.argv = original
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}: settings look like --config.sample.groups=48")
    given = {name: values[name].value for name in options}
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(f"--{missing[0]} is missing")
    check(config)
    return config, given


def _blame(argv, error):
    """The argument that names the field which an unknown-field error is about, else the error's own words."""
    quoted = re.search(r"\w+", str(error))
    field = quoted.group() if quoted else ""
    return next((argument for argument in argv if field and field in argument.partition("=")[0]), str(error))
