"""python -m ci.ptx sm_90 SCRIPT ARGUMENTS...: a script whose kernels are compiled and run here."""

import runpy
import sys

from . import driver

target, *sys.argv = sys.argv[1:]
driver.install(*target.split(","))
runpy.run_path(sys.argv[0], run_name="__main__")
