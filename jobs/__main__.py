"""`python -m jobs` is `rushes`."""

from jobs import cli

if __name__ == "__main__":
    cli.main()
