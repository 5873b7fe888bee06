"""`python -m anyo_lightning`: the command line where the name `anyo` stands for another program."""

from anyo_lightning.cli.main import main

if __name__ == "__main__":
    main()
