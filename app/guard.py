"""`python -m app.guard FD -- PROGRAM ...`: become PROGRAM, watched by a process that kills it when FD closes.

For programs that are not ours, on systems whose kernel cannot tie them to their parent.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    descriptor, dashes, *command = sys.argv[1:]
    assert dashes == "--"
    fd, program = int(descriptor), os.getpid()
    if os.fork() == 0:
        while os.read(fd, 1):
            pass
        if os.getppid() == program:  # else it has ended already, and its id may be another's
            os.kill(program, signal.SIGKILL)
        os._exit(0)
    os.close(fd)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
