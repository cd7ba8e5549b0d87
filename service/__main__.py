"""`python -m service` is `camserve`."""

from service.cli.main import main

main()
