"""`python -m matrigami`: the command line."""

from matrigami.cli import main

if __name__ == "__main__":
    main()
