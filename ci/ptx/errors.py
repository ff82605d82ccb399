class PtxError(Exception):
    """What a kernel did that it must not, and where in its PTX and its source."""
