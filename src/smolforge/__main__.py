"""`smolforge`, and `python -m smolforge`: a signal while the command line is imported is told in one sentence too."""

import os
import signal
import sys

from smolforge.training.signals import EXIT_CODES


def main() -> None:
    """Run the command line of this process. Until that hears of signals itself, they end it at once."""
    training = sys.argv[1:2] == ["train"]
    codes = EXIT_CODES if training else dict.fromkeys((signal.SIGINT, signal.SIGTERM), EXIT_CODES[signal.SIGINT])

    def end(number: int, _: object) -> None:
        asked = signal.Signals(number)
        try:
            os.write(2, f"smolforge: stopped by {asked.name} before it began\n".encode())
        finally:
            os._exit(codes[asked])

    heard = [number for number in codes if signal.getsignal(number) is not signal.SIG_IGN]  # as of a shell's background
    before = {number: signal.signal(number, end) for number in heard}
    import cyclopts  # noqa: F401 (it takes longest)

    from smolforge import cli

    for number, handler in before.items():
        signal.signal(number, handler)
    cli.main()


if __name__ == "__main__":
    main()
