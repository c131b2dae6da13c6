"""`python -m lorica`: the same as the `lorica` command."""

from lorica.cli import app

if __name__ == "__main__":
    app()
