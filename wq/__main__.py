"""`python -m wq` is `wq`."""

from wq.cli import main

main()
