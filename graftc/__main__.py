"""`python -m graftc`: the command line where the `graftc` script is not on the path."""

from graftc.cli import main

if __name__ == "__main__":
    main()
