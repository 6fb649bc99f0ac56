"""`python -m trimtab`."""

from trimtab.main import main

if __name__ == "__main__":
    main()
