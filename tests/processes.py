"""Several processes that train together, as under torchrun but forked: a process of its own would spend its seconds on imports."""

import os
import signal
import socket
import traceback

from mad.files import MadError


def processes(count, work):
    """Exit codes of `work(rank)` in `count` forked processes that find each other as under torchrun; none may hang."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            signal.alarm(60)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            work(rank)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except MadError:
            code = 2
            traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
