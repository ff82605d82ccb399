"""The source distribution with all that its tests and documents read; setuptools' own has neither
`tests/conftest.py` nor benchmarks. pyproject.toml names the class; MANIFEST.in would be one more
file at the top."""

from setuptools.command.sdist import sdist

TEMPLATE = (
    "include *.md CITATION.cff",
    "recursive-include dl_norm *.md",
    "graft dl_norm/examples",
    "graft tests",
    "graft bench",
    "graft ci",
    "global-exclude *.py[co]",
    "prune **/__pycache__",
)


class Sdist(sdist):
    """setuptools' command, with TEMPLATE in the place of a MANIFEST.in."""

    def make_distribution(self):
        for line in TEMPLATE:
            self.filelist.process_template_line(line)
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()
