"""The embedded user, its replies late: `python -m benchmarks.slow_user SECONDS` serves until stdin closes."""

import argparse
import time

import simulator


def main() -> None:
    """Serve on a free port; requests wait side by side, as they do in front of a server that batches them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, help="from a request to its reply")
    seconds = parser.parse_args().seconds

    def answer_late(raw: bytes) -> dict:
        time.sleep(seconds)
        return simulator.complete(raw)

    simulator.main(["--port", "0", "--until-stdin-closes"], answer_late)


if __name__ == "__main__":
    main()
