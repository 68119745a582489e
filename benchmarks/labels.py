"""What labels are worth and what they cost: `python -m benchmarks.labels`.

python -m benchmarks.labels                      known truth: five small worlds, two settings (`labels_truth`)
python -m benchmarks.labels --people [FOLDER]    real people: TIFA-160's raters and metrics (`labels_people`)
python -m benchmarks.labels --pairs 1000000      seconds and memory, against `datasets.map` (`labels_speed`); --scaling
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import labels_people, labels_speed, labels_truth


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--people", type=Path, nargs="?", const=labels_people.DATA, metavar="FOLDER")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--scaling", action="store_true", help="with --pairs: also a quarter and four times as many")
    parser.add_argument("--folder", type=Path, help="with --pairs: keep the generated stores here")
    options = parser.parse_args()
    if options.pairs is not None:
        labels_speed.main(options.pairs, is_scaling_measured=options.scaling, folder=options.folder)
    elif options.people is not None:
        labels_people.main(options.people)
    else:
        labels_truth.main()


if __name__ == "__main__":
    main()
