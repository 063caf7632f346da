"""`python -m siv_core.cli`, where the command `siv` is not on the path."""

from siv_core.cli.main import main

if __name__ == "__main__":
    main()
