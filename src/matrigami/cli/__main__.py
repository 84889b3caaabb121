"""`python -m matrigami.cli`."""

from matrigami.cli import main

if __name__ == "__main__":  # worker processes import this module under another name
    main()
