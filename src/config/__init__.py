"""Defines the settings of a run, reads them from a YAML and the command line, and checks them."""
