"""One driver or step at a time on a run: an advisory lock on <run>/.lock, which ends with whoever holds it.

`python -m b2diffurl.run.lock FOLDER` takes it for the shell that opened FOLDER/.lock as descriptor $B2DIFFURL_LOCK.
"""

import errno
import fcntl
import os
import pathlib
import sys

from ..errors import UserError

INHERITED = "B2DIFFURL_LOCK"  # the driver's descriptor, in the environment of its steps


def hold(folder):
    """Lock the folder for as long as this process lives; UserError where another process has it.

    Under a driver the lock is the driver's. A launcher may have closed its descriptor; then the driver still has it.
    """
    if int(os.environ.get("RANK", "0")):  # of several processes of one step the first one locks
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise UserError(f"config.save_path: {folder} cannot be made ({error.strerror})") from None
    path = folder / ".lock"
    if INHERITED not in os.environ:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    elif _is_open_as(int(os.environ[INHERITED]), path):
        descriptor = int(os.environ[INHERITED])
    else:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by another run_process.sh or step; wait for it or give another config.exp_name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder}: this file system has no locks; see to it that nothing else works on the run", file=sys.stderr)


def _is_open_as(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


if __name__ == "__main__":
    try:
        hold(pathlib.Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"run_process.sh: {error}")
