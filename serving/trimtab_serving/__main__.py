"""`python -m trimtab_serving FILE`: verify a model, then serve it."""

import sys

from trimtab_serving.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
