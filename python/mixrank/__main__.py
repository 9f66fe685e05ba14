"""``python -m mixrank``: the command line without the installed script."""

from mixrank.cli import main

if __name__ == "__main__":
    main()
