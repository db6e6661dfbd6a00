"""The modules of the kit. With this file `src` is a regular package: Python takes no other package of that name."""

from src.common import machine

machine.prepare_environment()
