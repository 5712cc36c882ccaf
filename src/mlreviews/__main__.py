"""``python -m mlreviews`` is the command line."""

from mlreviews.cli import main

if __name__ == "__main__":
    main()
