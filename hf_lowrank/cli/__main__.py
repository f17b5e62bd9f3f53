"""`python -m hf_lowrank.cli`: the same as the command `hf-lowrank`."""

from hf_lowrank.cli import main


main()
