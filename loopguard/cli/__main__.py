"""`python -m loopguard.cli`, for where the console script is not on PATH."""

from loopguard.cli.app import main

main()
