"""The demonstration behind `python -m deer_ode`. Nothing in the library imports it."""

from ._command_line import main as main
