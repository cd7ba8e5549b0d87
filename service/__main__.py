"""`python -m service` is `camserve`."""

from service.cli import main

main()
